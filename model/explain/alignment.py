"""Do two maps of one image show the same place? As a number, beside what maps that should not agree would give.

Maps may have different grids: the coarser is interpolated to the finer one. Agreement is Spearman's rank correlation
over cells, which knows no threshold and no scale; overlap is the intersection over union of the hottest cells. Both
are high for any two maps that favour the middle of the image, so neither means anything without its control.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata
from torch.nn import functional as F

Grid = npt.NDArray[np.floating]
"""(h, w) of one map."""
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

HOTTEST_FRACTION = 0.2
"""Share of the cells that overlap is counted on."""


class Agreement(NamedTuple):
    """(N,) arrays of N pairs of maps; NaN where a map is constant, or no control pair exists."""

    alignment: Floats
    """Rank correlation of each pair."""
    control: Floats
    """Mean rank correlation of the pair's first map with the second maps of its control pairs."""
    overlap: Floats
    overlap_control: Floats


def agreement(first: Sequence[Grid], second: Sequence[Grid], own: Ints, controls: Bools) -> Agreement:
    """Agreement of each first[n] with its own partner second[own[n]], beside that with its controls.

    Args:
        first: N maps.
        second: M maps.
        own: (N,) which of the second maps belongs to each first one.
        controls: (N, M) which of the second maps should not agree with it.
    """
    if not len(first) or not len(second):
        return Agreement(*(np.full(len(first), np.nan) for _ in Agreement._fields))
    shape = _finest([*first, *second])
    a, b = (np.stack([on_grid(heat, shape).ravel() for heat in maps]) for maps in (first, second))
    correlations, overlaps = _rank_correlations(a, b), _overlaps(a, b)
    rows = np.arange(len(first))
    return Agreement(
        correlations[rows, own],
        _mean_where(correlations, controls),
        overlaps[rows, own],
        _mean_where(overlaps, controls),
    )


def rank_correlation(first: Grid, second: Grid) -> float:
    """Spearman's correlation over the cells of two maps; NaN where one is constant or not finite."""
    shape = _finest([first, second])
    a, b = (on_grid(heat, shape).reshape(1, -1) for heat in (first, second))
    return float(_rank_correlations(a, b)[0, 0])


def overlap(first: Grid, second: Grid) -> float:
    """Intersection over union of the hottest fifth of the cells of two maps; NaN where one is constant."""
    shape = _finest([first, second])
    a, b = (on_grid(heat, shape).reshape(1, -1) for heat in (first, second))
    return float(_overlaps(a, b)[0, 0])


def on_grid(heat: Grid, shape: tuple[int, int]) -> Floats:
    """The map on another grid, bilinear."""
    if heat.shape == shape:
        return np.asarray(heat, np.float64)
    cells = torch.from_numpy(np.ascontiguousarray(heat, dtype=np.float64))[None, None]
    finer: Floats = F.interpolate(cells, size=shape, mode="bilinear", align_corners=False)[0, 0].numpy()
    return finer


def _finest(maps: Sequence[Grid]) -> tuple[int, int]:
    return max(heat.shape[0] for heat in maps), max(heat.shape[1] for heat in maps)


def _rank_correlations(a: Floats, b: Floats) -> Floats:
    """(N, M) correlations of the rows' ranks."""
    first, second = (_standardised(rankdata(rows, axis=1, nan_policy="propagate")) for rows in (a, b))
    return first @ second.T


def _standardised(ranks: Floats) -> Floats:
    centred = ranks - ranks.mean(1, keepdims=True)
    length = np.sqrt((centred**2).sum(1, keepdims=True))
    return np.divide(centred, length, out=np.full_like(centred, np.nan), where=length > 0)


def _overlaps(a: Floats, b: Floats) -> Floats:
    first, second = _hottest(a), _hottest(b)
    both = first @ second.T
    union = first.sum(1)[:, None] + second.sum(1)[None, :] - both
    return np.divide(both, union, out=np.full_like(both, np.nan), where=union > 0)


def _hottest(rows: Floats) -> Floats:
    """1 at the hottest cells of each row; NaN throughout for a constant row, which has none."""
    n_hot = max(1, round(HOTTEST_FRACTION * rows.shape[1]))
    hot = np.zeros_like(rows)
    np.put_along_axis(hot, np.argsort(-rows, axis=1, kind="stable")[:, :n_hot], 1.0, axis=1)
    spread = np.ptp(rows, axis=1)
    hot[~(spread > 0)] = np.nan
    return hot


def _mean_where(values: Floats, where: Bools) -> Floats:
    usable = where & np.isfinite(values)
    n = usable.sum(1)
    return np.divide(np.where(usable, values, 0).sum(1), n, out=np.full(len(values), np.nan), where=n > 0)
