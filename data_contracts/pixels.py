"""The one re-encoder: what leaves the machine or reaches a page is fresh pixels, never a file's own bytes."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import Image

from data_contracts.ports import Pixels


def shrink(pixels: Pixels, side_px: int) -> Pixels:
    """The image with its longer side at most `side_px`; smaller images are returned as they are."""
    height, width = pixels.shape[:2]
    longer = max(height, width)
    if longer <= side_px:
        return pixels
    size = (max(1, round(width * side_px / longer)), max(1, round(height * side_px / longer)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def encode(
    pixels: Pixels, side_px: int, image_format: Literal["PNG", "JPEG"] = "PNG", *, jpeg_quality: int = 90
) -> bytes:
    """(H, W, 3) uint8 pixels as a new PNG or JPEG of at most `side_px`, without any metadata.

    From a JPEG quality of 95 on, colours keep their full resolution.
    """
    stream = io.BytesIO()
    subsampling = 0 if jpeg_quality >= 95 else 2
    jpeg = {"quality": jpeg_quality, "subsampling": subsampling}
    options = jpeg if image_format == "JPEG" else {"compress_level": 3}
    Image.fromarray(shrink(pixels, side_px)).save(stream, format=image_format, **options)
    return stream.getvalue()
