"""Common corruptions of an image at five severities, on the square that the network sees.

Kinds and strengths follow Hendrycks and Dietterich (ICLR 2019), whose numbers are for 224-pixel images: noise and
blur that cameras and scanners make, light, contrast, and the JPEG that clinics store.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.color import hsv2rgb, rgb2hsv
from skimage.util import random_noise

from data_contracts.ports import Pixels

N_SEVERITIES = 5

_NOISE_DEVIATION = (0.08, 0.12, 0.18, 0.26, 0.38)
_BLUR_SIGMA_PX = (1.0, 2.0, 3.0, 4.0, 6.0)
_BRIGHTER_BY = (0.1, 0.2, 0.3, 0.4, 0.5)
_CONTRAST_KEPT = (0.4, 0.3, 0.2, 0.1, 0.05)
_JPEG_QUALITY = (25, 18, 15, 10, 7)

Corruption = Callable[[Pixels, int, np.random.Generator], Pixels]
"""(H, W, 3) uint8 pixels, severity 1 to 5, random numbers → pixels of the same size."""


def gaussian_noise(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Independent noise at every pixel and channel."""
    deviation = _NOISE_DEVIATION[severity - 1]
    return _to_8_bits(random_noise(_unit(pixels), mode="gaussian", rng=rng, var=deviation**2))


def gaussian_blur(pixels: Pixels, severity: int, _rng: np.random.Generator) -> Pixels:
    """Out of focus; the width is that of a 224-pixel image, scaled to this one."""
    sigma = _BLUR_SIGMA_PX[severity - 1] * pixels.shape[0] / 224
    return _to_8_bits(gaussian_filter(_unit(pixels), (sigma, sigma, 0)))


def brightness(pixels: Pixels, severity: int, _rng: np.random.Generator) -> Pixels:
    """More light: the value of hue, saturation and value raised."""
    hsv = rgb2hsv(_unit(pixels))
    hsv[..., 2] = np.clip(hsv[..., 2] + _BRIGHTER_BY[severity - 1], 0, 1)
    return _to_8_bits(hsv2rgb(hsv))


def contrast(pixels: Pixels, severity: int, _rng: np.random.Generator) -> Pixels:
    """Nearer to each channel's mean."""
    image = _unit(pixels)
    mean = image.mean((0, 1), keepdims=True)
    return _to_8_bits((image - mean) * _CONTRAST_KEPT[severity - 1] + mean)


def jpeg(pixels: Pixels, severity: int, _rng: np.random.Generator) -> Pixels:
    """Stored as JPEG of low quality and read again."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="JPEG", quality=_JPEG_QUALITY[severity - 1])
    with Image.open(stream) as image:
        return np.asarray(image.convert("RGB"))


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian noise": gaussian_noise,
    "gaussian blur": gaussian_blur,
    "brightness": brightness,
    "contrast": contrast,
    "jpeg": jpeg,
}
"""By name; each does nothing at severity 0, which nobody calls."""


def _unit(pixels: Pixels) -> np.ndarray:
    return pixels.astype(np.float64) / 255


def _to_8_bits(image: np.ndarray) -> Pixels:
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
