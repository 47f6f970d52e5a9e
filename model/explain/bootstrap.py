"""95 % intervals of many statistics of the same images: all resamples are drawn once, as counts.

A resample is how often each image occurs in it, or each patient where patients are known, whose images are not
independent. A statistic of sums over images, such as an accuracy or an F1, is then one matrix product for all resamples
(Efron's percentile bootstrap, 1979). Two statistics on the same resamples are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from model.intervals import LEVEL, NOTHING, Interval, proportion

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

N_RESAMPLES = 1000
_MAX_COUNTS = 50_000_000
"""Of very many images fewer resamples are drawn; the interval is then known a little less exactly."""


class Resampling:
    """Resamples of N images."""

    def __init__(self, n_images: int, groups: Sequence[object] | None = None, seed: int = 0) -> None:
        """Draw them; `groups` has one entry an image, the patient, and None where all images are independent."""
        self.n_images, self.is_grouped = n_images, groups is not None
        self._member = np.arange(n_images) if groups is None else pd.factorize(np.asarray(groups, dtype=object))[0]
        self.n_units = int(self._member.max()) + 1 if n_images else 0
        rng = np.random.default_rng(seed)
        n_resamples = max(100, min(N_RESAMPLES, _MAX_COUNTS // max(self.n_units, 1)))
        self._counts = np.stack([self._draw(rng) for _ in range(n_resamples)]) if self.n_units > 1 else None

    def _draw(self, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        drawn = rng.integers(self.n_units, size=self.n_units)
        return np.bincount(drawn, minlength=self.n_units).astype(np.float32)

    def mean(self, values: Floats | Bools) -> Interval:
        """Mean of (N,) values; NaN for none, no ends for a single image or patient."""
        return self.ratio(values, np.ones(self.n_images))

    def fraction(self, which: Bools, among: Bools | None = None) -> Interval:
        """Share of the images `among` that are `which`: Wilson's interval, or over patients where they are known."""
        base = np.ones(self.n_images, bool) if among is None else among
        hits = which & base
        if not self.is_grouped:
            return proportion(int(hits.sum()), int(base.sum()))
        return self.ratio(hits, base)

    def ratio(self, over: Floats | Bools, under: Floats | Bools) -> Interval:
        """Σ over / Σ under, both (N,)."""
        sums = np.stack([np.asarray(over, np.float64), np.asarray(under, np.float64)], axis=1)
        return self.of_sums(sums, lambda totals: _divided(totals[:, 0], totals[:, 1]))

    def of_sums(self, values: Floats, statistic: Callable[[Floats], Floats]) -> Interval:
        """A statistic of the column sums of (N, D) values: `statistic` takes (R, D) sums and gives (R,) numbers."""
        if self.n_images == 0:
            return NOTHING
        per_unit = np.zeros((self.n_units, values.shape[1]))
        np.add.at(per_unit, self._member, values)
        whole = float(statistic(per_unit.sum(0, keepdims=True))[0])
        if self._counts is None:
            return Interval(whole, float("nan"), float("nan"))
        found = statistic(self._counts @ per_unit)
        found = found[np.isfinite(found)]
        if not len(found) or not np.isfinite(whole):
            return Interval(whole, float("nan"), float("nan"))
        low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(whole, float(low), float(high))

    def macro_f1(self, y: Ints, predicted: Ints, n_classes: int) -> Interval:
        """Mean F1 of the classes that occur."""
        cells = np.zeros((self.n_images, n_classes**2))
        cells[np.arange(self.n_images), y * n_classes + predicted] = 1

        def statistic(sums: Floats) -> Floats:
            return mean_f1(sums.reshape(-1, n_classes, n_classes))

        return self.of_sums(cells, statistic)


def mean_f1(confusions: Floats) -> Floats:
    """(R,) macro-F1 of (R, C, C) confusion matrices, true classes in rows; classes without images do not count."""
    hits = np.diagonal(confusions, axis1=1, axis2=2)
    support, said = confusions.sum(2), confusions.sum(1)
    f1 = np.where(support > 0, _divided(2 * hits, support + said), 0)
    return _divided(f1.sum(1), (support > 0).sum(1))


def _divided(over: Floats, under: Floats) -> Floats:
    return np.divide(over, under, out=np.full(np.shape(over), np.nan), where=np.asarray(under) != 0)
