from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data_contracts.embedded_weights import lite0_to_timm, lite0_weights_path, minilm_folder
from data_contracts.pixels import encode, shrink


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 120, 3), dtype=np.uint8)


def test_shrinking_keeps_the_proportions_and_never_enlarges(pixels: np.ndarray) -> None:
    assert shrink(pixels, 30).shape == (15, 30, 3)
    assert shrink(pixels, 500) is pixels
    assert shrink(np.zeros((1, 4000, 3), np.uint8), 10).shape == (1, 10, 3)


def test_a_png_gives_back_the_same_pixels_and_nothing_else(pixels: np.ndarray) -> None:
    image = Image.open(io.BytesIO(encode(pixels, 500)))
    np.testing.assert_array_equal(np.asarray(image), pixels)
    assert not image.info


def test_a_jpeg_carries_no_exif(pixels: np.ndarray) -> None:
    image = Image.open(io.BytesIO(encode(pixels, 64, "JPEG")))
    assert image.size == (64, 32)
    assert not image.getexif()


def test_embedded_weights_are_there_and_map_one_to_one() -> None:
    assert lite0_weights_path().is_file()
    assert (minilm_folder() / "tokenizer.json").is_file()
    keys = {"_conv_stem.weight": 1, "_blocks.0._bn1.bias": 2, "_blocks.15._bn2.weight": 3, "_fc.bias": 4}
    assert lite0_to_timm(keys) == {
        "conv_stem.weight": 1,
        "blocks.0.0.bn1.bias": 2,
        "blocks.6.0.bn3.weight": 3,
        "classifier.bias": 4,
    }
