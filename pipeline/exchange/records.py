"""One image with its labels, as every export reads it; images come one by one, however many there are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.files import write_with
from data_contracts.tables import State
from pipeline.export import states_of

Address = Callable[["Record"], str]
"""Where another program finds an image's file."""


@dataclass(frozen=True)
class Cell:
    """The label of one concept in one image."""

    concept_id: str
    state: str
    probability: float
    decided_by: str


@dataclass(frozen=True)
class Record:
    """An accepted image and what is said of it, concepts in the vocabulary's order."""

    image_id: str
    path: str
    label: str | None
    split: str | None
    width_px: int | None
    height_px: int | None
    cells: tuple[Cell, ...]

    @property
    def file_stem(self) -> str:
        """The image's id as a file name."""
        return self.image_id.replace("#", "_")

    def of_state(self, state: State) -> list[Cell]:
        """The cells in this state."""
        return [cell for cell in self.cells if cell.state == state]


def records(images: pd.DataFrame, labels: pd.DataFrame, vocabulary: Vocabulary) -> Iterator[Record]:
    """The accepted images in the order of their table; a cell that nobody labelled is left out.

    Args:
        images: IMAGES.
        labels: LABELS; rows of concepts that are not in the vocabulary are left out.
        vocabulary: The kept concepts.
    """
    accepted = images[images["rejected"].isna()]
    place = pd.Index(accepted["image_id"]).get_indexer(labels["image_id"])
    position = pd.Index(vocabulary.ids).get_indexer(labels["concept_id"])
    known = np.flatnonzero((place >= 0) & (position >= 0))
    order = known[np.lexsort((position[known], place[known]))]
    rows = pd.DataFrame(
        {
            "concept_id": labels["concept_id"].to_numpy(object)[order],
            "state": states_of(labels)["state"].to_numpy(object)[order],
            "probability": labels["probability"].to_numpy(np.float64)[order],
            "decided_by": labels["decided_by"].to_numpy(object)[order],
        }
    )
    ends = np.searchsorted(place[order], np.arange(len(accepted)), side="right")
    first = 0
    for row, end in zip(accepted.to_dict("records"), ends, strict=True):
        cells = tuple(Cell(*cell) for cell in rows.iloc[first:end].itertuples(index=False, name=None))
        yield Record(
            row["image_id"],
            row["path"],
            _text(row["label"]),
            _text(row["split"]),
            _number(row["width_px"]),
            _number(row["height_px"]),
            cells,
        )
        first = end


def write_json_list(path: Path, items: Iterable[Any]) -> int:
    """Write items as one JSON list, a line each, without holding them; returns how many there were."""
    count = 0

    def fill(temporary: Path) -> None:
        nonlocal count
        with temporary.open("w", encoding="utf-8") as file:
            file.write("[")
            for item in items:
                file.write(("," if count else "") + "\n" + as_json(item))
                count += 1
            file.write("\n]\n")

    write_with(path, fill)
    return count


def as_json(value: Any) -> str:
    """Strict JSON on one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _text(value: object) -> str | None:
    return None if pd.isna(value) else str(value)


def _number(value: Any) -> int | None:
    return None if pd.isna(value) else int(value)
