"""Concept labels from a spreadsheet: read, checked whole, compared, and only then handed over as judgements.

A wide sheet has one row an image and one column a concept (id or name), or one column an attribute whose
cell names the value that holds (a concept group: `nucleus shape` = `irregular`). A long sheet has one row a
cell: image, `concept_id`, `state`. An empty cell says nothing; it never means absent.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from data_contracts.concepts import Concept, Vocabulary, slug
from data_contracts.errors import ContractViolation
from data_contracts.files import sha256_of_file
from data_contracts.tables import JUDGEMENTS, State, Witness
from pipeline.export import states_of
from pipeline.sheet import Sheet, read_sheet

STATE_OF_CELL: Mapping[str, State] = {
    **dict.fromkeys(("1", "1.0", "1,0", "present", "yes", "y", "true", "wahr", "vrai"), State.PRESENT),
    **dict.fromkeys(("0", "0.0", "0,0", "absent", "no", "n", "false", "falsch", "faux"), State.ABSENT),
    **dict.fromkeys(("uncertain", "?"), State.UNCERTAIN),
    **dict.fromkeys(("not_assessed", "not assessed"), State.NOT_ASSESSED),
}
"""What a cell may say, in lower case; spreadsheets write 1 as `1.0` or `TRUE`, some of them translated."""

IMAGE_COLUMNS = ("image_id", "path", "file", "filename", "image")
"""Columns that can say which image a row is about."""
_OTHER_COLUMNS = frozenset(
    {"label", "split", "group_id", "patient_id", "frame", "comment", "comments", "note", "notes"}
    # What Label Studio adds to the columns of its CSV export
    | {"id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time"}
)
_SAYS_NOTHING = frozenset({"", "nan", "na", "n/a"})
_EXPECTED = "1, 0, present, absent, uncertain, not_assessed or nothing"


@dataclass(frozen=True)
class Imported:
    """What a sheet says that was not known yet."""

    judgements: pd.DataFrame
    """Rows for the ledger; only of cells that differ from `current`, or of all cells without `current`."""
    changed: pd.DataFrame
    """The same as a diff to show first: image_id, path, concept_id, before, after, row (of the sheet)."""
    n_unchanged: int
    """Cells that say what was known already."""
    n_rows_left_out: int = 0
    """Rows about images that this run rejected; nothing can be said of those."""


class _Said(NamedTuple):
    row: int
    image_id: str
    concept_id: str
    state: State


@dataclass(frozen=True)
class _Reading:
    """One pass over a sheet: what it says, and everything that is wrong with it."""

    sheet: Sheet
    vocabulary: Vocabulary
    images: _Images
    said: dict[tuple[str, str], _Said] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    """Rows about rejected images."""

    def add(self, row: int, column: str, image_id: str, concept_id: str, state: State) -> None:
        """Keep one cell; two rows may repeat each other but not contradict."""
        before = self.said.setdefault((image_id, concept_id), _Said(row, image_id, concept_id, state))
        if before.state is not state:
            self.faults.append(
                f"row {row}, column {column!r}: says {state} where row {before.row} says {before.state} "
                "of the same image and concept"
            )


def read_labels(
    path: Path,
    images: pd.DataFrame,
    vocabulary: Vocabulary,
    *,
    reviewer: str,
    witness: Witness = Witness.EXPERT,
    current: pd.DataFrame | None = None,
    said_at: datetime | None = None,
) -> Imported:
    """What the sheet at `path` says, as judgements of `reviewer`.

    Give `current` (a `labels` table) for an edited export: only cells that differ become judgements, so
    what the machine said is not taken for the expert's word. Without it every filled cell becomes one.

    Raises:
        InputRefused: the file cannot be read as CSV.
        ContractViolation: with every fault of the sheet (row, column); nothing is imported then.
    """
    sheet = read_sheet(path)
    reading = _Reading(sheet, vocabulary, _known_images(images))
    (_read_long if _is_long(sheet) else _read_wide)(reading)
    if reading.faults:
        raise ContractViolation(
            sheet.name, reading.faults, remedy="Nothing was imported; correct the sheet and import it again."
        )
    return _compared(reading, images, current, _Source(reviewer, witness, said_at or datetime.now(UTC)))


def given_concepts(path: Path) -> pd.DataFrame:
    """The concepts a wide sheet is about, as a `concepts` table of origin `given`, all kept, in column order.

    A column of 0/1 or state words is one concept; a column of other words (`cell_size`: big, small) is a
    group with one concept a value. Identifying columns, comments, and columns of numbers or of more than
    24 different values are none.
    """
    sheet = read_sheet(path)
    concepts = [concept for index, name in enumerate(sheet.header) for concept in _concepts_of(sheet, index, name)]
    unique = {concept.concept_id: concept for concept in concepts}
    return pd.DataFrame(
        {
            "concept_id": list(unique),
            "name": [c.name for c in unique.values()],
            "definition": [c.definition for c in unique.values()],
            "group": pd.Series([c.group for c in unique.values()], dtype="str"),
            "proposed_for": [[] for _ in unique],
            "origin": "given",
            "status": "kept",
            "reason": pd.Series([None] * len(unique), dtype="str"),
            "nearest": pd.Series([None] * len(unique), dtype="str"),
            "similarity": float("nan"),
            "position": range(len(unique)),
        }
    )


# ---- which image, which concept --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Images:
    """Everything a sheet may call an image: an image id, or a normalised path."""

    accepted: Mapping[str, tuple[str, ...]]
    """Name → the images it can mean; several for the frames of one file."""
    rejected: Mapping[str, str]
    """Name → reason."""


def _known_images(images: pd.DataFrame) -> _Images:
    is_rejected = images["rejected"].notna()
    accepted: dict[str, tuple[str, ...]] = {}
    for row in images[~is_rejected].itertuples(index=False):
        accepted[row.image_id] = (row.image_id,)
        accepted[_normal(row.path)] = (*accepted.get(_normal(row.path), ()), row.image_id)
    rejected: dict[str, str] = {}
    for row in images[is_rejected].itertuples(index=False):
        # Another copy of an accepted file has that file's id, but only the accepted path speaks for it.
        rejected[_normal(row.path)] = row.rejected
        rejected[row.image_id] = row.rejected
    return _Images(accepted, rejected)


def _normal(path: str) -> str:
    return re.sub(r"^(\./)+", "", path.replace("\\", "/"))


def _image(reading: _Reading, row: int, named: Mapping[str, str]) -> str | None:
    """The image one row is about, or None with a fault or a left-out row noted."""
    column, value = next(((c, v) for c, v in named.items() if v), ("", ""))
    found = reading.images.accepted.get(_normal(value), ()) if value else ()
    if len(found) == 1:
        return found[0]
    if not found and _normal(value) in reading.images.rejected:
        reading.left_out.append(row)
        return None
    if not value:
        reason = f"expected an image in one of the columns {', '.join(named)}, got nothing"
    elif found:
        reason = f"column {column!r}: {value!r} has {len(found)} frames; say which one in an image_id column"
    else:
        reason = f"column {column!r}: {value!r} is no image of this run"
    reading.faults.append(f"row {row}: {reason}")
    return None


def _named_columns(sheet: Sheet) -> dict[str, int]:
    """Identifying columns in order of trust."""
    lowered = [name.casefold() for name in sheet.header]
    return {name: lowered.index(name) for name in IMAGE_COLUMNS if name in lowered}


def _concept_ids(vocabulary: Vocabulary) -> dict[str, str]:
    """Everything a header or a cell may call a concept → its id."""
    by_name = {slug(concept.name): concept.concept_id for concept in vocabulary}
    return {**by_name, **{slug(concept_id): concept_id for concept_id in vocabulary.ids}}


def _is_long(sheet: Sheet) -> bool:
    return {"concept_id", "state"} <= {name.casefold() for name in sheet.header}


def _rows(reading: _Reading) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """(row number, image id, cells) of the rows whose image is known."""
    columns = _named_columns(reading.sheet)
    if not columns:
        reading.faults.append(f"header: expected one of the columns {', '.join(IMAGE_COLUMNS)}")
        return
    for number, cells in reading.sheet.rows:
        image_id = _image(reading, number, {name: cells[index] for name, index in columns.items()})
        if image_id is not None:
            yield number, image_id, cells


# ---- the two forms ---------------------------------------------------------------------------------------


def _read_long(reading: _Reading) -> None:
    lowered = [name.casefold() for name in reading.sheet.header]
    concept_column, state_column = lowered.index("concept_id"), lowered.index("state")
    known = _concept_ids(reading.vocabulary)
    for number, image_id, cells in _rows(reading):
        concept_id = known.get(slug(cells[concept_column])) if cells[concept_column] else None
        if concept_id is None:
            reading.faults.append(_unknown(f"row {number}, column 'concept_id'", cells[concept_column], known))
            continue
        _take(reading, number, "state", (image_id, concept_id), cells[state_column])


def _read_wide(reading: _Reading) -> None:
    known, groups = _concept_ids(reading.vocabulary), {slug(g): g for g in reading.vocabulary.groups}
    concepts: dict[int, str] = {}
    attributes: dict[int, str] = {}
    for index, name in enumerate(reading.sheet.header):
        if name.casefold() in _OTHER_COLUMNS or name.casefold() in IMAGE_COLUMNS:
            continue
        if slug(name) in known:
            concepts[index] = known[slug(name)]
        elif slug(name) in groups:
            attributes[index] = groups[slug(name)]
        else:
            reading.faults.append(_unknown("header", name, known))
    if not concepts and not attributes and not reading.faults:
        reading.faults.append("header: expected at least one column that names a concept, found none")
    for number, image_id, cells in _rows(reading):
        for index, concept_id in concepts.items():
            _take(reading, number, reading.sheet.header[index], (image_id, concept_id), cells[index])
        for index, group in attributes.items():
            _take_value(reading, number, index, (image_id, group), cells[index])


def _take(reading: _Reading, row: int, column: str, key: tuple[str, str], cell: str) -> None:
    if cell.casefold() in _SAYS_NOTHING:
        return
    state = STATE_OF_CELL.get(cell.casefold())
    if state is None:
        reading.faults.append(f"row {row}, column {column!r}: expected {_EXPECTED}, got {cell[:80]!r}")
        return
    reading.add(row, column, *key, state)


def _take_value(reading: _Reading, row: int, index: int, key: tuple[str, str], cell: str) -> None:
    """One cell of an attribute column: its value is present, and the other values of the group are absent."""
    image_id, group = key
    ids = reading.vocabulary.groups[group]
    column = reading.sheet.header[index]
    if cell.casefold() in _SAYS_NOTHING:
        return
    if cell.casefold() in ("uncertain", "?"):
        for concept_id in ids:
            reading.add(row, column, image_id, concept_id, State.UNCERTAIN)
        return
    wanted = {slug(cell), slug(f"{group} {cell}")}
    holds = [i for i in ids if i in wanted or slug(reading.vocabulary[i].name) in wanted]
    if len(holds) != 1:
        values = ", ".join(reading.vocabulary[i].name for i in ids)
        reading.faults.append(f"row {row}, column {column!r}: expected one of {values}, got {cell[:80]!r}")
        return
    for concept_id in ids:
        reading.add(row, column, image_id, concept_id, State.PRESENT if concept_id in holds else State.ABSENT)


def _unknown(where: str, name: str, known: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(slug(name) if name else "", known, n=1)
    hint = f"; did you mean {known[near[0]]!r}?" if near else ""
    return f"{where}: {name[:80]!r} is no concept of this run{hint}"


# ---- from cells to judgements ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    reviewer: str
    witness: Witness
    said_at: datetime


def _compared(reading: _Reading, images: pd.DataFrame, current: pd.DataFrame | None, source: _Source) -> Imported:
    before: dict[tuple[str, str], str] = {} if current is None else _known_states(current)
    cells = list(reading.said.values())
    changed = [c for c in cells if current is None or before.get((c.image_id, c.concept_id)) != c.state]
    # Saying "not assessed" of what nobody assessed is no news, and no judgement either.
    changed = [c for c in changed if c.state is not State.NOT_ASSESSED or (c.image_id, c.concept_id) in before]
    paths = dict(zip(images["image_id"], images["path"], strict=True))
    diff = pd.DataFrame(
        [
            (c.image_id, paths[c.image_id], c.concept_id, before.get((c.image_id, c.concept_id)), c.state.value, c.row)
            for c in changed
        ],
        columns=["image_id", "path", "concept_id", "before", "after", "row"],
    )
    diff["before"] = diff["before"].fillna(State.NOT_ASSESSED.value).astype("str")
    return Imported(_judgements(reading.sheet, changed, source), diff, len(cells) - len(changed), len(reading.left_out))


def _known_states(labels: pd.DataFrame) -> dict[tuple[str, str], str]:
    states = states_of(labels)
    return dict(zip(zip(states["image_id"], states["concept_id"], strict=True), states["state"], strict=True))


def _judgements(sheet: Sheet, cells: list[_Said], source: _Source) -> pd.DataFrame:
    if not cells:
        return JUDGEMENTS.empty()
    frame = pd.DataFrame(
        {
            "image_id": [c.image_id for c in cells],
            "concept_id": [c.concept_id for c in cells],
            "witness": source.witness.value,
            "witness_model": source.reviewer,
            "state": [c.state.value for c in cells],
            "request_id": f"sheet:{sha256_of_file(sheet.path)[:16]}",
            "created_at": pd.Timestamp(source.said_at),
        }
    )
    return frame.reindex(columns=JUDGEMENTS.column_names)


# ---- concepts that come with the labels ------------------------------------------------------------------


def _concepts_of(sheet: Sheet, index: int, name: str) -> list[Concept]:
    lowered = name.casefold()
    values = list(dict.fromkeys(v for _, c in sheet.rows if (v := c[index]) and v.casefold() not in _SAYS_NOTHING))
    if lowered in _OTHER_COLUMNS or lowered in IMAGE_COLUMNS or not values:
        return []
    words = re.sub(r"[\s_]+", " ", name).strip()
    if all(value.casefold() in STATE_OF_CELL for value in values) and not {v.casefold() for v in values} <= {
        "yes",
        "no",
    }:
        return [Concept(slug(words), words, f"{words} is visible.")]
    if len(values) > 24 or all(re.fullmatch(r"[-+]?[\d.,]+", value) for value in values):
        return []
    return [
        Concept(slug(f"{words} {value}"), f"{words} {value}", f"{words}: {value}.", words) for value in sorted(values)
    ]
