"""Corrections: every one an append to the ledger, on the disk before it is acknowledged, and undone by another."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pandas as pd

from data_contracts.store import RunFolder
from data_contracts.tables import JUDGEMENTS, State, Witness
from pipeline.review.experts import UNDO, events, standing
from pipeline.review.index import Index

BLIND = "said without seeing the machine's answer"
"""Evidence of a correction made in audit mode."""


class Cell(NamedTuple):
    """One concept in one image."""

    image_id: str
    concept_id: str


class Reviewer(NamedTuple):
    """Who speaks, and whether the machine's answer was hidden."""

    name: str
    is_blind: bool = False


class _Word(NamedTuple):
    cell: Cell
    state: str
    request_id: str
    supersedes: str | None


class Corrections:
    """Appends to the ledger of a run. Nothing is ever changed or taken out."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def correct(self, index: Index, cells: Sequence[Cell], state: State, reviewer: Reviewer) -> str:
        """Append a reviewer's judgement of each cell as one part; returns the action's id, by which it is undone.

        On return the part is on the disk, and the page's database shows it.
        """
        action = uuid.uuid4().hex
        with index.write_lock:
            words = []
            for n, cell in enumerate(dict.fromkeys(cells)):
                before = self._standing(index, cell, reviewer.name)
                superseded = before[-1]["request_id"] if before else None
                words.append(_Word(cell, state.value, f"review:{action}:{n}", superseded))
            self._append(index, words, reviewer)
        return action

    def undo(self, index: Index, cell: Cell, reviewer: Reviewer) -> bool:
        """Take the reviewer's last standing judgement of a cell back; False when there is none.

        The row that does so says what stands again: the judgement before, or `not_assessed`.
        """
        with index.write_lock:
            before = self._standing(index, cell, reviewer.name)
            if before:
                self._append(index, [_taken_back(cell, before)], reviewer)
            return bool(before)

    def undo_action(self, index: Index, action: str, reviewer: Reviewer) -> int:
        """Take back what one action said, wherever the reviewer did not speak again since; returns how many cells."""
        with index.write_lock:
            rows = (
                index.cursor()
                .execute(
                    "SELECT i.image_id, s.concept FROM said s JOIN images i USING (position) "
                    "WHERE starts_with(s.request_id, ?) AND s.reviewer = ?",
                    [f"review:{action}:", reviewer.name],
                )
                .fetchall()
            )
            words = []
            for cell in (Cell(*row) for row in rows):
                before = self._standing(index, cell, reviewer.name)
                if before and str(before[-1]["request_id"]).startswith(f"review:{action}:"):
                    words.append(_taken_back(cell, before))
            self._append(index, words, reviewer)
        return len(words)

    def carry_over(self, index: Index, origin: str, to: Mapping[str, State], *, said: State, note: str) -> int:
        """Repeat, for other concepts, what reviewers said of `origin` where it was `said`; returns how many words.

        A reviewer who spoke of a concept already keeps that word.
        """
        rows = index.cursor().execute(
            "SELECT DISTINCT i.image_id, s.reviewer FROM said s JOIN images i USING (position) WHERE s.concept = ?",
            [origin],
        )
        action, n_words = uuid.uuid4().hex, 0
        by_reviewer: dict[str, list[_Word]] = defaultdict(list)
        with index.write_lock:
            for image_id, name in rows.fetchall():
                words = self._standing(index, Cell(image_id, origin), name)
                if not words or words[-1]["state"] != said:
                    continue
                for concept_id, state in to.items():
                    cell = Cell(image_id, concept_id)
                    if not self._standing(index, cell, name):
                        number = f"review:{action}:{n_words}"
                        by_reviewer[name].append(_Word(cell, state.value, number, words[-1]["request_id"]))
                        n_words += 1
            for name, carried in by_reviewer.items():
                self._append(index, carried, Reviewer(name), evidence=note)
        return n_words

    def _standing(self, index: Index, cell: Cell, reviewer: str) -> list[Mapping[str, Any]]:
        said = events(index.cursor(), index.position(cell.image_id), cell.concept_id)
        return standing(row for row in said if row["reviewer"] == reviewer)

    def _append(self, index: Index, words: Sequence[_Word], reviewer: Reviewer, *, evidence: str | None = None) -> None:
        if not words:
            return
        rows = pd.DataFrame(
            {
                "image_id": [word.cell.image_id for word in words],
                "concept_id": [word.cell.concept_id for word in words],
                "witness": Witness.EXPERT.value,
                "witness_model": reviewer.name,
                "state": [word.state for word in words],
                "evidence": pd.Series([evidence or (BLIND if reviewer.is_blind else None)] * len(words), dtype="str"),
                "request_id": [word.request_id for word in words],
                "created_at": pd.Timestamp(datetime.now(UTC)),
                "supersedes": pd.Series([word.supersedes for word in words], dtype="str"),
            }
        )
        path = self._run.append_judgements(rows.reindex(columns=JUDGEMENTS.column_names))
        if path is not None:
            index.take_in([path], only_experts=True)


def _taken_back(cell: Cell, before: Sequence[Mapping[str, Any]]) -> _Word:
    state = before[-2]["state"] if len(before) > 1 else State.NOT_ASSESSED.value
    return _Word(cell, state, f"{UNDO}{uuid.uuid4().hex}", before[-1]["request_id"])
