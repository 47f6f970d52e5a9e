"""Dark fields inside a bright body, such as lungs in a CT slice: where they are, and what is white in them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from annotation.vlm.segment import Mask, Plane, depth_of, otsu

_SMALLEST_SHARE = 0.012
_MOST_BORDER = 0.35
_CLOSING_PX = 11
_HAZE_STEP = 0.16


@dataclass(frozen=True)
class Fields:
    """The dark fields of one grey image, with lightness scaled so that 0 is black and 1 is the body around them."""

    region: Mask
    """(H, W) the fields with what lies in them, such as vessels."""
    scaled: Plane
    """(H, W) lightness: 0 as the darkest of the image, 1 as the body."""
    clear: float
    """The scaled lightness of the fields where they are clear."""
    middle: float
    """Column that divides left from right."""

    @cached_property
    def inside(self) -> Mask:
        """(H, W) the fields without the blur of their own edge."""
        inside = ndimage.binary_erosion(self.region, iterations=3)
        return inside if inside.any() else self.region

    @cached_property
    def haze(self) -> Mask:
        """(H, W) where the inside is clearly lighter than where it is clear."""
        smooth = ndimage.gaussian_filter(self.scaled, 1.5)
        return np.asarray(self.inside & (smooth > self.clear + _HAZE_STEP))


def fields_of(lightness: Plane) -> Fields | None:
    """The dark fields of an image, or None when it shows none."""
    smooth = ndimage.gaussian_filter(lightness, 1.0)
    cut = otsu(smooth)
    body = _largest(smooth >= cut)
    inside = _between(body) & (smooth < cut)
    region = _kept_fields(ndimage.binary_opening(inside, iterations=1))
    if region.mean() < 3 * _SMALLEST_SHARE:
        return None
    labels, n = ndimage.label(region)
    # Each on its own, so that no bridge is built over what lies between two fields.
    closed = np.logical_or.reduce([_closed(labels == k, _CLOSING_PX) for k in range(1, n + 1)])
    black = float(np.percentile(lightness, 1))
    white = float(np.median(lightness[body & ~closed])) if (body & ~closed).any() else cut
    scaled = (lightness - black) / max(white - black, 1.0)
    clear = float(np.percentile(scaled[closed], 25))
    columns = np.flatnonzero(closed.any(axis=0))
    return Fields(closed, scaled.astype(np.float32), clear, float(columns.mean()))


def _largest(mask: Mask) -> Mask:
    labels, n = ndimage.label(mask)
    if n == 0:
        return mask
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    return labels == int(counts.argmax())


def _between(body: Mask) -> Mask:
    """Pixels with body on both sides in their row, or above and below in their column."""
    left, right = np.logical_or.accumulate(body, axis=1), np.logical_or.accumulate(body[:, ::-1], axis=1)[:, ::-1]
    above, below = np.logical_or.accumulate(body, axis=0), np.logical_or.accumulate(body[::-1], axis=0)[::-1]
    return (left & right & (above | below)) | (above & below & (left | right))


def _kept_fields(dark: Mask) -> Mask:
    """Components that are large enough and do not run along the image's border."""
    labels, n = ndimage.label(dark)
    counts = np.bincount(labels.ravel(), minlength=n + 1)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    on_edge = np.bincount(edge, minlength=n + 1)
    keep = (counts >= _SMALLEST_SHARE * dark.size) & (on_edge <= _MOST_BORDER * 4 * np.sqrt(counts))
    keep[0] = False
    result: npt.NDArray[np.bool_] = keep[labels]
    return result


def _closed(region: Mask, radius_px: int) -> Mask:
    """A field closed with a disc and filled, so that what is white inside or at its edge belongs to it."""
    padded = np.pad(region, radius_px + 1)
    grown = depth_of(~padded) <= radius_px
    closed = depth_of(grown) > radius_px
    filled = ndimage.binary_fill_holes(closed)
    margin = radius_px + 1
    return np.asarray(filled[margin:-margin, margin:-margin], dtype=bool)
