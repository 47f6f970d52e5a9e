"""Named numbers of one image: size, shape, colour, texture, parts and distribution.

Lengths are relative, so numbers of images of different sizes compare. Colour differences are CIE Lab units
against the ground beside the object, so that a colour cast or uneven light largely cancels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from annotation.vlm.fields import Fields, fields_of
from annotation.vlm.segment import SMOOTHING_PX, Mask, Plane, Scene, depth_of, scene_of
from data_contracts.ports import Pixels

Measurements = dict[str, float]
"""Quantity name → number; a quantity that this image does not have is left out."""

_LEAST_PIXELS = 30
_LEAST_PALE_SHARE = 0.04
_GRAIN_PX = 1.6
_EDGE_REACH_PX = 12


def measure(pixels: Pixels) -> Measurements:
    """All quantities that can be measured in an image."""
    scene = scene_of(pixels)
    found = _whole_image(scene)
    fields = fields_of(scene.lab[..., 0]) if scene.is_grey else None
    if fields is not None:
        return found | _field_numbers(fields)
    if scene.whole.sum() < _LEAST_PIXELS:
        return found
    found |= _shape_numbers(scene) | _tone_numbers(scene) | _part_numbers(scene)
    return found if scene.is_grey else found | _colour_numbers(scene)


def _whole_image(scene: Scene) -> Measurements:
    lightness = scene.lab[..., 0]
    mirrored = lightness[:, ::-1]
    return {
        "image_lightness": float(lightness.mean()),
        "image_contrast": float(lightness.std()),
        "image_mirror_difference": float(np.abs(ndimage.gaussian_filter(lightness - mirrored, 3)).mean()),
        "image_grain": float(np.abs(lightness - ndimage.gaussian_filter(lightness, _GRAIN_PX)).mean()),
    }


def _shape_numbers(scene: Scene) -> Measurements:
    whole = scene.whole
    return {
        "area_percent": 100 * float(whole.mean()),
        "length_over_width": _length_over_width(whole),
        "outline_gap_percent": 100 * _hull_gap(whole),
        "outline_wobble_percent": 100 * _wobble(whole),
        "fold_difference_percent": 100 * _fold_difference(whole),
    }


def _tone_numbers(scene: Scene) -> Measurements:
    lightness, whole = scene.lab[..., 0], scene.whole
    below = scene.ground[..., 0] - lightness
    deep = depth_of(whole)
    inner = whole & (deep > 0.55 * deep.max())
    outer = whole & (deep < 0.45 * deep.max()) & (deep > 0.12 * deep.max())
    return {
        "darkness": float(below[whole].mean()),
        "middle_darkness": float(np.median(below[inner]) - np.median(below[outer])) if outer.any() else 0.0,
        "grain": _grain(lightness, whole),
        "dark_dots_percent": 100 * _dots(-lightness, whole),
        "pale_dots_percent": 100 * _dots(lightness, whole),
        "edge_softness": _edge_softness(scene),
    }


def _part_numbers(scene: Scene) -> Measurements:
    lightness, whole, dark, pale = scene.lab[..., 0], scene.whole, scene.dark, scene.pale
    below = scene.ground[..., 0] - lightness
    has_pale = pale.sum() > _LEAST_PALE_SHARE * whole.sum()
    return {
        "dark_share_percent": 100 * float(dark.sum() / whole.sum()),
        "dark_gap_percent": 100 * _hull_gap(dark),
        "dark_pieces": float(_n_pieces(dark)),
        "dark_length_over_width": _length_over_width(dark),
        "dark_darkness": float(below[dark].mean()),
        "dark_grain": _grain(lightness, dark),
        "pale_grain": _grain(lightness, pale) if has_pale else 0.0,
        "pale_darkness": float(below[pale].mean()) if has_pale else 0.0,
        "spots": float(ndimage.label(scene.spots)[1]),
    }


def _colour_numbers(scene: Scene) -> Measurements:
    shift = ndimage.gaussian_filter(scene.lab - scene.ground, (1, 1, 0))
    whole, pale = scene.whole, scene.pale
    has_pale = pale.sum() > _LEAST_PALE_SHARE * whole.sum()
    redder, bluer = shift[..., 1], -shift[..., 2]
    return {
        "redness": float(redder[whole].mean()),
        "blueness": float(bluer[whole].mean()),
        "pale_redness": float(redder[pale].mean()) if has_pale else 0.0,
        "pale_blueness": float(bluer[pale].mean()) if has_pale else 0.0,
        "blue_share_percent": 100 * float(((bluer > 8) & (bluer > redder))[whole].mean()),
        "red_share_percent": 100 * float(((redder > 12) & (redder > bluer))[whole].mean()),
        "colour_variety": float(np.hypot(redder[whole].std(), bluer[whole].std())),
    }


def _field_numbers(fields: Fields) -> Measurements:
    inside, haze = fields.inside, fields.haze
    deep = depth_of(inside)
    depth = deep / max(float(np.percentile(deep[inside], 98)), 1.0)
    x = np.arange(inside.shape[1])[None, :]
    left, right = _share(haze, inside & (x < fields.middle)), _share(haze, inside & (x >= fields.middle))
    low, high = _halves(inside)
    labels, n = ndimage.label(haze)
    sizes = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    return {
        "field_area_percent": 100 * float(fields.region.mean()),
        "field_haze_percent": 100 * _share(haze, inside),
        "field_white_percent": 100 * _share(fields.scaled > 0.75, inside),
        "field_clear_tone": 100 * fields.clear,
        "field_outer_haze": 100 * (_share(haze, inside & (depth < 0.35)) - _share(haze, inside & (depth > 0.5))),
        "field_low_haze": 100 * (_share(haze, low) - _share(haze, high)),
        "field_side_difference": 100 * abs(left - right),
        "field_both_sides_percent": 100 * min(left, right),
        "field_largest_patch_percent": 100 * float(sizes.max(initial=0) / inside.sum()),
        "field_small_spots": float(((sizes >= 4) & (sizes < 0.01 * inside.sum())).sum()),
        "field_grain": 100 * _grain(fields.scaled, inside),
        "field_mirror_difference": 100 * _mirror_gap(fields.region, fields.middle),
    }


def _share(mask: Mask, region: Mask) -> float:
    return float(mask[region].mean()) if region.any() else 0.0


def _halves(region: Mask) -> tuple[Mask, Mask]:
    """The lower and the upper half of a region by area."""
    rows = np.cumsum(region.sum(axis=1))
    cut = int(np.searchsorted(rows, rows[-1] / 2))
    y = np.arange(region.shape[0])[:, None]
    return region & (y >= cut), region & (y < cut)


def _mirror_gap(region: Mask, middle: float) -> float:
    """Share by which the smaller side of a region falls short of the larger."""
    x = np.arange(region.shape[1])[None, :]
    left, right = float((region & (x < middle)).sum()), float((region & (x >= middle)).sum())
    return 1 - min(left, right) / max(left, right, 1.0)


def _grain(values: Plane, region: Mask) -> float:
    """Standard deviation of fine detail inside a region, away from its edge."""
    inside = ndimage.binary_erosion(region, iterations=2)
    if inside.sum() < _LEAST_PIXELS:
        return 0.0
    detail = values - _blur_within(values, region, _GRAIN_PX * 1.5)
    return float(detail[inside].std())


def _dots(values: Plane, region: Mask) -> float:
    """Share of a region that is clearly higher than what is around it there."""
    inside = ndimage.binary_erosion(region, iterations=3)
    if inside.sum() < _LEAST_PIXELS:
        return 0.0
    fine = ndimage.gaussian_filter(values, 0.7) - _blur_within(values, region, 5.0)
    return float((fine[inside] > 5.0).mean())


def _blur_within(values: Plane, region: Mask, sigma_px: float) -> Plane:
    """Gaussian blur that sees only the region."""
    weight = ndimage.gaussian_filter(region.astype(np.float32), sigma_px) + 1e-6
    return np.asarray(ndimage.gaussian_filter(np.where(region, values, 0.0), sigma_px) / weight, dtype=np.float32)


def _axes(mask: Mask) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Centre (y, x), variances along the principal axes (ascending) and these axes as columns."""
    points = np.argwhere(mask).astype(np.float64)
    centre = points.mean(axis=0)
    variances, axes = np.linalg.eigh(np.cov((points - centre).T) + 1e-6 * np.eye(2))
    return centre, variances, axes


def _length_over_width(mask: Mask) -> float:
    if mask.sum() < _LEAST_PIXELS:
        return 1.0
    _, variances, _ = _axes(mask)
    return float(np.sqrt(variances[1] / max(variances[0], 0.25)))


def _hull_gap(mask: Mask) -> float:
    """Share of the convex hull that the region leaves empty."""
    if mask.sum() < _LEAST_PIXELS:
        return 0.0
    corners = np.argwhere(mask & ~ndimage.binary_erosion(mask))
    # Pixels have extent: their corners, not their centres, span the hull.
    spread = (corners[:, None, :] + np.array([[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]])).reshape(-1, 2)
    try:
        area = ConvexHull(spread).volume
    except QhullError:
        return 0.0
    return float(max(0.0, 1 - mask.sum() / area))


def _wobble(mask: Mask) -> float:
    """Spread of the outline's distance from its own smooth course, relative to the radius."""
    if mask.sum() < _LEAST_PIXELS:
        return 0.0
    radius = _radius_profile(mask)
    spectrum = np.abs(np.fft.rfft(radius))[4:25] / radius.size
    return float(np.sqrt(2 * np.sum(spectrum**2)) / radius.mean())


def _radius_profile(mask: Mask, n_angles: int = 96) -> npt.NDArray[np.float64]:
    """Distance from the middle to the outermost pixel in each direction."""
    edge = np.argwhere(mask & ~ndimage.binary_erosion(mask)).astype(np.float64)
    offset = edge - np.argwhere(mask).mean(axis=0)
    angle = np.arctan2(offset[:, 0], offset[:, 1]) % (2 * np.pi)
    sector = (angle / (2 * np.pi) * n_angles).astype(int) % n_angles
    profile = np.zeros(n_angles)
    np.maximum.at(profile, sector, np.hypot(offset[:, 0], offset[:, 1]))
    known = np.flatnonzero(profile)
    filled = np.interp(np.arange(n_angles), known, profile[known], period=n_angles)
    return np.asarray(np.maximum(filled, 1.0))


def _fold_difference(mask: Mask) -> float:
    """Share of the region that finds no partner when it is folded over its long axis."""
    if mask.sum() < _LEAST_PIXELS:
        return 0.0
    centre, _, axes = _axes(mask)
    return min(_folded(mask, centre, axes[:, k]) for k in (0, 1))


def _folded(mask: Mask, centre: npt.NDArray[np.float64], normal: npt.NDArray[np.float64]) -> float:
    offset = np.argwhere(mask) - centre
    mirrored = np.rint(offset - 2 * np.outer(offset @ normal, normal) + centre).astype(int)
    inside = ((mirrored >= 0) & (mirrored < mask.shape)).all(axis=1)
    hits = mask[mirrored[inside, 0], mirrored[inside, 1]].sum()
    return float(1 - hits / len(offset))


def _n_pieces(mask: Mask) -> int:
    labels, n = ndimage.label(mask)
    sizes = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    return int((sizes >= 0.1 * mask.sum()).sum())


def _edge_softness(scene: Scene) -> float:
    """Width of the step from object to ground, in percent of the object's radius."""
    whole = scene.whole
    signed = depth_of(whole) - depth_of(~whole)
    band = np.abs(signed) < _EDGE_REACH_PX
    steps = np.floor(signed[band]).astype(int) + _EDGE_REACH_PX
    counts = np.bincount(steps, minlength=2 * _EDGE_REACH_PX)
    profile = np.bincount(steps, scene.difference[band], minlength=2 * _EDGE_REACH_PX) / np.maximum(counts, 1)
    rise = np.diff(profile[counts > 0])
    if rise.size < 4:
        return 0.0
    width_px = (profile.max() - profile.min()) / max(float(np.sort(rise)[-2:].mean()), 0.1)
    # Our own smoothing widens every step; widths of blurs add in squares.
    width_px = np.sqrt(max(width_px**2 - 2 * np.pi * SMOOTHING_PX**2, 0.0))
    return float(100 * width_px / np.sqrt(whole.sum() / np.pi))
