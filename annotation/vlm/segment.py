"""From pixels to regions: ground, main object, its rim and parts; or dark fields inside a bright body.

Nothing here knows a disease or a stain. Colours are CIE Lab (D65), lengths are pixels of the measuring size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from data_contracts.pixels import shrink
from data_contracts.ports import Pixels

Plane = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

SIDE_PX = 192
"""Longer side at which everything is measured."""

SMOOTHING_PX = 1.2
"""Standard deviation of the blur under which regions are found."""

_XYZ_OF_RGB = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]],
    dtype=np.float32,
)
_WHITE = np.array([0.95047, 1.0, 1.08883], dtype=np.float32)
_GREY_CHROMA = 8.0
_HAIR_DEPTH = 9.0
_HAIR_LENGTH_PX = 13
_HAIR_ON_GROUND = 0.4
_GROUND_REACH = 12.0
_N_ANGLES = 48
_TWO_PARTS_LIGHTNESS = 15.0


def _linear_table() -> Plane:
    values = np.arange(256) / 255.0
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return linear.astype(np.float32)


_LINEAR = _linear_table()


def lab_of(pixels: Pixels) -> Plane:
    """(H, W, 3) CIE Lab of sRGB pixels: L 0–100, a and b about -100–100."""
    xyz = _LINEAR[pixels] @ (_XYZ_OF_RGB / _WHITE[:, None]).T
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def depth_of(mask: Mask) -> Plane:
    """(H, W) distance of every pixel of a mask to the nearest pixel outside it; 0 outside."""
    return np.asarray(ndimage.distance_transform_edt(mask), dtype=np.float32)


def otsu(values: npt.NDArray[np.floating], weights: npt.NDArray[np.floating] | None = None, n_bins: int = 64) -> float:
    """Cut between two groups that maximises the variance between them (Otsu 1979); `weights` count values."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return low
    counts, edges = np.histogram(values, bins=n_bins, range=(low, high), weights=weights)
    centres = (edges[:-1] + edges[1:]) / 2
    weight = np.cumsum(counts)[:-1]
    total = np.cumsum(counts * centres)[:-1]
    rest = counts.sum() - weight
    with np.errstate(divide="ignore", invalid="ignore"):
        between = weight * rest * (total / weight - (np.sum(counts * centres) - total) / rest) ** 2
    best = np.nan_to_num(between, nan=-1.0)
    # Between two clean groups every cut is as good as another: take the middle of them.
    ties = np.flatnonzero(best >= best.max() * (1 - 1e-9))
    return float(edges[1 + (ties[0] + ties[-1]) // 2])


def without_hair(lab: Plane) -> tuple[Plane, Mask]:
    """The image with long thin dark lines (hairs, ruler marks) filled from beside them, and where they were."""
    lightness = lab[..., 0]
    without_lines = ndimage.grey_closing(lightness, size=(7, 7))
    thin = without_lines - lightness > _HAIR_DEPTH
    lines = ndimage.binary_dilation(_lines_in(thin), iterations=2) & ndimage.binary_dilation(thin)
    hair = _hairs(lines, without_lines > np.median(without_lines) - _HAIR_DEPTH)
    return (_filled(lab, hair), hair) if hair.any() else (lab, hair)


def _lines_in(mask: Mask) -> Mask:
    """Pixels that lie on a straight line of `_HAIR_LENGTH_PX` pixels inside the mask, in one of 24 directions."""
    height, width = mask.shape
    reach = _HAIR_LENGTH_PX // 2
    found = np.zeros((height + 2 * reach, width + 2 * reach), dtype=bool)
    padded = np.pad(mask, reach)
    for angle in np.linspace(0, np.pi, 24, endpoint=False):
        steps = np.arange(-reach, reach + 1)
        offsets = np.rint(np.stack([steps * np.sin(angle), steps * np.cos(angle)], axis=1)).astype(int) + reach
        windows = [(slice(y, y + height), slice(x, x + width)) for y, x in offsets]
        centres = mask.copy()
        for window in windows:
            centres &= padded[window]
        for window in windows if centres.any() else ():
            found[window] |= centres
    return found[reach : reach + height, reach : reach + width]


def _hairs(lines: Mask, ground: Mask) -> Mask:
    """The connected lines that are long and run over the ground; others are the texture of an object."""
    labels, n = ndimage.label(lines, structure=np.ones((3, 3)))
    keep = np.zeros(n + 1, dtype=bool)
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        is_long = max(s.stop - s.start for s in box) >= 2 * _HAIR_LENGTH_PX
        keep[index] = is_long and ground[box][labels[box] == index].mean() >= _HAIR_ON_GROUND
    return np.asarray(keep[labels])


def _filled(lab: Plane, holes: Mask) -> Plane:
    """The image with `holes` filled by a blur of what is around them."""
    weight = ndimage.gaussian_filter((~holes).astype(np.float32), 4.0) + 1e-6
    blurred = np.stack(
        [ndimage.gaussian_filter(np.where(holes, 0, lab[..., c]), 4.0) / weight for c in range(3)], axis=-1
    )
    return np.where(holes[..., None], blurred, lab).astype(np.float32)


def ground_of(lab: Plane) -> Plane:
    """(H, W, 3) colour the ground has, or would have, at every pixel: its commonest colour with a linear light."""
    height, width = lab.shape[:2]
    y, x = np.mgrid[0:height:2, 0:width:2].reshape(2, -1).astype(np.float32)
    colours = lab[::2, ::2].reshape(-1, 3)
    basis = np.stack([np.ones_like(x), x / width - 0.5, y / height - 0.5], axis=1)
    near = np.linalg.norm(colours - _commonest(colours), axis=1) < _GROUND_REACH
    coefficients = np.zeros((3, 3), dtype=np.float32)
    for _ in range(4):
        coefficients = np.linalg.lstsq(basis[near], colours[near], rcond=None)[0]
        near = np.linalg.norm(colours - basis @ coefficients, axis=1) < _GROUND_REACH
    yy, xx = np.mgrid[0:height, 0:width].astype(np.float32)
    full = np.stack([np.ones_like(xx), xx / width - 0.5, yy / height - 0.5], axis=-1)
    return (full @ coefficients).astype(np.float32)


def _commonest(colours: Plane) -> Plane:
    """(3,) the commonest colour: the middle of the fullest cell of a colour histogram."""
    # Fine cells, so that an even ground beats a larger but more varied foreground.
    cells = np.floor(colours / 2.5).astype(int)
    cells -= cells.min(axis=0)
    counts = np.zeros(cells.max(axis=0) + 1, dtype=np.float32)
    np.add.at(counts, tuple(cells.T), 1)
    # Light that falls unevenly spreads the ground over neighbouring cells.
    fullest = np.unravel_index(int(np.argmax(ndimage.uniform_filter(counts, 2, mode="constant"))), counts.shape)
    inside = (np.abs(cells - np.array(fullest)) <= 1).all(axis=1)
    return np.median(colours[inside], axis=0).astype(np.float32)


@dataclass(frozen=True)
class Scene:
    """One image, ready to be measured."""

    lab: Plane
    """(H, W, 3) Lab without hair."""
    is_grey: bool
    """Whether it has no colour worth the name."""
    ground: Plane
    """(H, W, 3) Lab of the ground."""
    difference: Plane
    """(H, W) Lab distance from the ground, lightly smoothed."""
    whole: Mask
    """(H, W) the main object: what stands out most near the middle, out to where the ground begins."""
    dark: Mask
    """(H, W) its dark part; all of it when it has no two parts."""
    spots: Mask
    """(H, W) smaller separate things that stand out as much elsewhere."""
    hair: Mask
    """(H, W) where hairs and rulers were."""

    @property
    def pale(self) -> Mask:
        """(H, W) the main object without its dark part; empty when it has no two parts."""
        return self.whole & ~self.dark


def scene_of(pixels: Pixels) -> Scene:
    """Regions of an image with an object on a ground."""
    raw = lab_of(shrink(pixels, SIDE_PX))
    chroma = np.hypot(raw[..., 1], raw[..., 2])
    is_grey = bool(np.percentile(chroma, 90) < _GREY_CHROMA)
    lab, hair = without_hair(raw)
    smooth = ndimage.gaussian_filter(lab, (SMOOTHING_PX, SMOOTHING_PX, 0))
    ground = ground_of(smooth)
    difference = np.linalg.norm(smooth - ground, axis=-1)
    core, spots = _core_and_spots(difference)
    whole = ndimage.binary_fill_holes(core | ndimage.binary_opening(core | _rim(difference, core), iterations=2))
    return Scene(lab, is_grey, ground, difference, whole, _dark_part(smooth[..., 0], whole), spots & ~whole, hair)


def _centre_weight(shape: tuple[int, ...]) -> Plane:
    y, x = np.ogrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    return np.exp(-(x**2 + y**2) / (2 * 0.55**2)).astype(np.float32)


def _core_and_spots(difference: Plane) -> tuple[Mask, Mask]:
    """The main object (with the parts that belong to it), and other things above the same cut."""
    centre = _centre_weight(difference.shape)
    capped = np.minimum(difference, np.percentile(difference, 99.5))
    above = ndimage.binary_opening(difference > otsu(capped.ravel(), centre.ravel() ** 2), iterations=1)
    labels, n = ndimage.label(above)
    if n == 0:
        return above, above.copy()
    index = np.arange(1, n + 1)
    main = 1 + int(np.argmax(ndimage.sum_labels(centre * difference, labels, index)))
    areas = ndimage.sum_labels(above, labels, index)
    radius = np.sqrt(areas[main - 1] / np.pi)
    nearest = ndimage.minimum(depth_of(labels != main), labels, index)
    belongs = (areas >= 0.12 * areas[main - 1]) & (nearest <= 0.6 * radius)
    belongs[main - 1] = True
    core = np.isin(labels, index[belongs])
    on_border = np.unique(
        np.concatenate([labels[:2].ravel(), labels[-2:].ravel(), labels[:, :2].ravel(), labels[:, -2:].ravel()])
    )
    spots = np.isin(labels, index[~belongs & (areas >= 6) & ~np.isin(index, on_border)])
    return core, spots


def _dark_part(lightness: Plane, whole: Mask) -> Mask:
    """The dark part of an object, or all of it when dark and pale differ too little to be two things."""
    values = lightness[whole]
    if values.size < 20:
        return whole.copy()
    dark = whole & (lightness < otsu(values))
    pale = whole & ~dark
    if not dark.any() or lightness[pale].mean() - lightness[dark].mean() < _TWO_PARTS_LIGHTNESS:
        return whole.copy()
    opened = ndimage.binary_opening(dark, iterations=1)
    return opened if opened.any() else dark


def _rim(difference: Plane, core: Mask) -> Mask:
    """What lies around the core until the ground begins, as seen from the middle of the core along rays."""
    if not core.any():
        return np.zeros_like(core)
    cy, cx = ndimage.center_of_mass(core)
    height, width = core.shape
    angles = np.linspace(0, 2 * np.pi, _N_ANGLES, endpoint=False)
    radii = np.arange(0, max(height, width) * 0.6, 1.0)
    ys = np.clip(cy + radii[None, :] * np.sin(angles)[:, None], 0, height - 1).astype(int)
    xs = np.clip(cx + radii[None, :] * np.cos(angles)[:, None], 0, width - 1).astype(int)
    inside_core = core[ys, xs]
    last_core = np.where(inside_core.any(axis=1), inside_core.shape[1] - 1 - inside_core[:, ::-1].argmax(axis=1), 0)
    cut = 0.5 * _GROUND_REACH
    is_ground = (difference[ys, xs] < cut) & (radii[None, :] > last_core[:, None])
    reach = np.where(is_ground.any(axis=1), is_ground.argmax(axis=1), radii.size).astype(float)
    # Neighbours that touch lengthen some rays: no ray may be much longer than the usual one.
    reach = np.minimum(reach, 1.2 * np.percentile(reach, 40))
    reach = np.maximum(ndimage.median_filter(reach, 5, mode="wrap"), last_core)
    yy, xx = np.mgrid[0:height, 0:width]
    sector = ((np.arctan2(yy - cy, xx - cx) % (2 * np.pi)) / (2 * np.pi) * _N_ANGLES).astype(int) % _N_ANGLES
    within = np.hypot(yy - cy, xx - cx) <= reach[sector]
    return within & ~core & (difference >= cut)
