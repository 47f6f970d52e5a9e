from __future__ import annotations

import numpy as np
import pytest
import torch

from model.explain.faithfulness import N_STEPS, blurred, deletion_insertion


def brightness_of_corner(images: torch.Tensor) -> np.ndarray:
    """(B, 1): how much of the upper left quarter is still as bright as it was."""
    return images[:, 0, :16, :16].mean((1, 2)).clamp(0, 1).numpy()[:, None]


@pytest.fixture
def image() -> torch.Tensor:
    pixels = torch.zeros(3, 32, 32)
    pixels[:, :16, :16] = 1
    # A checkerboard of fine cells, so that blurring takes half of the brightness away.
    pixels[:, 1:16:2, :16] = 1
    return pixels


def corner_map() -> np.ndarray:
    heat = np.random.default_rng(0).random((4, 4)) * 0.1
    heat[:2, :2] += 1
    return heat


def test_taking_away_what_counts_makes_the_score_fall_at_once(image: torch.Tensor) -> None:
    def share(images: torch.Tensor) -> np.ndarray:
        # The class is seen where the corner differs from the blurred image.
        gone = (images[:, 0, :16, :16] - blurred(image)[0, :16, :16]).abs().mean((1, 2))
        return (gone / (image[0, :16, :16] - blurred(image)[0, :16, :16]).abs().mean()).numpy()[:, None]

    heat = corner_map()
    right = deletion_insertion(image, [heat], share, n_random=8)
    wrong = deletion_insertion(image, [-heat], share, n_random=8)
    assert right.deletion[0] < right.deletion_random[0] < wrong.deletion[0]
    assert right.insertion[0] > right.insertion_random[0] > wrong.insertion[0]
    # Four of sixteen cells hold everything: all of it is gone after two of six steps.
    assert right.deletion[0] == pytest.approx((0.5 + 0.25) / N_STEPS, abs=0.06)


def test_a_network_that_looks_at_nothing_gives_equal_scores(image: torch.Tensor) -> None:
    def constant(images: torch.Tensor) -> np.ndarray:
        return np.full((len(images), 2), 0.7, np.float32)

    found = deletion_insertion(image, [corner_map(), corner_map()], constant)
    for values in found:
        np.testing.assert_allclose(values, 0.7, rtol=1e-6)
    assert deletion_insertion(image, [], constant).deletion.shape == (0,)


def test_each_map_is_followed_by_its_own_target(image: torch.Tensor) -> None:
    def two(images: torch.Tensor) -> np.ndarray:
        return np.concatenate([brightness_of_corner(images), np.ones((len(images), 1), np.float32)], axis=1)

    found = deletion_insertion(image, [corner_map(), corner_map()], two)
    assert found.deletion[1] == pytest.approx(1)
    assert found.deletion[0] < 1


def test_the_ends_are_the_whole_image_and_none_of_it(image: torch.Tensor) -> None:
    seen: list[torch.Tensor] = []

    def watch(images: torch.Tensor) -> np.ndarray:
        seen.append(images)
        return np.zeros((len(images), 1), np.float32)

    deletion_insertion(image, [corner_map()], watch)
    torch.testing.assert_close(seen[0][0], image)
    torch.testing.assert_close(seen[0][1], blurred(image))
    changed = (seen[1] != image).any(1).flatten(1).float().mean(1)
    assert changed[: N_STEPS - 1].diff().min() >= 0
