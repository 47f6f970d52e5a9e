"""Is one system better than another? Paired over images and seeds, and corrected for the number of questions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from model.intervals import LEVEL, Interval

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Difference(NamedTuple):
    """Mean difference of two systems over seeds, with its interval and the p value of no difference."""

    value: float
    low: float
    high: float
    p: float


def over_seeds(values: Floats, seeds: Ints) -> Floats:
    """(R,) means of (S, R) values over the seeds that each resample drew, (R, S): seeds are resampled as images are."""
    return values[seeds, np.arange(values.shape[1])[:, None]].mean(1)


def drawn_seeds(n_seeds: int, n_resamples: int, seed: int = 0) -> Ints:
    """(R, S) numbers of the seeds in each resample, drawn with replacement."""
    return np.random.default_rng([seed, 1]).integers(0, n_seeds, (n_resamples, n_seeds))


def interval(value: float, resampled: Floats) -> Interval:
    """The value with the percentile interval of its resamples; NaN where it is undefined in all of them."""
    defined = resampled[np.isfinite(resampled)]
    if not (np.isfinite(value) and len(defined) > 1):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def difference(value: float, resampled: Floats) -> Difference:
    """The difference with its interval, and p: twice the share of resamples on the other side of 0, ties half.

    One is added to the counts (Davison and Hinkley, 1997), so that no p is below 2 / (R + 1). Systems that never differ
    have p = 1.
    """
    shown = interval(value, resampled)
    defined = resampled[np.isfinite(resampled)]
    if not len(defined) or not np.isfinite(value):
        return Difference(value, shown.low, shown.high, float("nan"))
    n_equal = int((defined == 0).sum())
    sides = [int((defined < 0).sum()) + n_equal / 2, int((defined > 0).sum()) + n_equal / 2]
    return Difference(value, shown.low, shown.high, min(1.0, 2 * (min(sides) + 1) / (len(defined) + 1)))


def mcnemar(right: npt.NDArray[np.bool_], reference_right: npt.NDArray[np.bool_]) -> float:
    """Exact two-sided p of McNemar's test, from which images each of two networks has right."""
    gained, lost = int((right & ~reference_right).sum()), int((~right & reference_right).sum())
    return 1.0 if gained + lost == 0 else float(binomtest(gained, gained + lost, 0.5).pvalue)
