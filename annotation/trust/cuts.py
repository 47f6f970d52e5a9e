"""Cuts: the numbers per concept above which a score is called present, below which absent, and between them nothing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd
from skimage.filters import threshold_otsu

from annotation.votes import ImageIds, Votes, matrix, places
from data_contracts.concepts import Vocabulary

Array = npt.NDArray[np.float64]

SIMILARITY = "similarity"
PROBABILITY = "probability"
LIMITS = ["threshold", "abstain_low", "abstain_high"]
CUT_COLUMNS = ["concept_id", "score", *LIMITS]
"""What every table of cuts has at least; `score` names the column that is cut."""


def _no_cuts() -> pd.DataFrame:
    return pd.DataFrame(columns=["image_id", "concept_id", *LIMITS])


@dataclass(frozen=True)
class Cuts:
    """One row of limits a concept, and other limits for the images whose answers these were fitted on.

    A score is called present from `abstain_high` on and absent up to `abstain_low`; infinite limits call nothing.
    """

    table: pd.DataFrame
    """`CUT_COLUMNS` and whatever else is known of each cut."""
    held_out: pd.DataFrame = field(default_factory=_no_cuts)
    """image_id, concept_id and limits of images that an expert answered on: fitted without what was said there."""

    def completed(self, other: Cuts, vocabulary: Vocabulary) -> Cuts:
        """These, and those of `other` for the concepts that have none here; in the vocabulary's order."""
        missing = other.table[~other.table["concept_id"].isin(self.table["concept_id"])]
        table = pd.concat([part for part in (self.table, missing) if len(part)] or [missing], ignore_index=True)
        order = pd.Index(vocabulary.ids).get_indexer(table["concept_id"])
        held_out = [part for part in (self.held_out, other.held_out) if len(part)] or [self.held_out]
        ordered = table.iloc[np.argsort(order, kind="stable")].reset_index(drop=True)
        return Cuts(ordered, pd.concat(held_out, ignore_index=True))

    def of(self, concept_ids: Collection[str]) -> Cuts:
        """Those of some concepts."""
        here = (part[part["concept_id"].isin(list(concept_ids))] for part in (self.table, self.held_out))
        return Cuts(*(part.reset_index(drop=True) for part in here))

    def limits(self, image_ids: ImageIds, vocabulary: Vocabulary) -> tuple[Array, Array]:
        """(N, K) `abstain_low` and `abstain_high`; -inf and inf for concepts without a cut."""
        by_concept = self.table.set_index("concept_id").reindex(vocabulary.ids)
        row, column = places(self.held_out, image_ids, vocabulary)
        known = (row >= 0) & (column >= 0)
        found = []
        for name, nothing in (("abstain_low", -np.inf), ("abstain_high", np.inf)):
            limit = by_concept[name].fillna(nothing).to_numpy(np.float64)
            limit = np.repeat(limit[None], len(image_ids), 0)
            limit[row[known], column[known]] = self.held_out[name].to_numpy(np.float64)[known]
            found.append(limit)
        return found[0], found[1]


def score_columns(scores: pd.DataFrame, kinds: pd.Series, image_ids: ImageIds, vocabulary: Vocabulary) -> Array:
    """(N, K) the score that each concept is cut on, NaN where there is none.

    Args:
        scores: image_id, concept_id, similarity, probability.
        kinds: Concept id → name of its column.
        image_ids: The rows.
        vocabulary: The columns.
    """
    kind = kinds.reindex(vocabulary.ids).fillna(SIMILARITY).to_numpy()
    similarity, probability = (matrix(scores, name, image_ids, vocabulary) for name in (SIMILARITY, PROBABILITY))
    return np.where(kind == PROBABILITY, probability, similarity).astype(np.float64)


def threshold_votes(scores: pd.DataFrame, cuts: Cuts, image_ids: ImageIds, vocabulary: Vocabulary) -> Votes:
    """The paper's rule as votes: present above the cut, absent below, silent inside the abstain band."""
    kinds = cuts.table.set_index("concept_id")["score"]
    score = score_columns(scores, kinds, image_ids, vocabulary)
    low, high = cuts.limits(image_ids, vocabulary)
    # Without a band both limits are the threshold, and a score on it is absent.
    absent = score <= low
    present = (score >= high) & ~absent
    value = np.where(present, 1.0, np.where(absent, 0.0, 0.5))
    return Votes(value.astype(np.float32), (present | absent).astype(np.float32))


def otsu_cut(score: npt.NDArray[np.floating]) -> float:
    """Otsu's cut, moved midway between the two scores that it parts; the score itself when all are equal."""
    if np.ptp(score) == 0:
        return float(score[0])
    # Between far modes every cut is as good, and Otsu names the first: the edge of the lower mode.
    cut = threshold_otsu(score)
    above = score > cut
    return float((score[~above].max() + score[above].min()) / 2) if above.any() else float(cut)


def band(score: Array, threshold: float, fraction: float) -> tuple[float, float]:
    """(low, high) around the threshold that hold `fraction` of the scores, those nearest to it."""
    if fraction <= 0:
        return threshold, threshold
    reach = float(np.quantile(np.abs(score - threshold), fraction))
    return threshold - reach, threshold + reach


def least_called(probability: Array, wanted: float) -> Array:
    """(K,) the lowest probability of each column that may be called if the calls are to average `wanted`; inf for none.

    `probability` is (N, K), each column the chances that a call would be right.
    """
    if not len(probability):
        return np.full(probability.shape[1], np.inf)
    sorted_down = -np.sort(-probability, axis=0)
    expected = sorted_down.cumsum(0) / np.arange(1, len(sorted_down) + 1)[:, None]
    # `expected` falls from the surest image on: the last that keeps it high enough is the least sure one called.
    n_called = (expected >= wanted).sum(0)
    least = np.take_along_axis(sorted_down, np.maximum(n_called - 1, 0)[None], 0)[0]
    return np.where(n_called > 0, least, np.inf)
