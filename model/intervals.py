"""How far a number could be off: bootstrap intervals, and correction for many tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import beta, binomtest

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]

N_RESAMPLES = 1000
LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate and its 95 % interval; all NaN where there is nothing to estimate from."""

    value: float
    low: float
    high: float


NOTHING = Interval(float("nan"), float("nan"), float("nan"))


def bootstrap(
    statistic: Callable[[Ints], float],
    n_items: int,
    *,
    groups: Sequence[object] | None = None,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The statistic of all items, with the percentile interval over resampled items (Efron, 1979).

    `statistic` is given positions of items, some of them repeatedly. With `groups` (one a position: the patient),
    whole groups are drawn: images of one patient are not independent. Resamples in which the statistic is undefined
    are left out; of a single item, or a single group, the interval is NaN.
    """
    if n_items == 0:
        return NOTHING
    value = statistic(np.arange(n_items))
    members = _members(n_items, groups)
    if len(members) < 2:
        return Interval(value, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(members), size=len(members)) for _ in range(n_resamples))
    if groups is None:
        found = [statistic(draw) for draw in draws]
    else:
        found = [statistic(np.concatenate([members[n] for n in draw])) for draw in draws]
    defined = np.asarray(found, np.float64)
    defined = defined[np.isfinite(defined)]
    if not len(defined):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def mean_interval(values: Floats, *, groups: Sequence[object] | None = None, seed: int = 0) -> Interval:
    """Mean of the entries that are not NaN, with its bootstrap interval."""
    known = np.flatnonzero(np.isfinite(values))
    kept = np.asarray(values, np.float64)[known]
    kept_groups = None if groups is None else [groups[int(n)] for n in known]
    return bootstrap(lambda rows: float(kept[rows].mean()), len(kept), groups=kept_groups, seed=seed)


def proportion(n_hits: int, n: int) -> Interval:
    """A fraction with Wilson's interval, which holds for few images and near 0 and 1 too."""
    if n == 0:
        return NOTHING
    found = binomtest(n_hits, n).proportion_ci(LEVEL, "wilson")
    return Interval(n_hits / n, float(found.low), float(found.high))


def highest_plausible_fraction(n_hits: int, n: int, error: float) -> float:
    """Clopper and Pearson's upper bound: a true fraction above it shows so few hits with probability `error`."""
    return 1.0 if n_hits >= n else float(beta.ppf(1 - error, n_hits + 1, n - n_hits))


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number by Holm's step-down method (1979); NaN is no test and stays NaN."""
    p = np.asarray(p_values, np.float64)
    tested = np.flatnonzero(np.isfinite(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    corrected = p.copy()
    steps = p[order] * (len(order) - np.arange(len(order)))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return [float(value) for value in corrected]


def _members(n_items: int, groups: Sequence[object] | None) -> list[Ints]:
    if groups is None:
        return [np.array([n]) for n in range(n_items)]
    found: dict[object, list[int]] = {}
    for position, group in enumerate(groups):
        found.setdefault(group, []).append(position)
    return [np.asarray(rows, np.int64) for rows in found.values()]
