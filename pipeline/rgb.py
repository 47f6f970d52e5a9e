"""Any decoded Pillow image as upright 8-bit RGB."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

_EXIF_ORIENTATION = 0x0112
TURNED_BY_90 = frozenset({5, 6, 7, 8})
"""Orientations that swap width and height."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_8_bits(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Grey values of more than 8 bits as uint8, without clipping.

    Whole numbers are divided by the largest value of the smallest of 8, 10, 12, 14 and 16 bits that holds
    them: scanners put 12-bit values into 16-bit files, and dividing those by 65,535 would leave them black.
    Fractions in [0, 1] are multiplied by 255. Anything else is stretched from its minimum to its maximum;
    values that are not finite become the minimum.
    """
    numbers = np.asarray(values, np.float64)
    finite = np.isfinite(numbers)
    if not finite.all():
        numbers = np.where(finite, numbers, numbers[finite].min() if finite.any() else 0.0)
    low, high = float(numbers.min()), float(numbers.max())
    if np.issubdtype(values.dtype, np.integer) and low >= 0 and high < 2**16:
        bits = next(b for b in (8, 10, 12, 14, 16) if high < 2**b)
        low, high = 0.0, float(2**bits - 1)
    elif low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    return np.rint((numbers - low) * (255.0 / ((high - low) or 1.0))).astype(np.uint8)


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where the metadata is missing or broken: that is no reason to lose the pixels."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # parsers of hostile bytes raise anything
        return 1
    return value if isinstance(value, int) else 1


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says."""
    turn = _TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def as_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB: deep greys scaled, palettes looked up, transparency composited over white."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGB", layer.size, "white")
        ground.paste(layer, mask=layer.getchannel("A"))
        return ground
    return image.convert("RGB")
