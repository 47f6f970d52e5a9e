"""The audit sheet as the page fills it: one answer at a time, never on top of a row that changed."""

from __future__ import annotations

import threading

import pandas as pd

from data_contracts.errors import ContractViolation
from data_contracts.store import RunFolder


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


def question(sheet: pd.DataFrame, asked: int | None) -> int | None:
    """The row to show: the one asked for, else the first without an answer, else the first."""
    if not len(sheet):
        return None
    if asked is not None and 0 <= asked < len(sheet):
        return asked
    return int((sheet["answer"] == "").idxmax())
