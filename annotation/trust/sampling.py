"""Drawing cells with known probabilities: allocation to strata, unequal-probability draws, weights of several rounds.

The estimator. In round r every cell that was not asked before is drawn with a known probability q; the sum of any
quantity y over all cells of a concept is then estimated without bias by T_r = (y of every cell asked before) +
(y / q of the cells of this round). The rounds are combined as T = Σ λ_r T_r, λ_r being the share of round r in the
concept's questions. So a cell of round s has the weight λ_s / q + Σ_{r > s} λ_r, whatever statistic is computed.
(What a round asks may depend on earlier answers: given those, each T_r is unbiased; λ depends on them too, through
how much is asked of an undecided concept, which leaves a bias that vanishes as answers accumulate.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


def allocated(measure: Floats, available: Places, n_wanted: int, rng: np.random.Generator) -> Places:
    """How many of `n_wanted` each stratum gets: in proportion to `measure`, never more than it has.

    Strata of measure 0 get nothing. Sums to `n_wanted` where there is so much to give.
    """
    room = np.where(measure > 0, available, 0)
    n_given = min(n_wanted, int(room.sum()))
    share = capped(np.asarray(measure, np.float64), room.astype(np.float64), n_given)
    taken = np.floor(share + 1e-9).astype(np.int64)
    # What is left of the fractions is drawn, so that no small stratum is passed over for good.
    return taken + systematic(share - taken, rng, n_given - int(taken.sum()), len(share))


def capped(measure: Floats, limit: Floats, total: float) -> Floats:
    """Numbers in proportion to `measure`, none above its `limit`, that sum to `total` (at most the limits' sum)."""
    result = np.zeros(len(measure))
    is_full = np.zeros(len(measure), bool)
    for _ in range(len(measure) + 1):
        left, rest = total - limit[is_full].sum(), measure[~is_full].sum()
        scale = left / rest if rest > 0 else 0.0
        result = np.where(is_full, limit, measure * scale)
        over = ~is_full & (result > limit)
        if not over.any():
            break
        is_full |= over
    return result


def inclusion(size: Floats, n_taken: int) -> Floats:
    """Probability of each cell to be among `n_taken`, in proportion to its positive `size`, at most 1."""
    probability = capped(size, np.ones(len(size)), min(n_taken, len(size)))
    return np.where(probability > 1 - 1e-9, 1.0, probability)


def systematic(probability: Floats, rng: np.random.Generator, n_taken: int, length: int) -> Places:
    """(length,) 1 for the drawn, 0 else: a systematic draw along the given order, of fixed size `n_taken`."""
    hit = np.zeros(length, np.int64)
    if n_taken > 0:
        ends = np.cumsum(probability)
        points = (rng.uniform() + np.arange(n_taken)) * (ends[-1] / n_taken)
        # Rounding may put the last point on the very end.
        hit[np.minimum(np.searchsorted(ends, points, side="right"), np.flatnonzero(probability > 0)[-1])] = 1
    return hit


def weights(cells: pd.DataFrame) -> Floats:
    """How many cells of the population each drawn cell stands for; see the module for the estimator.

    Args:
        cells: All drawn cells with `concept_id`, `round` and `inclusion_probability` (given that the cell was not asked
            in an earlier round). Leave out none: a cell without an answer is a matter of `answered_weights`.
    """
    concept = pd.factorize(cells["concept_id"])[0]
    number = pd.factorize(cells["round"], sort=True)[0]
    asked = np.zeros((concept.max(initial=-1) + 1, number.max(initial=-1) + 1))
    np.add.at(asked, (concept, number), 1)
    share = asked / asked.sum(1, keepdims=True)
    later = share[:, ::-1].cumsum(1)[:, ::-1] - share
    probability = cells["inclusion_probability"].to_numpy(np.float64)
    return np.asarray(share[concept, number] / probability + later[concept, number], np.float64)


def answered_weights(cells: pd.DataFrame, is_answered: npt.NDArray[np.bool_]) -> Floats:
    """`weights` of the answered cells, which also stand for the unanswered ones of their stratum; 0 for those.

    A stratum of which nothing was answered is stood for by its concept's others. Right where cells are left empty
    for reasons that have nothing to do with the answer.
    """
    weight = weights(cells)
    frame = cells.assign(weight=weight, answered=np.where(is_answered, weight, 0.0))
    for keys in (["concept_id", "round", "stratum"], ["concept_id"]):
        sums = frame.groupby(keys)[["weight", "answered"]].transform("sum")
        scale = np.where(sums["answered"] > 0, sums["weight"] / sums["answered"].where(sums["answered"] > 0, 1.0), 1.0)
        frame["answered"] = frame["answered"] * scale
    return frame["answered"].to_numpy(np.float64)
