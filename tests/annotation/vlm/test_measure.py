"""Measurements against pictures whose numbers are known by construction."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage
from skimage import color, filters

from annotation.vlm.fields import fields_of
from annotation.vlm.measure import measure
from annotation.vlm.segment import lab_of, otsu, scene_of

Pixels = npt.NDArray[np.uint8]
SKIN, BROWN, RED, BLUE = (225, 185, 165), (120, 80, 60), (190, 70, 70), (80, 85, 150)


def picture(
    mask: npt.NDArray[np.bool_], colour: tuple[int, int, int] = BROWN, ground: tuple[int, int, int] = SKIN
) -> Pixels:
    image = np.where(mask[..., None], np.array(colour), np.array(ground)).astype(np.float64)
    noise = np.random.default_rng(0).normal(0, 2, image.shape)
    return np.clip(ndimage.gaussian_filter(image, (0.8, 0.8, 0)) + noise, 0, 255).astype(np.uint8)


def ellipse(length_px: float, width_px: float, turn: float = 0.0, side_px: int = 160) -> npt.NDArray[np.bool_]:
    y, x = np.mgrid[0:side_px, 0:side_px] - side_px / 2 + 0.5
    along, across = x * np.cos(turn) + y * np.sin(turn), -x * np.sin(turn) + y * np.cos(turn)
    return (along / length_px) ** 2 + (across / width_px) ** 2 <= 1


def star(radius_px: float, depth: float, n: int = 8, side_px: int = 160) -> npt.NDArray[np.bool_]:
    y, x = np.mgrid[0:side_px, 0:side_px] - side_px / 2 + 0.5
    return np.hypot(x, y) <= radius_px * (1 + depth * np.cos(n * np.arctan2(y, x)))


def test_lab_equals_scikit_image() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    np.testing.assert_allclose(lab_of(pixels), color.rgb2lab(pixels), atol=0.05)


def test_otsu_equals_scikit_image_within_a_bin() -> None:
    random = np.random.default_rng(0)
    values = np.concatenate([random.normal(10, 2, 3000), random.normal(30, 4, 1000)])
    bin_width = np.ptp(values) / 64
    assert otsu(values) == pytest.approx(filters.threshold_otsu(values, nbins=64), abs=1.01 * bin_width)


def test_otsu_of_two_clean_groups_lies_midway_between_them() -> None:
    assert otsu(np.array([1.0] * 10 + [9.0] * 3)) == pytest.approx(5.0, abs=0.3)


@pytest.mark.parametrize("turn", [0.0, 0.7, 1.9])
def test_size_and_elongation_of_a_turned_ellipse(turn: float) -> None:
    mask = ellipse(45, 25, turn)
    found = measure(picture(mask))
    assert found["area_percent"] == pytest.approx(100 * mask.mean(), rel=0.12)
    assert found["length_over_width"] == pytest.approx(45 / 25, rel=0.06)


def test_a_jagged_outline_has_gaps_and_a_round_one_has_not() -> None:
    assert measure(picture(ellipse(35, 35)))["outline_gap_percent"] < 5
    assert measure(picture(star(35, 0.2)))["outline_gap_percent"] > 12


def test_half_a_disc_finds_no_partner_over_its_other_axis() -> None:
    lopsided = star(30, 0.35, n=3) | (ellipse(40, 20) & (np.arange(160)[None, :] > 80))
    assert (
        measure(picture(lopsided))["fold_difference_percent"]
        > measure(picture(ellipse(40, 20)))["fold_difference_percent"] + 2
    )


@pytest.mark.parametrize(("colour", "quantity"), [(RED, "red_share_percent"), (BLUE, "blue_share_percent")])
def test_colours_fill_the_object_they_fill(colour: tuple[int, int, int], quantity: str) -> None:
    half = ellipse(40, 40).copy()
    image = picture(half)
    left = half & (np.arange(160)[None, :] < 80)
    image[left] = colour
    assert measure(image)[quantity] == pytest.approx(50, abs=12)
    assert measure(picture(half))[quantity] < 15


def test_colour_is_measured_against_the_ground_so_a_cast_hardly_matters() -> None:
    image = picture(ellipse(40, 40), RED)
    cast = np.clip(image * np.array([0.95, 1.0, 1.05]), 0, 255).astype(np.uint8)
    assert measure(cast)["redness"] == pytest.approx(measure(image)["redness"], rel=0.15)


def test_a_lighting_gradient_does_not_move_the_outline() -> None:
    mask = ellipse(35, 35)
    slope = 1 + 0.25 * np.linspace(-0.5, 0.5, 160)[None, :, None]
    lit = np.clip(picture(mask) * slope, 0, 255).astype(np.uint8)
    assert measure(lit)["area_percent"] == pytest.approx(100 * mask.mean(), rel=0.15)


def test_hairs_are_taken_out() -> None:
    mask = ellipse(30, 30)
    rows, strands = np.arange(160), np.zeros((160, 160))
    for offset in (-40, 10, 45):
        for width_px in (0, 1):
            strands[rows, np.clip(rows // 2 + 40 + offset + width_px, 0, 159)] = 1
    strands = ndimage.gaussian_filter(strands, 0.7)[..., None]
    image = (picture(mask) * (1 - strands) + 25 * strands).astype(np.uint8)
    scene = scene_of(image)
    assert scene.hair.any()
    found = measure(image)
    assert found["area_percent"] == pytest.approx(100 * mask.mean(), rel=0.15)
    assert found["spots"] == 0


def test_separate_spots_are_counted() -> None:
    mask = ellipse(28, 28).copy()
    for cy, cx in ((20, 30), (25, 125), (135, 40), (130, 130)):
        y, x = np.ogrid[0:160, 0:160]
        mask |= np.hypot(y - cy, x - cx) < 5
    assert measure(picture(mask))["spots"] == 4


def test_a_dark_middle_is_dark_and_a_dark_part_is_found() -> None:
    image = picture(ellipse(45, 45), (170, 120, 100))
    core = ellipse(18, 18)
    image[core] = (60, 35, 25)
    found = measure(image)
    assert found["middle_darkness"] > 15
    assert found["dark_share_percent"] == pytest.approx(100 * (18 / 45) ** 2, abs=6)


def test_a_blurred_edge_is_soft_whatever_the_size() -> None:
    for radius_px in (22, 45):
        sharp = picture(ellipse(radius_px, radius_px))
        blurred = ndimage.gaussian_filter(sharp, (0.15 * radius_px, 0.15 * radius_px, 0))
        assert measure(sharp)["edge_softness"] < 14 < measure(blurred)["edge_softness"]


def chest(haze: bool = False) -> Pixels:
    """A grey body with two dark fields, with a light patch in the left one if asked."""
    y, x = np.mgrid[0:160, 0:200]
    body = ((x - 100) / 95) ** 2 + ((y - 80) / 75) ** 2 <= 1
    left, right = (((x - c) / 32) ** 2 + ((y - 80) / 52) ** 2 <= 1 for c in (60, 140))
    grey = np.where(body, 210.0, 10.0)
    grey[left | right] = 60
    if haze:
        grey[(np.hypot(x - 60, y - 100) < 18)] = 140
    noise = np.random.default_rng(0).normal(0, 3, grey.shape)
    return np.clip(np.repeat((grey + noise)[..., None], 3, axis=2), 0, 255).astype(np.uint8)


def test_dark_fields_of_a_grey_body_are_measured_as_fields() -> None:
    clear, hazy = measure(chest()), measure(chest(haze=True))
    assert clear["field_area_percent"] == pytest.approx(100 * 2 * np.pi * 32 * 52 / (160 * 200), rel=0.1)
    assert clear["field_haze_percent"] < 2
    assert hazy["field_haze_percent"] > 5
    assert hazy["field_side_difference"] > 10
    assert hazy["field_low_haze"] > 3
    assert hazy["field_both_sides_percent"] < 2
    assert "redness" not in clear


def test_an_image_without_dark_fields_has_none() -> None:
    bright_on_dark = picture(ellipse(30, 30), colour=(220, 220, 220), ground=(20, 20, 20))
    assert fields_of(lab_of(bright_on_dark)[..., 0]) is None


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((64, 64, 3), np.uint8),
        np.full((64, 64, 3), 255, np.uint8),
        np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8),
        np.zeros((1, 1, 3), np.uint8),
        np.full((3, 400, 3), 77, np.uint8),
        np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], 64, axis=1).repeat(3, axis=2),
    ],
    ids=["black", "white", "noise", "one pixel", "a strip", "a ramp"],
)
def test_any_image_can_be_measured(pixels: Pixels) -> None:
    assert all(np.isfinite(value) for value in measure(pixels).values())


def test_measuring_is_repeatable() -> None:
    assert measure(chest(haze=True)) == measure(chest(haze=True))


def test_measuring_does_not_grow_with_the_image() -> None:
    large = np.repeat(np.repeat(picture(ellipse(30, 30)), 8, axis=0), 8, axis=1)
    start_s = time.process_time()
    measure(large)
    assert time.process_time() - start_s < 2
