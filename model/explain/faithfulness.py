"""Does the network need what its map shows? Deletion and insertion scores against a random order.

Petsiuk et al. (RISE, BMVC 2018): cells of the image are taken away, the map's hottest first, and the target's
probability is followed: a faithful map makes it fall fast, so the area under the curve, the *deletion* score, is
small. *Insertion* puts them into a blurred image in the same order: large is good. Cells are those of the map's grid;
taken away means blurred, since a grey patch is itself a sight that the network has never seen. The random order is
the control: without it, neither number says anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

Grid = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]

N_STEPS = 6
"""Steps from the whole image to none of it."""
_BLUR_CELLS = 4
"""The blurred image keeps so many cells a side."""

Probabilities = Callable[[Tensor], npt.NDArray[np.float32]]
"""(B, 3, S, S) preprocessed images → (B, T) probability of each target."""


class Scores(NamedTuple):
    """(T,) areas under the curves, one of each target."""

    deletion: npt.NDArray[np.float64]
    insertion: npt.NDArray[np.float64]
    deletion_random: npt.NDArray[np.float64]
    insertion_random: npt.NDArray[np.float64]


def deletion_insertion(
    image: Tensor, maps: Sequence[Grid], probabilities: Probabilities, *, n_random: int = 1, seed: int = 0
) -> Scores:
    """Scores of T maps (h, w) of one image (3, S, S), each by the probability of its own target.

    `probabilities` gives the T targets in the order of the maps. One pass for each step, order and direction:
    2 + 2 · (T + n_random) · (N_STEPS − 1) images; random orders serve all targets.
    """
    if not maps:
        return Scores(*(np.zeros(0) for _ in Scores._fields))
    shape = maps[0].shape
    rng = np.random.default_rng(seed)
    orders = [np.argsort(-heat.ravel(), kind="stable") for heat in maps]
    orders += [rng.permutation(maps[0].size) for _ in range(n_random)]
    deleted, inserted = _curves(image, orders, shape, probabilities)  # (orders, steps + 1, T)
    n = len(maps)
    own = np.arange(n)
    return Scores(
        _area(deleted[own, :, own]),
        _area(inserted[own, :, own]),
        _area(deleted[n:].mean(0).T),
        _area(inserted[n:].mean(0).T),
    )


def blurred(image: Tensor) -> Tensor:
    """(3, S, S) with nothing left but where it is bright: averaged over a few cells a side, interpolated."""
    coarse = F.adaptive_avg_pool2d(image.unsqueeze(0), _BLUR_CELLS)
    return F.interpolate(coarse, size=image.shape[-2:], mode="bilinear", align_corners=False)[0]


def _curves(
    image: Tensor, orders: Sequence[Ints], shape: tuple[int, ...], probabilities: Probabilities
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(orders, N_STEPS + 1, T) probabilities while cells are taken away, and while they are put in."""
    without = blurred(image)
    inner = torch.cat([_hidden(order, shape, image.shape[-1]) for order in orders]).to(image).unsqueeze(1)
    ends = np.asarray(probabilities(torch.stack([image, without])), np.float64)  # (2, T)
    deleted, inserted = (
        np.asarray(probabilities(torch.where(mask > 0, without, image)), np.float64).reshape(
            len(orders), N_STEPS - 1, -1
        )
        for mask in (inner, 1 - inner)
    )
    whole, none = (np.broadcast_to(end, (len(orders), 1, ends.shape[1])) for end in ends)
    return np.concatenate([whole, deleted, none], axis=1), np.concatenate([none, inserted, whole], axis=1)


def _hidden(order: Ints, shape: tuple[int, ...], side_px: int) -> Tensor:
    """(N_STEPS − 1, S, S): 1 where the first cells of the order are, more of them at each step."""
    rank = np.empty(order.size, np.int64)
    rank[order] = np.arange(order.size)
    cuts = np.linspace(0, order.size, N_STEPS + 1)[1:-1]
    cells = np.stack([(rank < round(cut)).reshape(shape) for cut in cuts]).astype(np.float32)
    return F.interpolate(torch.from_numpy(cells)[None], size=(side_px, side_px), mode="nearest")[0]


def _area(curves: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Area under (T, steps + 1) curves over [0, 1]."""
    return np.trapezoid(curves, dx=1 / N_STEPS, axis=1)
