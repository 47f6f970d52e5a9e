from __future__ import annotations

import numpy as np
import pytest
import torch

from data_contracts.errors import ConfigurationError
from model.augment import AUGMENTATIONS, GENERAL, NONE, augmentation_for


@pytest.mark.parametrize(
    ("modality", "name"),
    [
        ("chest X-ray", "chest-x-ray"),
        ("frontal CXR", "chest-x-ray"),
        ("full-field mammography", "mammography"),
        ("Chest CT", "ct"),
        ("axial CT/PET slice", "ct"),
        ("colour fundus photograph", "fundus"),
        ("dermoscopy", "skin"),
        ("clinical photograph of skin", "skin"),
        ("H&E histopathology", "histology"),
        ("blood smear microscopy", "microscopy"),
        ("brain MRI", "mri"),
        ("OCT of the macula", "oct"),
        ("fracture photographs of octopuses", GENERAL),
        ("medical image", GENERAL),
        ("", GENERAL),
    ],
)
def test_the_words_of_the_modality_choose(modality: str, name: str) -> None:
    assert augmentation_for("auto", modality).name == name


def test_a_given_name_wins_and_an_unknown_one_is_refused_with_a_proposal() -> None:
    assert augmentation_for("histology", "chest X-ray").name == "histology"
    with pytest.raises(ConfigurationError, match="Did you mean histology"):
        augmentation_for("histologie", "")


def half_bright() -> torch.Tensor:
    """A picture whose left half is bright: mirrored, it is the other one."""
    image = torch.full((3, 32, 32), 60, dtype=torch.uint8)
    image[:, :, :16] = 200
    return image


@pytest.mark.parametrize("name", [n for n, one in AUGMENTATIONS.items() if not one.mirrored])
def test_left_stays_left_where_sides_matter(name: str) -> None:
    for seed in range(20):
        shown = AUGMENTATIONS[name](half_bright(), np.random.default_rng(seed)).float()
        assert shown[:, :, :12].mean() > shown[:, :, 20:].mean() + 60


@pytest.mark.parametrize("name", ["skin", "histology", "microscopy", "endoscopy"])
def test_what_has_no_upper_end_is_shown_from_all_sides(name: str) -> None:
    seen = set()
    for seed in range(40):
        shown = AUGMENTATIONS[name](half_bright(), np.random.default_rng(seed)).float().mean(0)
        halves = [shown[:, :16], shown[:, 16:], shown[:16], shown[16:]]
        seen.add(max(range(4), key=lambda n: halves[n].mean()))
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["skin", "microscopy", "endoscopy", "fundus", GENERAL])
def test_colour_stays_where_it_is_the_finding(name: str) -> None:
    red = torch.zeros(3, 32, 32, dtype=torch.uint8)
    red[0], red[1], red[2] = 180, 60, 90
    for seed in range(20):
        mean = AUGMENTATIONS[name](red, np.random.default_rng(seed)).float().mean((1, 2))
        assert mean[1] / mean[0] == pytest.approx(60 / 180, abs=0.04)
        assert mean[2] / mean[0] == pytest.approx(90 / 180, abs=0.04)


def test_the_generator_alone_decides_and_none_changes_nothing() -> None:
    image, histology = half_bright(), AUGMENTATIONS["histology"]
    one, same, other = (histology(image, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.dtype == torch.uint8
    assert one.shape == image.shape
    assert torch.equal(AUGMENTATIONS[NONE](image, np.random.default_rng(0)), image)
