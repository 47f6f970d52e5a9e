"""Cuts fitted so that calls are as right as is asked for, on a handful of expert answers and every score there is.

Per concept the chance of presence is a curve over its score. Where the curve comes from witnesses alone it is as they
have it; expert answers bend it (`pooled_correction`: each concept's own change drawn to what all have in common, and
that to none, so that few answers cannot overfit). The cut is then the lowest score from which on all images of the run,
not the few audited ones, are expected to be called as rightly as was asked. The answers of an image's fold have no
part in the cut that image is judged by, and every reported precision comes from such held-out calls.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import expit

from annotation.trust.agreement import proportion
from annotation.trust.correction import MAX_FACTOR, pooled_correction
from annotation.trust.cuts import CUT_COLUMNS, LIMITS, Cuts, least_called
from data_contracts.concepts import Vocabulary

Array = npt.NDArray[np.float64]
Limits = tuple[Array, Array, Array]
"""(K,) threshold, abstain_low and abstain_high."""

QUALITY = [
    *("method", "n", "n_audited", "precision", "precision_low", "npv", "npv_low", "coverage"),
    *("expected_precision", "expected_npv"),
]
OWN_CELLS = 10
"""Answers on a concept from which on its cuts are called its own; with fewer, other concepts' answers weigh more."""
AUDITED, POOLED = "audited", "audited (pooled)"
_LEAST_FACTOR = 0.05
_FIRMNESS = 4.0
"""A cut lies where few images are, and there a small bend moves many calls."""


class Asked(NamedTuple):
    """What calls must keep."""

    precision: float | None
    """Of calls of presence; None: only the limit counts."""
    npv: float | None
    """Share of calls of absence that are right."""
    low: float = 0.5
    """Chance of presence above which no absence is called."""
    high: float = 0.5
    """Chance of presence below which no presence is called."""


class Curve(NamedTuple):
    """Scores of a run's images and what witnesses make of them; all (N, K), NaN where there is none."""

    score: Array
    log_odds: Array
    """Of presence; never falls as the score grows."""


class CellScores(NamedTuple):
    """The audited cells; all (n,)."""

    image_id: npt.NDArray[np.object_]
    column: npt.NDArray[np.int64]
    true: Array
    weight: Array
    fold: npt.NDArray[np.int64]
    score: Array
    """Made without the expert's answer."""
    log_odds: Array

    def rows(self, which: npt.NDArray[np.bool_]) -> CellScores:
        """Some of them."""
        image_id, column, true, weight, fold, score, log_odds = self
        return CellScores(
            image_id[which], column[which], true[which], weight[which], fold[which], score[which], log_odds[which]
        )


def cell_scores(
    cells: pd.DataFrame, vocabulary: Vocabulary, score: npt.NDArray[np.floating], log_odds: npt.NDArray[np.floating]
) -> CellScores:
    """`expert_cells` with their (n,) scores; cells without a score are left out."""
    column = pd.Index(vocabulary.ids).get_indexer(cells["concept_id"])
    every = CellScores(
        cells["image_id"].to_numpy(object),
        np.asarray(column, np.int64),
        cells["true"].to_numpy(np.float64),
        cells["weight"].to_numpy(np.float64),
        cells["fold"].to_numpy(np.int64),
        np.asarray(score, np.float64),
        np.asarray(log_odds, np.float64),
    )
    return every.rows((column >= 0) & np.isfinite(every.score) & np.isfinite(every.log_odds))


def fitted_cuts(
    curve: Curve, cells: CellScores, vocabulary: Vocabulary, asked: Asked, *, score: pd.Series, method: pd.Series
) -> Cuts:
    """Cuts with `QUALITY`, one row a concept that has a score.

    Args:
        curve: Every image of the run that cuts may be fitted on.
        cells: What experts answered, for the same concepts.
        vocabulary: The columns.
        asked: What calls must keep.
        score: Concept id → the column of scores that is cut.
        method: Concept id → where the curve comes from, if no expert bent it.
    """
    n_concepts = len(vocabulary)
    chance = _bent(curve.log_odds, cells, n_concepts)
    held_out = [_without(curve, cells, fold, n_concepts, asked) for fold in np.unique(cells.fold)]
    if len(cells.true):
        n_audited = np.bincount(cells.column, minlength=n_concepts)
        method = pd.Series(np.where(n_audited >= OWN_CELLS, AUDITED, POOLED), vocabulary.ids)
    limits = _limits(curve.score, chance, asked)
    table = _table(curve.score, chance, limits, cells, held_out, vocabulary, score, method)
    return Cuts(table[table["n"] > 0].reset_index(drop=True), _other_limits(cells, held_out, vocabulary))


def held_cuts(
    curve: Curve, limits: Limits, cells: CellScores, vocabulary: Vocabulary, *, score: pd.Series, method: pd.Series
) -> Cuts:
    """Cuts that no expert answer was looked at for, so that every answer tells how good they are; else as above."""
    held_out = [limits for _ in np.unique(cells.fold)]
    return Cuts(_table(curve.score, expit(curve.log_odds), limits, cells, held_out, vocabulary, score, method))


def _table(
    values: Array,
    chance: Array,
    limits: Limits,
    cells: CellScores,
    held_out: list[Limits],
    vocabulary: Vocabulary,
    score: pd.Series,
    method: pd.Series,
) -> pd.DataFrame:
    frame = pd.DataFrame(dict(zip(LIMITS, limits, strict=True)), index=pd.Index(vocabulary.ids, dtype="str"))
    frame = frame.assign(score=score.reindex(frame.index), method=method.reindex(frame.index).astype("str"))
    frame = frame.assign(n_audited=np.bincount(cells.column, minlength=len(vocabulary)))
    frame = frame.join(_expected(values, chance, limits, vocabulary)).join(
        held_out_quality(cells, held_out, vocabulary)
    )
    frame = frame[frame["threshold"].notna()].rename_axis("concept_id").reset_index()
    return frame[[*CUT_COLUMNS, *QUALITY]]


def held_out_quality(cells: CellScores, limits_of_folds: list[Limits], vocabulary: Vocabulary) -> pd.DataFrame:
    """precision, precision_low, npv and npv_low by concept, each cell called by the limits of its own fold.

    `*_low` is the lower end of Wilson's 95 % interval on Kish's number of cells. NaN where nothing was called.
    """
    low, high = _limits_of_cells(cells, limits_of_folds)
    rows = []
    for k in range(len(vocabulary)):
        here = cells.column == k
        present = here & (cells.score >= high)
        absent = here & (cells.score <= low) & ~present
        right = _share(cells.true, cells.weight, present), _share(1 - cells.true, cells.weight, absent)
        rows.append((*right[0], *right[1]))
    columns = ["precision", "precision_low", "npv", "npv_low"]
    return pd.DataFrame(rows, columns=columns, index=list(vocabulary.ids), dtype="float64")


def _bent(log_odds: Array, cells: CellScores, n_concepts: int) -> Array:
    """(N, K) chance of presence after the correction that the cells ask for."""
    if not len(cells.true):
        return expit(log_odds)
    change = pooled_correction(
        cells.log_odds[:, None], cells.true, cells.column, n_concepts, cells.weight, firmness=_FIRMNESS
    )
    factor = np.clip(1 + change[:, 0], _LEAST_FACTOR, MAX_FACTOR)
    return np.asarray(expit(factor * log_odds + change[:, 1]), np.float64)


def _without(curve: Curve, cells: CellScores, fold: int, n_concepts: int, asked: Asked) -> Limits:
    """The limits as they are without one fold's answers."""
    return _limits(curve.score, _bent(curve.log_odds, cells.rows(cells.fold != fold), n_concepts), asked)


def _limits(score: Array, chance: Array, asked: Asked) -> Limits:
    """(K,) threshold, abstain_low and abstain_high, in units of the score."""
    known = np.isfinite(chance)
    present = _called(chance, known, asked.high, asked.precision)
    absent = _called(1 - chance, known, 1 - asked.low, asked.npv)
    likely = known & (chance >= 0.5)
    columns = range(score.shape[1])
    threshold = np.array([_edge(score[known[:, k], k], likely[known[:, k], k]) for k in columns])
    high = np.array([_edge(score[known[:, k], k], present[known[:, k], k]) for k in columns])
    low = np.array([-_edge(-score[known[:, k], k], absent[known[:, k], k]) for k in columns])
    return threshold, low, high


def _called(chance: Array, known: npt.NDArray[np.bool_], limit: float, wanted: float | None) -> npt.NDArray[np.bool_]:
    """(N, K) whose chance of being right is above the limit, and as a whole what is wanted, or itself so high."""
    if wanted is None:
        return known & (chance > limit)
    least = np.minimum(least_called(np.where(known, chance, 0.0), wanted), wanted)
    return known & (chance > limit) & (chance >= least)


def _edge(score: Array, called: npt.NDArray[np.bool_]) -> float:
    """Midway between the lowest score that is called and the highest that is not; inf where none is called."""
    if not called.any():
        return float("inf")
    first = score[called].min()
    below = score[~called & (score < first)]
    return float((first + below.max()) / 2) if len(below) else float(np.nextafter(first, -np.inf))


def _expected(score: Array, chance: Array, limits: Limits, vocabulary: Vocabulary) -> pd.DataFrame:
    """n, coverage and the shares of right calls that the curve itself promises."""
    _, low, high = limits
    known = np.isfinite(score)
    present = known & (score >= high)
    absent = known & (score <= low) & ~present
    n = known.sum(0)
    columns = {
        "n": n,
        "coverage": (present | absent).sum(0) / np.maximum(n, 1),
        "expected_precision": _mean_where(chance, present),
        "expected_npv": _mean_where(1 - chance, absent),
    }
    return pd.DataFrame(columns, index=list(vocabulary.ids))


def _mean_where(values: Array, which: npt.NDArray[np.bool_]) -> Array:
    n = which.sum(0)
    return np.where(n > 0, np.where(which, values, 0).sum(0) / np.maximum(n, 1), np.nan)


def _share(hits: Array, weight: Array, which: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """(weighted share, its lower limit); NaN for none."""
    chosen = weight[which]
    if not len(chosen):
        return float("nan"), float("nan")
    share = float(np.average(hits[which], weights=chosen))
    n = float(chosen.sum() ** 2 / (chosen**2).sum())
    return share, proportion(share * n, n).low


def _limits_of_cells(cells: CellScores, limits_of_folds: list[Limits]) -> tuple[Array, Array]:
    """(n,) abstain_low and abstain_high that each cell is judged by."""
    if not limits_of_folds:
        return np.zeros(0), np.zeros(0)
    place = np.searchsorted(np.unique(cells.fold), cells.fold)
    low, high = (np.stack([limits[i] for limits in limits_of_folds]) for i in (1, 2))
    return low[place, cells.column], high[place, cells.column]


def _other_limits(cells: CellScores, limits_of_folds: list[Limits], vocabulary: Vocabulary) -> pd.DataFrame:
    """Limits of every concept for the images that an expert answered on."""
    parts = [Cuts(pd.DataFrame()).held_out]
    for fold, limits in zip(np.unique(cells.fold), limits_of_folds, strict=True):
        image_ids = pd.unique(cells.image_id[cells.fold == fold])
        content = {
            "image_id": np.repeat(image_ids, len(vocabulary)),
            "concept_id": np.tile(np.asarray(vocabulary.ids, object), len(image_ids)),
        }
        content |= {name: np.tile(limit, len(image_ids)) for name, limit in zip(LIMITS, limits, strict=True)}
        parts.append(pd.DataFrame(content))
    return pd.concat(parts[1:] or parts, ignore_index=True)
