from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from model import paired


def test_mcnemar_is_the_binomial_test_of_the_images_on_which_two_networks_differ() -> None:
    right = np.array([1] * 8 + [0] * 2 + [1] * 20 + [0] * 5, bool)
    other = np.array([0] * 8 + [1] * 2 + [1] * 20 + [0] * 5, bool)
    assert paired.mcnemar(right, other) == pytest.approx(binomtest(8, 10).pvalue)
    assert paired.mcnemar(right, right) == 1


def test_a_true_difference_is_found_and_none_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    assert paired.difference(0.1, rng.normal(0.1, 0.02, 1000)).p == pytest.approx(2 / 1001)
    assert paired.difference(0.0, rng.normal(0.0, 0.02, 1000)).p > 0.5
    assert paired.difference(0.0, np.zeros(1000)).p == 1
    assert np.isnan(paired.difference(float("nan"), np.full(10, np.nan)).p)


def test_p_values_are_uniform_when_systems_do_not_differ() -> None:
    rng = np.random.default_rng(1)
    found = []
    for _ in range(400):
        differences = rng.normal(0, 1, 60)
        resampled = differences[rng.integers(0, 60, (400, 60))].mean(1)
        found.append(paired.difference(float(differences.mean()), resampled).p)
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.05, abs=0.03)


def test_seeds_are_drawn_with_the_images() -> None:
    values = np.array([[0.0] * 4, [1.0] * 4])
    drawn = np.array([[0, 0], [0, 1], [1, 1], [1, 0]])
    assert paired.over_seeds(values, drawn).tolist() == [0, 0.5, 1, 0.5]
    counts = np.bincount(paired.drawn_seeds(5, 2000).ravel())
    assert counts.min() > 1700


def test_an_interval_of_one_seed_and_one_image_is_unknown() -> None:
    shown = paired.interval(0.5, np.array([np.nan, np.nan]))
    assert shown.value == 0.5
    assert np.isnan(shown.low)
