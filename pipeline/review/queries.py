"""What the review page shows: filters, pages of the grid, and everything said about one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.tables import State
from pipeline.review.ledger import latest

PAGE_SIZE = 60
STATES = (State.NOT_ASSESSED, State.ABSENT, State.UNCERTAIN, State.PRESENT)
CODE = {state.value: code for code, state in enumerate(STATES)}
SORTS = {"": "as in the folder", "uncertain": "most uncertain first", "disputed": "most disputed first"}


@dataclass(frozen=True)
class Filters:
    """Which images, in which order: the whole state of the grid, and its address."""

    label: str = ""
    split: str = ""
    concept: str = ""
    state: str = ""
    sort: str = ""
    page: int = 1

    def query(self, **changes: object) -> str:
        """The query string of these filters, with changes; empty for the plain grid."""
        values = {**self.__dict__, **changes}
        kept = {k: v for k, v in values.items() if v and not (k == "page" and v == 1)}
        return f"?{urlencode(kept)}" if kept else ""


class Page(NamedTuple):
    """One page of the grid."""

    images: list[dict[str, Any]]
    n_found: int
    first: int
    n_pages: int


@dataclass(frozen=True)
class Snapshot:
    """The run at one moment. Arrays are (N images, K concepts)."""

    images: pd.DataFrame
    """Accepted images by position: image_id, path, label, split, width_px, height_px."""
    vocabulary: Vocabulary
    code: npt.NDArray[np.int8]
    """Index into `STATES`."""
    probability: npt.NDArray[np.float32]
    """NaN where nothing is known."""
    disagreement: npt.NDArray[np.float32]
    by_expert: npt.NDArray[np.bool_]
    judgements: pd.DataFrame
    """The ledger, in order."""
    position: dict[str, int]
    """Image id → row."""

    def find(self, filters: Filters) -> npt.NDArray[np.intp]:
        """Rows of the images that pass, in order."""
        keep = np.ones(len(self.images), np.bool_)
        for column, wanted in (("label", filters.label), ("split", filters.split)):
            if wanted:
                keep &= (self.images[column] == wanted).fillna(False).to_numpy(np.bool_)
        concept = self.vocabulary.position(filters.concept) if filters.concept in self.vocabulary else None
        if filters.state in CODE:
            hit = self.code == CODE[filters.state]
            keep &= hit.any(axis=1) if concept is None else hit[:, concept]
        rows = np.flatnonzero(keep)
        if filters.sort not in ("uncertain", "disputed"):
            return rows
        weights = self.uncertainty() if filters.sort == "uncertain" else np.where(self.by_expert, 0, self.disagreement)
        of_image = weights.mean(axis=1) if concept is None else weights[:, concept]
        return rows[np.argsort(-of_image[rows], kind="stable")]

    def uncertainty(self) -> npt.NDArray[np.float32]:
        """(N, K) in 0-1: 1 where the label is open or the probability 0.5, 0 where sure or an expert spoke."""
        doubt = 1 - np.abs(2 * self.probability - 1)
        doubt = np.where(np.isnan(doubt) | (self.code == CODE[State.UNCERTAIN]), 1, doubt)
        return np.where(self.by_expert, 0, doubt).astype(np.float32)

    def page(self, filters: Filters) -> Page:
        """One page of the grid; a page number beyond the end shows the last one."""
        rows = self.find(filters)
        n_pages = max(1, -(-len(rows) // PAGE_SIZE))
        first = (min(max(filters.page, 1), n_pages) - 1) * PAGE_SIZE
        return Page([self._card(row, filters) for row in rows[first : first + PAGE_SIZE]], len(rows), first, n_pages)

    def _card(self, row: int, filters: Filters) -> dict[str, Any]:
        codes = self.code[row]
        image = self.image(row)
        card = {
            **image,
            "present": [self.vocabulary.names[k] for k in np.flatnonzero(codes == CODE[State.PRESENT])],
            "n_uncertain": int((codes == CODE[State.UNCERTAIN]).sum()),
            "n_expert": int(self.by_expert[row].sum()),
        }
        if filters.concept in self.vocabulary:
            k = self.vocabulary.position(filters.concept)
            card["asked"] = {"state": STATES[codes[k]].value, "probability": _number(self.probability[row, k])}
        return card

    def image(self, row: int) -> dict[str, Any]:
        """Id, path, class and split of one row; missing ones are None."""
        return {k: None if pd.isna(v) else v for k, v in self.images.iloc[row].to_dict().items()}

    def shape_px(self, image_id: str) -> tuple[int, int] | None:
        """(height, width) of an image, if known."""
        height, width = self.images.loc[self.position[image_id], ["height_px", "width_px"]]
        return None if pd.isna(height) or pd.isna(width) else (int(height), int(width))

    def neighbours(self, image_id: str, filters: Filters) -> tuple[str | None, str | None, int, int]:
        """(previous id, next id, place from 1, number found) of an image among those that pass."""
        rows = self.find(filters)
        places = np.flatnonzero(rows == self.position[image_id])
        if not len(places):
            return None, None, 0, len(rows)
        place = int(places[0])
        ids = self.images["image_id"]
        before = str(ids.iloc[rows[place - 1]]) if place > 0 else None
        after = str(ids.iloc[rows[place + 1]]) if place + 1 < len(rows) else None
        return before, after, place + 1, len(rows)

    def concepts_of(self, image_id: str) -> list[dict[str, Any]]:
        """One row a concept: state, probability, and what each witness said last."""
        row = self.position[image_id]
        said = latest(self.judgements[self.judgements["image_id"] == image_id])
        rows = []
        for k, concept in enumerate(self.vocabulary):
            mine = said[said["concept_id"] == concept.concept_id]
            rows.append(
                {
                    "concept": concept,
                    "state": STATES[self.code[row, k]].value,
                    "probability": _number(self.probability[row, k]),
                    "disagreement": float(self.disagreement[row, k]),
                    "by_expert": bool(self.by_expert[row, k]),
                    "witnesses": [_witness(w) for w in mine.to_dict("records") if w["state"] != State.NOT_ASSESSED],
                }
            )
        return rows

    def concept_of(self, image_id: str, concept_id: str) -> dict[str, Any]:
        """One row of `concepts_of`."""
        return self.concepts_of(image_id)[self.vocabulary.position(concept_id)]


def _witness(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "who": row["witness"],
        "model": row["witness_model"],
        "state": row["state"],
        "probability": _number(row["probability"]),
        "evidence": None if pd.isna(row["evidence"]) else row["evidence"],
        "at": row["created_at"],
    }


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)
