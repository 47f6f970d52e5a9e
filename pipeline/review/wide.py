"""How the page keeps labels: one row an image and three small integers a concept, so that any filter is one scan.

A cell's state holds what the machine says and what experts say over it, side by side: taking an expert's word
back needs no second look at the labels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from data_contracts.tables import State

STATES = (State.NOT_ASSESSED, State.ABSENT, State.UNCERTAIN, State.PRESENT)
CODE = {state.value: code for code, state in enumerate(STATES)}
PROBABILITY_STEPS = 10_000
"""A stored probability of 10 000 is 1; null is unknown."""
DISAGREEMENT_STEPS = 250
DISPUTED = 0.25
"""From this disagreement on, witnesses are said to dispute a cell."""
_UNKNOWN = 65_535
AGGREGATES = ("doubt", "dispute", "worst", "n_present", "n_absent", "n_uncertain", "n_expert")


class Cells(NamedTuple):
    """Labels of all images as arrays (K concepts, N images): a column of the database lies in one piece."""

    state: npt.NDArray[np.uint8]
    probability: npt.NDArray[np.uint16]
    disagreement: npt.NDArray[np.uint8]

    @classmethod
    def blank(cls, n_images: int, n_concepts: int) -> Cells:
        """Cells of which nobody said anything."""
        shape = (n_concepts, n_images)
        return cls(np.zeros(shape, np.uint8), np.full(shape, _UNKNOWN, np.uint16), np.zeros(shape, np.uint8))

    def fill(self, labels: pa.Table, positions: pd.Index, concept_ids: tuple[str, ...]) -> None:
        """Take rows of a `labels` table; rows of other images or concepts are passed over."""
        rows = _places(labels.column("image_id"), positions)
        columns = _places(labels.column("concept_id"), pd.Index(concept_ids))
        keep = (rows >= 0) & (columns >= 0)
        present = labels.column("present")
        state = np.where(
            pc.is_null(present).to_numpy(),
            CODE[State.UNCERTAIN],
            np.where(pc.fill_null(present, False).to_numpy(), CODE[State.PRESENT], CODE[State.ABSENT]),
        )
        where = (columns[keep], rows[keep])
        self.state[where] = state[keep]
        self.probability[where] = _steps(labels.column("probability"), PROBABILITY_STEPS)[keep]
        self.disagreement[where] = _steps(labels.column("disagreement"), DISAGREEMENT_STEPS)[keep]

    @classmethod
    def of(cls, table: pa.Table, n_concepts: int) -> Cells:
        """The cells of some rows of the database."""
        if not n_concepts:
            return cls.blank(table.num_rows, 0)

        def stacked(letter: str, missing: int) -> npt.NDArray[np.generic]:
            columns = (table.column(f"{letter}{k}") for k in range(n_concepts))
            return np.stack([pc.fill_null(column, missing).to_numpy() for column in columns])

        return cls(
            stacked("s", 0).astype(np.uint8), stacked("p", _UNKNOWN).astype(np.uint16), stacked("d", 0).astype(np.uint8)
        )

    def of_images(self, first: int, last: int) -> Cells:
        """The cells of the images from `first` up to `last`."""
        where = slice(first, last)
        return Cells(self.state[:, where], self.probability[:, where], self.disagreement[:, where])

    def table(self) -> pa.Table:
        """Columns `s`, `p` and `d` with the concept's number, and the aggregates; unknown probabilities are null."""
        columns: dict[str, pa.Array | npt.NDArray[np.generic]] = {}
        for k, probability in enumerate(self.probability):
            known = pa.array(probability, mask=probability == _UNKNOWN)
            columns |= {f"s{k}": self.state[k], f"p{k}": known, f"d{k}": self.disagreement[k]}
        return pa.table(columns | self.aggregates())

    def aggregates(self) -> dict[str, npt.NDArray[np.generic]]:
        """Of every image: mean doubt, mean and worst dispute, and how many concepts are in which state."""
        n_concepts, n_images = self.state.shape
        total = {name: np.zeros(n_images, np.int32) for name in AGGREGATES}
        for stored, probability, disagreement in zip(*self, strict=True):
            spoken = stored >= 4
            state = np.where(spoken, stored // 4 - 1, stored)
            steps = probability.astype(np.int32)
            is_open = (stored == CODE[State.UNCERTAIN]) | (stored == CODE[State.NOT_ASSESSED]) | (steps == _UNKNOWN)
            unsure = np.where(is_open, PROBABILITY_STEPS, PROBABILITY_STEPS - np.abs(2 * steps - PROBABILITY_STEPS))
            contested = np.where(spoken, 0, disagreement)
            total["doubt"] += np.where(spoken, 0, unsure)
            total["dispute"] += contested
            np.maximum(total["worst"], contested, out=total["worst"])
            total["n_expert"] += spoken
            for name in (State.PRESENT, State.ABSENT, State.UNCERTAIN):
                total[f"n_{name}"] += state == CODE[name]
        total["doubt"] //= max(1, n_concepts)
        total["dispute"] = 100 * total["dispute"] // max(1, n_concepts)
        return {name: values.astype(np.uint16) for name, values in total.items()}


def _steps(column: pa.ChunkedArray, steps: int) -> npt.NDArray[np.uint16]:
    return np.rint(column.to_numpy() * steps).astype(np.uint16)


def _places(column: pa.ChunkedArray, values: pd.Index) -> npt.NDArray[np.intp]:
    """Place of every entry among `values`, -1 for none. An id stands in many rows: it is looked up once."""
    encoded = column.combine_chunks()
    if not pa.types.is_dictionary(encoded.type):
        encoded = encoded.dictionary_encode()
    of_entry = values.get_indexer(pd.Index(encoded.dictionary.to_pandas()))
    return of_entry[encoded.indices.to_numpy()]


# ---- the same cells in SQL -------------------------------------------------------------------------------


def codes_of(state: str) -> tuple[int, ...]:
    """Stored values that mean `state`: the machine's where no expert spoke, else the experts'."""
    code = CODE[state]
    return (code, *(4 * (code + 1) + machine for machine in range(4)))


def state_of(stored: int) -> State:
    """What a stored value means."""
    return STATES[stored // 4 - 1] if stored >= 4 else STATES[stored]


def by_expert(stored: int) -> bool:
    """Whether an expert's word stands."""
    return stored >= 4


def is_state(k: int, state: str) -> str:
    """SQL: concept `k` is in `state`."""
    machine, *experts = codes_of(state)
    # The experts' codes lie side by side; a range is twice as fast as a list.
    return f"(s{k} = {machine} OR s{k} BETWEEN {experts[0]} AND {experts[-1]})"


def doubt(k: int) -> str:
    """SQL: 0 where sure or an expert spoke, 10 000 where the label is open or its probability one half."""
    steps = PROBABILITY_STEPS
    is_open = f"s{k} IN ({CODE[State.UNCERTAIN]}, {CODE[State.NOT_ASSESSED]}) OR p{k} IS NULL"
    return f"CASE WHEN s{k} >= 4 THEN 0 WHEN {is_open} THEN {steps} ELSE {steps} - abs(2 * p{k}::INT - {steps}) END"


def dispute(k: int) -> str:
    """SQL: disagreement of the machine's witnesses; 0 where an expert settled it."""
    return f"CASE WHEN s{k} >= 4 THEN 0 ELSE d{k}::INT END"
