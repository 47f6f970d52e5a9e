"""An edited `concepts.csv`: read, checked whole, compared with what stands, and only then a new concepts table.

Rows are known by `concept_id`; a row without one, or with a new one, is a new concept. A row that is missing says
nothing: concepts are taken out by writing `dropped` in the column `status`, so that a lost row loses no concept.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from data_contracts.concepts import slug
from data_contracts.errors import ContractViolation, DropReason
from data_contracts.tables import CONCEPTS, ConceptOrigin, ConceptStatus, to_pandas
from pipeline.sheet import Sheet, read_sheet

EDITABLE = ("name", "definition", "group", "status", "synonyms", "contrast")
"""Columns that a person may change; all others are what the machine found, and are read over."""
_LISTS = {"synonyms"}
_ASKED = {"name", "definition", "group", "synonyms", "contrast"}
"""Columns that are part of the question: a change asks about the concept again."""

Row = dict[Hashable, Any]


@dataclass(frozen=True)
class Change:
    """One cell that differs, or a new concept (`column` is then `concept`)."""

    row: int
    """Of the sheet, the header being row 1."""
    concept_id: str
    column: str
    before: str
    after: str

    @property
    def asks_again(self) -> bool:
        """Whether the models have to be asked about this concept because of it."""
        back = self.column == "status" and self.after == ConceptStatus.KEPT
        return self.column == "concept" or self.column in _ASKED or back


@dataclass(frozen=True)
class ConceptEdits:
    """What a sheet changes."""

    concepts: pd.DataFrame
    """CONCEPTS as they will be."""
    changes: tuple[Change, ...]

    @property
    def asked_again(self) -> tuple[str, ...]:
        """Ids of kept concepts whose question is new."""
        kept = set(self.concepts.loc[self.concepts["status"] == ConceptStatus.KEPT, "concept_id"])
        return tuple(dict.fromkeys(c.concept_id for c in self.changes if c.asks_again and c.concept_id in kept))


def is_concept_sheet(path: Path) -> bool:
    """Whether a sheet has one row a concept, as `concepts.csv` does, and not labels."""
    header = {name.casefold() for name in read_sheet(path).header}
    return {"concept_id", "name", "status"} <= header


def read_concept_edits(path: Path, concepts: pd.DataFrame) -> ConceptEdits:
    """What the sheet at `path` changes in a concepts table.

    Raises:
        InputRefused: the file cannot be read as CSV.
        ContractViolation: with every fault of the sheet (row, column); nothing is taken then.
    """
    sheet = read_sheet(path)
    faults: list[str] = []
    rows: dict[str, Row] = {str(row["concept_id"]): row for row in concepts.to_dict("records")}
    changes: list[Change] = []
    seen: dict[str, int] = {}
    for number, cells in _rows(sheet):
        concept_id = cells.get("concept_id") or slug(cells.get("name", ""))
        if concept_id in seen:
            faults.append(f"row {number}: concept {concept_id!r} stands in row {seen[concept_id]} already")
            continue
        seen[concept_id] = number
        faults += _faults(number, cells)
        if concept_id in rows:
            changed = _changed(number, rows[concept_id], cells)
            if changed:
                rows[concept_id]["provenance"] = [*_notes(rows[concept_id]), f"edited in {path.name}"]
            changes += changed
        elif cells.get("name"):
            rows[concept_id] = _new(concept_id, cells, len(rows), path.name)
            changes.append(Change(number, concept_id, "concept", "", cells["name"]))
    faults += _clashes(rows)
    if faults:
        raise ContractViolation(path.name, faults, remedy="Nothing was taken; correct the sheet and import it again.")
    frame = pd.DataFrame(list(rows.values()), columns=list(concepts.columns))
    return ConceptEdits(to_pandas(CONCEPTS.to_arrow(frame, path.name)), tuple(changes))


def _rows(sheet: Sheet) -> list[tuple[int, dict[str, str]]]:
    header = [name.casefold() for name in sheet.header]
    return [(number, dict(zip(header, cells, strict=True))) for number, cells in sheet.rows]


def _faults(number: int, cells: dict[str, str]) -> list[str]:
    found = []
    if "name" in cells and not cells["name"]:
        found.append(f"row {number}, column 'name': expected a name, got nothing")
    if cells.get("status", "kept") not in (*ConceptStatus, ""):
        found.append(f"row {number}, column 'status': expected kept or dropped, got {cells['status'][:40]!r}")
    return found


def _changed(number: int, row: Row, cells: dict[str, str]) -> list[Change]:
    """Write the sheet's cells into a row of the table; returns what differs."""
    found = []
    for column in EDITABLE:
        if column not in cells or (column == "status" and not cells[column]):
            continue
        before, after = _as_text(row[column]), cells[column]
        if before == after:
            continue
        found.append(Change(number, str(row["concept_id"]), column, before, after))
        row[column] = _as_list(after) if column in _LISTS else after or None if column == "group" else after
        if column == "status":
            row["reason"] = DropReason.BY_USER.value if after == ConceptStatus.DROPPED else None
    return found


def _new(concept_id: str, cells: dict[str, str], position: int, file: str) -> Row:
    status = cells.get("status") or ConceptStatus.KEPT.value
    return {
        "concept_id": concept_id,
        "name": cells["name"],
        "definition": cells.get("definition", ""),
        "group": cells.get("group") or None,
        "proposed_for": [],
        "origin": ConceptOrigin.USER.value,
        "status": status,
        "reason": DropReason.BY_USER.value if status == ConceptStatus.DROPPED else None,
        "nearest": None,
        "similarity": float("nan"),
        "position": position,
        "synonyms": _as_list(cells.get("synonyms", "")),
        "contrast": cells.get("contrast", ""),
        "provenance": [f"added in {file}"],
    }


def _clashes(rows: dict[str, Row]) -> list[str]:
    """Kept concepts that a reader could not tell apart by name."""
    names: dict[str, str] = {}
    found = []
    for concept_id, row in rows.items():
        if row["status"] != ConceptStatus.KEPT:
            continue
        other = names.setdefault(str(row["name"]).strip().casefold(), concept_id)
        if other != concept_id:
            found.append(f"concepts {other!r} and {concept_id!r} are both called {row['name']!r}")
    if not names:
        found.append("column 'status': expected at least one concept to be kept, all are dropped")
    return found


def _notes(row: Row) -> list[str]:
    notes: Any = row.get("provenance")
    return list(notes) if hasattr(notes, "__len__") else []


def _as_text(value: Any) -> str:
    if hasattr(value, "__len__") and not isinstance(value, str):
        return "; ".join(map(str, value))
    return "" if pd.isna(value) else str(value)


def _as_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]
