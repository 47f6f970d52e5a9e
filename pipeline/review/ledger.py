"""Corrections as rows of the append-only ledger, and answers of the audit sheet."""

from __future__ import annotations

import threading
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow.parquet as pq

from data_contracts.errors import ContractViolation
from data_contracts.store import RunFolder
from data_contracts.tables import JUDGEMENTS, State, Witness, to_pandas

UNDO = "undo:"
"""Prefix of `request_id` of a judgement that takes the reviewer's last one back."""


def latest(judgements: pd.DataFrame) -> pd.DataFrame:
    """The last word of every witness on every cell, in the order of the ledger."""
    return judgements.drop_duplicates(["image_id", "concept_id", "witness", "witness_model"], keep="last")


def standing(judgements: pd.DataFrame) -> list[dict[str, Any]]:
    """One reviewer's judgements of one cell that were not taken back, oldest first."""
    stack: list[dict[str, Any]] = []
    for row in judgements.to_dict("records"):
        if str(row["request_id"]).startswith(UNDO):
            stack = stack[:-1]
        else:
            stack.append(row)
    return stack


class Cell(NamedTuple):
    """One concept in one image, and who speaks about it."""

    image_id: str
    concept_id: str
    reviewer: str


class Ledger:
    """What witnesses said, and what reviewers add. One row an action; nothing is ever changed or taken out.

    Every correction is a part of its own, so parts that were read once are kept: they never change.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._lock = threading.RLock()
        self._parts: frozenset[str] = frozenset()
        self._rows = JUDGEMENTS.empty()

    def parts(self) -> frozenset[str]:
        """Names of the parts that are on the disk now: different names, different ledger."""
        return frozenset(path.name for path in self._run.judgements_dir.glob("part-*.parquet"))

    def read(self) -> pd.DataFrame:
        """The whole ledger in the order it was said."""
        with self._lock:
            parts = self.parts()
            if not self._parts or self._parts - parts:
                self._rows = self._run.read_judgements()
            elif parts - self._parts:
                fresh = [_part(self._run.judgements_dir / name) for name in sorted(parts - self._parts)]
                rows = pd.concat([self._rows, *fresh], ignore_index=True)
                self._rows = rows.sort_values("created_at", kind="stable", ignore_index=True)
            self._parts = parts
            return self._rows

    def correct(self, cell: Cell, state: State) -> None:
        """Append a reviewer's judgement; on return it is on the disk."""
        with self._lock:
            before = self._standing(cell)
            self._append(cell, state.value, f"review:{uuid.uuid4().hex}", before[-1]["request_id"] if before else None)

    def undo(self, cell: Cell) -> bool:
        """Take the reviewer's last standing judgement of a cell back; False when there is none.

        The row that does so says what stands again: the judgement before, or `not_assessed`.
        """
        with self._lock:
            before = self._standing(cell)
            if not before:
                return False
            state = before[-2]["state"] if len(before) > 1 else State.NOT_ASSESSED.value
            self._append(cell, state, f"{UNDO}{uuid.uuid4().hex}", before[-1]["request_id"])
            return True

    def _standing(self, cell: Cell) -> list[dict[str, Any]]:
        said = self.read()
        mine = (said["witness"] == Witness.EXPERT) & (said["witness_model"] == cell.reviewer)
        here = (said["image_id"] == cell.image_id) & (said["concept_id"] == cell.concept_id)
        return standing(said[mine & here])

    def _append(self, cell: Cell, state: str, request_id: str, supersedes: str | None) -> None:
        row = pd.DataFrame(
            {
                "image_id": [cell.image_id],
                "concept_id": [cell.concept_id],
                "witness": [Witness.EXPERT.value],
                "witness_model": [cell.reviewer],
                "state": [state],
                "request_id": [request_id],
                "created_at": [pd.Timestamp(datetime.now(UTC))],
                "supersedes": pd.Series([supersedes], dtype="str"),
            }
        )
        self._run.append_judgements(row.reindex(columns=JUDGEMENTS.column_names))


def _part(path: Path) -> pd.DataFrame:
    table = pq.read_table(path, partitioning=None)
    JUDGEMENTS.check(table, str(path))
    return to_pandas(table)


class AuditSheet:
    """`audit.csv`: the cells an expert is asked about, without what the machine said."""

    COLUMNS = ("image_id", "concept_id", "answer")

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._lock = threading.Lock()

    def read(self) -> pd.DataFrame:
        """The sheet as text cells; raises `ContractViolation` if a column is missing."""
        sheet = self._run.read_audit()
        missing = [name for name in self.COLUMNS if name not in sheet.columns]
        if missing:
            raise ContractViolation(
                self._run.audit_path.name,
                [f"column {name!r} is missing" for name in missing],
                remedy="Draw the sheet again with `medmicn audit draw`.",
            )
        return sheet

    def answer(self, number: int, image_id: str, concept_id: str, state: str) -> None:
        """Write one answer; an empty one takes it back. The row must still be the one that was shown."""
        with self._lock:
            sheet = self.read()
            if not 0 <= number < len(sheet) or tuple(sheet.loc[number, ["image_id", "concept_id"]]) != (
                image_id,
                concept_id,
            ):
                raise ContractViolation(
                    self._run.audit_path.name,
                    [f"row {number + 2}: is no longer the cell that was shown; nothing was written"],
                    remedy="Reload the page.",
                )
            sheet.loc[number, "answer"] = state
            self._run.write_audit(sheet)
