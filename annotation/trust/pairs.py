"""Areas under ROC curves as shares of concordant pairs, within strata and comparable with an interval.

Everything is a sum over images (or patients), so the counts of shards add up: a table of a million images needs no
more memory than one shard. Pairs are formed within a shard only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from annotation.trust.agreement import Z_95

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pairs:
    """Concordant and possible pairs of two scores for K concepts, summed over images, with second moments.

    An image's row is z = (concordant, possible, null's concordant, null's possible) pairs that it takes part in.
    """

    n: Array
    """(K,) images answered."""
    total: Array
    """(K, 4) sum of z."""
    moment: Array
    """(K, 4, 4) sum over groups of z zᵀ, z summed within a group first: images of one patient are not independent."""

    def __add__(self, other: Pairs) -> Pairs:
        """The counts of two shards together."""
        return Pairs(self.n + other.n, self.total + other.total, self.moment + other.moment)

    @property
    def areas(self) -> Array:
        """(K, 2) AUROC of the score and of its null; NaN without both answers in any stratum."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.total[:, 0::2] / self.total[:, 1::2]

    def interval(self, sign: tuple[int, int]) -> Array:
        """(K, 3) value, low and high (95 %) of `sign` @ areas: (1, 0) the score's own area, (1, -1) the difference."""
        areas, possible = self.areas, self.total[:, 1::2]
        with np.errstate(invalid="ignore", divide="ignore"):
            weight = 2 * np.asarray(sign, np.float64) / possible  # every pair is counted at both of its images
        gradient = np.stack([weight, -weight * areas], 2).reshape(len(areas), 4)
        gradient = np.where(np.repeat(np.array(sign) == 0, 2), 0.0, gradient)
        value = np.where(np.array(sign) == 0, 0.0, areas * sign).sum(1)
        deviation = np.sqrt(np.maximum(np.einsum("ki,kij,kj->k", gradient, self.moment, gradient), 0))
        return np.stack([value, value - Z_95 * deviation, value + Z_95 * deviation], 1)


def count_pairs(
    score: npt.NDArray[np.floating],
    answers: npt.NDArray[np.floating],
    null_score: npt.NDArray[np.floating] | None = None,
    null_answers: npt.NDArray[np.floating] | None = None,
    *,
    strata: npt.NDArray[np.integer] | None = None,
    groups: npt.NDArray[np.integer] | None = None,
    pool_null: bool = False,
) -> Pairs:
    """The pairs of one shard.

    Args:
        score: (n, K) numbers that ought to grow with presence.
        answers: (n, K) 1, 0 or NaN.
        null_score: (M, n, K) members of a null, pooled; none if None.
        null_answers: (M, n, K) what the members ought to predict; `answers` if None.
        strata: (n,) only images of one stratum are compared, such as those scored by the same head.
        groups: (n,) what is not independent, such as the patient; each image by itself if None.
        pool_null: All concepts' nulls together are the null of each.
    """
    n, n_concepts = score.shape
    within = np.zeros(n, np.int64) if strata is None else strata
    places = [np.flatnonzero(within == stratum) for stratum in np.unique(within)]
    rows = np.zeros((n, n_concepts, 4))
    for k in range(n_concepts):
        rows[:, k, :2] = _rows(score[:, k], answers[:, k], places)
        for member in range(0 if null_score is None else len(null_score)):
            said = answers if null_answers is None else null_answers[member]
            rows[:, k, 2:] += _rows(null_score[member, :, k], said[:, k], places)  # type: ignore[index]
    if pool_null:
        rows[:, :, 2:] = rows[:, :, 2:].sum(1, keepdims=True)
    by_group = _summed(rows, groups)
    return Pairs(
        np.isfinite(answers).sum(0).astype(np.float64), rows.sum(0), np.einsum("gki,gkj->kij", by_group, by_group)
    )


def _rows(
    score: npt.NDArray[np.floating], answers: npt.NDArray[np.floating], places: list[npt.NDArray[np.intp]]
) -> Array:
    """(n, 2) concordant and possible pairs of each image; ties are half concordant."""
    result = np.zeros((len(score), 2))
    for place in places:
        known = place[np.isfinite(answers[place]) & np.isfinite(score[place])]
        present, absent = known[answers[known] > 0.5], known[answers[known] <= 0.5]
        below = _rank(score[present], score[absent])
        above = len(present) - _rank(score[absent], score[present])
        result[present] = np.stack([below, np.full(len(present), len(absent))], 1)
        result[absent] = np.stack([above, np.full(len(absent), len(present))], 1)
    return result


def _rank(values: npt.NDArray[np.floating], among: npt.NDArray[np.floating]) -> Array:
    """How many of `among` are below each value, ties by half."""
    ordered = np.sort(among)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / 2


def _summed(rows: Array, groups: npt.NDArray[np.integer] | None) -> Array:
    if groups is None:
        return rows
    names, index = np.unique(groups, return_inverse=True)
    result = np.zeros((len(names), *rows.shape[1:]))
    np.add.at(result, index, rows)
    return result
