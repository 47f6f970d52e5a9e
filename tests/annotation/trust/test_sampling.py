from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotation.trust.sampling import allocated, answered_weights, inclusion, systematic, weights

SIZES = st.lists(st.floats(0.01, 100), min_size=1, max_size=30)


@given(SIZES, st.integers(0, 40))
def test_inclusion_probabilities_sum_to_what_is_taken(sizes: list[float], n: int) -> None:
    found = inclusion(np.array(sizes), n)
    assert found.sum() == pytest.approx(min(n, len(sizes)))
    assert found.max() <= 1


@given(SIZES, st.integers(0, 40), st.integers(0, 99))
def test_allocation_is_complete_and_within_what_there_is(measure: list[float], n: int, seed: int) -> None:
    available = np.arange(len(measure))
    taken = allocated(np.array(measure), available, n, np.random.default_rng(seed))
    assert taken.sum() == min(n, available.sum())
    assert (taken <= available).all()


def test_cells_are_drawn_as_often_as_their_probability_says() -> None:
    probability = np.array([0.1, 0.5, 0.9, 1.0, 0.5])
    hits = np.mean([systematic(probability, np.random.default_rng(i), 3, 5) for i in range(4000)], axis=0)
    assert hits == pytest.approx(probability, abs=0.03)


def test_totals_over_two_rounds_are_unbiased() -> None:
    """Both rounds draw with unequal probabilities, the second from what the first left."""
    rng = np.random.default_rng(0)
    y, sizes = rng.uniform(0, 1, 60), rng.uniform(0.2, 1, 60)
    found = []
    for _ in range(1500):
        q1 = inclusion(sizes, 10)
        first = np.flatnonzero(systematic(q1, rng, 10, 60))
        rest = np.setdiff1d(np.arange(60), first)
        q2 = inclusion(sizes[rest][::-1], 15)
        second = systematic(q2, rng, 15, len(rest)) > 0
        cells = pd.DataFrame(
            {
                "concept_id": "a",
                "round": [1] * 10 + [2] * 15,
                "inclusion_probability": np.r_[q1[first], q2[second]],
            }
        )
        found.append((weights(cells) * np.r_[y[first], y[rest[second]]]).sum())
    assert np.mean(found) == pytest.approx(y.sum(), rel=0.02)


def test_answered_cells_stand_for_the_others_of_their_stratum() -> None:
    cells = pd.DataFrame(
        {"concept_id": "a", "round": 1, "stratum": ["s", "s", "t", "t"], "inclusion_probability": [0.5, 0.5, 0.1, 0.1]}
    )
    assert answered_weights(cells, np.array([True, False, True, True])).tolist() == [4, 0, 10, 10]
    only_one_stratum = answered_weights(cells, np.array([True, True, False, False]))
    assert only_one_stratum.tolist() == pytest.approx([12, 12, 0, 0])
