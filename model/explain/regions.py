"""Maps against regions that a person drew: does the hottest point lie inside, and how much of the heat does?

A region says where a thing is, not what a network should look at: agreement supports a map, disagreement asks why.
The fraction of the image that the region covers is what a map without any knowledge would score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_contracts.errors import InputRefused
from model.explain.alignment import on_grid

Map = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]
Key = tuple[str, str]
"""(image id, target)."""


class RegionScore(NamedTuple):
    """One map against one region."""

    hit: bool
    """Pointing game (Zhang et al., ECCV 2016): the hottest cell lies inside."""
    iou: float
    """Intersection over union of the region and as many hottest cells as it has."""
    inside: float
    """Fraction of the heat that lies inside (energy-based pointing game; Wang et al., CVPRW 2020); NaN without heat."""
    by_chance: float
    """Fraction of the image that the region covers: expected hit and inside of a map that knows nothing."""


def region_score(heat: Map, mask: Mask) -> RegionScore:
    """A map against a mask (H, W) of the same image; the map is brought to the mask's size.

    Raises `InputRefused` for an empty mask, or one that is no picture of true and false.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_ or not mask.any():
        raise InputRefused(
            f"region: expected a mask (H, W) of true and false with something inside, got {mask.dtype} of shape "
            f"{mask.shape} with {int(np.count_nonzero(mask))} cells set."
        )
    full = np.clip(on_grid(heat, (mask.shape[0], mask.shape[1])), 0, None)
    hottest = np.zeros(mask.size, bool)
    hottest[np.argsort(-full.ravel(), kind="stable")[: int(mask.sum())]] = True
    hot = hottest.reshape(mask.shape)
    total = float(full.sum())
    return RegionScore(
        bool(mask.ravel()[int(full.argmax())]),
        float((hot & mask).sum() / (hot | mask).sum()),
        float(full[mask].sum() / total) if total > 0 else float("nan"),
        float(mask.mean()),
    )


def region_table(maps: Mapping[Key, Map], masks: Mapping[Key, Mask]) -> pd.DataFrame:
    """One row for each map that has a mask: image_id, target, hit, iou, inside, by_chance."""
    rows = [(*key, *region_score(heat, masks[key])) for key, heat in maps.items() if key in masks]
    return pd.DataFrame(rows, columns=["image_id", "target", *RegionScore._fields])
