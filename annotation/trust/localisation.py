"""Do heatmaps point where people say the concept is? Pointing game, IoU and energy against marked regions.

Each number stands beside that of a null map of the same image (see `alignment.null_maps`) and beside chance. Images
outside the test split decide; the test split is measured, and decides nothing. The threshold at which a map becomes a
region is a quantile of its cells, chosen per concept on images outside the test split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from annotation.trust.agreement import UNDEFINED, Interval, proportion
from annotation.trust.honesty import Verdict
from data_contracts.tables import Split

Mask = npt.NDArray[np.bool_]
"""(H, W) in the pixels of the image: True where the concept is to be seen."""

QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Shares of a map's cells that are left dark; the one with the largest IoU is taken."""
STATED_QUANTILE = 0.9
"""Where no image outside the test split has a region to choose by."""


class Part(StrEnum):
    """Which images a row of the table is about."""

    DECIDES = "outside test"
    TEST = "test"


class LocalisationOptions(BaseModel):
    """When a map points better than its null."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    margin: float = Field(0.02, ge=0, le=0.5)
    """Rate of hits by which a map must beat its null; the difference's 95 % interval must be above 0 as well."""
    max_reach: float = Field(0.15, gt=0, le=0.5)
    """A difference known no better than ± this fails no concept: there are too few regions to tell."""


def map_scores(heatmap: npt.NDArray[np.floating], null_map: npt.NDArray[np.floating], mask: Mask) -> dict[str, float]:
    """hit, inside and iou_Q of a map (h, w) and, with `null_` before, of its null; chance and area of the region.

    `chance` is what a random cell would hit, by the same rule; `area` the share of the image that the region covers.
    """
    scores = {
        "chance": float((cell_coverage(mask, heatmap.shape) > 0).mean()) if mask.any() else float("nan"),
        "area": float(mask.mean()),
    }
    for prefix, values in (("", heatmap), ("null_", null_map)):
        scores[f"{prefix}hit"] = pointing_hit(values, mask)
        scores[f"{prefix}inside"] = heat_inside(values, mask)
        for quantile in QUANTILES:
            scores[f"{prefix}iou_{quantile}"] = map_iou(values, mask, float(np.quantile(values, quantile)))
    return scores


def localisation_table(
    scores: pd.DataFrame,
    concept_ids: Sequence[str],
    images: pd.DataFrame,
    groups: Mapping[str, str],
    options: LocalisationOptions | None = None,
) -> pd.DataFrame:
    """One row per concept and part of the images (`Part`) in which it has regions.

    Columns: concept_id, images, n (images with a region), n_groups (what is independent among them), pointing_game
    with its interval (Wilson, by groups), chance, difference from the null map's with its interval (Newcombe's, from
    both Wilson intervals), inside, area, iou, iou_quantile, the same of the null map with `null_` before, decides,
    verdict.

    Args:
        scores: image_id, concept_id and `map_scores`, one row per image and concept with a region.
        concept_ids: The order of the rows.
        images: IMAGES: which image is in the test split.
        groups: Image id → patient.
        options: Limits.
    """
    test = set(images.loc[images["split"] == Split.TEST, "image_id"])
    parts = scores["image_id"].isin(test).map({True: str(Part.TEST), False: str(Part.DECIDES)})
    known = scores.assign(images=parts, group=scores["image_id"].map(groups))
    rows = []
    for concept_id in concept_ids:
        of_concept = known[known["concept_id"] == concept_id]
        quantile = _best_quantile(of_concept[of_concept["images"] == Part.DECIDES])
        for part in Part:
            chosen = of_concept[of_concept["images"] == part]
            if len(chosen):
                rows.append({"concept_id": concept_id, "images": str(part)} | _row(chosen, quantile, part, options))
    columns = list(rows[0]) if rows else ["concept_id", "images", "decides", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def misplaced(table: pd.DataFrame, names: Mapping[str, str] | None = None) -> dict[str, str]:
    """Concept id → why its map may not speak for it, in words, for the concepts that fail."""
    return {str(row["concept_id"]): _sentence(row, names or {}) for row in _deciding(table, Verdict.FAILS)}


def unplaced(table: pd.DataFrame, names: Mapping[str, str] | None = None) -> dict[str, str]:
    """Concept id → that its regions are too few to tell, in words."""
    return {str(row["concept_id"]): _sentence(row, names or {}) for row in _deciding(table, Verdict.TOO_FEW)}


def _deciding(table: pd.DataFrame, verdict: Verdict) -> Iterable[dict[str, object]]:
    rows = table[table["decides"].astype(bool) & (table["verdict"] == verdict)]
    return [{str(name): value for name, value in row.items()} for row in rows.to_dict("records")]


def _best_quantile(scores: pd.DataFrame) -> float:
    if scores.empty:
        return STATED_QUANTILE
    return max(QUANTILES, key=lambda quantile: float(scores[f"iou_{quantile}"].mean()))


def _row(
    scores: pd.DataFrame, quantile: float, part: Part, options: LocalisationOptions | None
) -> dict[str, float | bool | str]:
    # Images of one patient are not independent: they count once, with their mean.
    numbers = [name for name in scores if name not in ("image_id", "concept_id", "images", "group")]
    by_group = scores.groupby("group")[numbers].mean()
    n = len(by_group)
    own = proportion(float(by_group["hit"].sum()), n)
    null = proportion(float(by_group["null_hit"].sum()), n)
    difference = _difference(own, null)
    mean = by_group.mean()
    return {
        "n": len(scores),
        "n_groups": n,
        "pointing_game": own.value,
        "pointing_game_low": own.low,
        "pointing_game_high": own.high,
        "chance": float(mean["chance"]),
        "null_pointing_game": null.value,
        "difference": difference.value,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "inside": float(mean["inside"]),
        "null_inside": float(mean["null_inside"]),
        "area": float(mean["area"]),
        "iou": float(mean[f"iou_{quantile}"]),
        "null_iou": float(mean[f"null_iou_{quantile}"]),
        "iou_quantile": quantile,
        "decides": part == Part.DECIDES,
        "verdict": str(_verdict(own, difference, float(mean["chance"]), options or LocalisationOptions())),
    }


def _difference(own: Interval, null: Interval) -> Interval:
    """Difference of two rates (Newcombe, 1998, method 10): wide enough for pairs that agree more than chance."""
    if np.isnan(own.value) or np.isnan(null.value):
        return UNDEFINED
    value = own.value - null.value
    low = value - float(np.hypot(own.value - own.low, null.high - null.value))
    return Interval(value, low, value + float(np.hypot(own.high - own.value, null.value - null.low)))


def _verdict(own: Interval, difference: Interval, chance: float, options: LocalisationOptions) -> Verdict:
    if own.low > chance and difference.low > 0 and difference.value >= options.margin:
        return Verdict.PASSES
    known = (difference.high - difference.low) / 2 <= options.max_reach
    return Verdict.FAILS if known or own.high < chance else Verdict.TOO_FEW


def _sentence(row: Mapping[str, object], names: Mapping[str, str]) -> str:
    concept_id = str(row["concept_id"])
    seen = (
        f"concept {names.get(concept_id, concept_id)!r}: expected its map to point into the marked regions more often "
        f"than chance and a null map do, got {row['pointing_game']:.2f} (95 % {row['pointing_game_low']:.2f} to "
        f"{row['pointing_game_high']:.2f}, {row['n']} images) where a random cell hits {row['chance']:.2f} and the "
        f"null map {row['null_pointing_game']:.2f}"
    )
    if row["verdict"] == Verdict.TOO_FEW:
        return f"{seen}; these are too few regions to tell."
    return f"{seen}; alignment may not label it."


def box_mask(box: tuple[int, int, int, int], shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """(H, W) mask of a box (left, top, right, bottom) in pixels, right and bottom not included."""
    mask = np.zeros(shape, bool)
    left, top, right, bottom = box
    mask[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
    return mask


def pointing_hit(heatmap: npt.NDArray[np.floating], mask: npt.NDArray[np.bool_]) -> float:
    """Pointing game: 1 where the hottest cell (h, w) covers the (H, W) mask, 0 where it does not; NaN for no lesion.

    A cell covers what its rectangle in the image touches. Among equally hot cells the share that hits counts, so that
    a flat map is no hit by luck.
    """
    if not mask.any():
        return float("nan")
    return float((cell_coverage(mask, heatmap.shape) > 0)[heatmap == heatmap.max()].mean())


def map_iou(heatmap: npt.NDArray[np.floating], mask: npt.NDArray[np.bool_], threshold: float | None = None) -> float:
    """Intersection over union of the cells above `threshold` and the (H, W) mask, in area; NaN for no lesion.

    Without a threshold the hottest cells of as much area as the mask has are taken: the same for every map, so that
    maps on different scales, such as a concept's and its nulls', can be compared.
    """
    if not mask.any():
        return float("nan")
    covered = cell_coverage(mask, heatmap.shape).ravel()
    values = heatmap.ravel()
    if threshold is not None:
        lit = (values > threshold).astype(np.float64)
    else:
        n_lit = max(round(float(covered.sum())), 1)
        cut = np.sort(values)[-n_lit]
        lit = (values > cut).astype(np.float64)
        ties = values == cut
        lit[ties] = (n_lit - lit.sum()) / ties.sum()  # a flat map lights every cell a little
    intersection = float((lit * covered).sum())
    return intersection / float(lit.sum() + covered.sum() - intersection)


def heat_inside(heatmap: npt.NDArray[np.floating], mask: npt.NDArray[np.bool_]) -> float:
    """Share of the map's heat, above its coldest cell, that lies in the (H, W) mask; NaN for no lesion.

    The energy-based pointing game of Wang et al. (2020). Of a flat map it is the share of the area.
    """
    if not mask.any():
        return float("nan")
    covered = cell_coverage(mask, heatmap.shape)
    heat = heatmap - heatmap.min()
    total = float(heat.sum())
    return float((heat * covered).sum() / total) if total > 0 else float(covered.mean())


def cell_coverage(mask: npt.NDArray[np.bool_], grid: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """(h, w) share of each cell's rectangle that the (H, W) mask covers, exact for any sizes."""
    height, width = grid
    return _shares(height, mask.shape[0]) @ mask.astype(np.float64) @ _shares(width, mask.shape[1]).T


def _shares(n_cells: int, n_px: int) -> npt.NDArray[np.float64]:
    """(n_cells, n_px) share of each cell that each pixel is."""
    edges = np.arange(n_cells + 1) * (n_px / n_cells)
    starts = np.arange(n_px)
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    return np.clip(overlap, 0, None) * (n_cells / n_px)
