from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from model.systems.elastic_net import elastic_net_path, penalties


@pytest.fixture
def columns() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 240)
    x = rng.normal(size=(240, 8)) + 1.2 * np.eye(8)[y]
    x = (x - x.mean(0)) / x.std(0)
    return x, y, rng.uniform(0.5, 2, 240)


@pytest.mark.parametrize("l1_ratio", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("penalty", [0.01, 0.08])
def test_the_minimum_is_scikit_learns(columns, l1_ratio: float, penalty: float) -> None:
    x, y, weights = columns
    (ours,) = elastic_net_path(
        x, y, weights, 3, l1_ratio=l1_ratio, path=np.array([penalty]), tolerance=1e-8, max_steps=5000
    )
    theirs = LogisticRegression(
        C=1 / (penalty * len(y)), l1_ratio=l1_ratio, solver="saga", tol=1e-8, max_iter=20_000, random_state=0
    ).fit(x, y, sample_weight=weights)
    np.testing.assert_allclose(ours.weights, theirs.coef_, atol=2e-4)
    intercept = ours.intercept - ours.intercept.mean()  # it is free up to a constant
    np.testing.assert_allclose(intercept, theirs.intercept_ - theirs.intercept_.mean(), atol=2e-4)


def test_the_path_goes_from_no_concept_to_many_and_warm_starts_do_not_matter(columns) -> None:
    x, y, weights = columns
    path = elastic_net_path(x, y, weights, 3, l1_ratio=0.99)
    used = [layer.n_concepts_used for layer in path]
    assert used[0] == 0
    assert used[1] > 0
    assert used[-1] > 5  # at most 2 of 3 classes: one has weight 0, as only differences count
    lambdas = penalties(x, y, weights, 3, 0.99)
    (alone,) = elastic_net_path(x, y, weights, 3, l1_ratio=0.99, path=lambdas[15:16], max_steps=5000)
    np.testing.assert_allclose(path[15].weights, alone.weights, atol=1e-3)


def test_without_columns_that_tell_anything_the_intercept_is_the_class_share() -> None:
    y = np.array([0, 0, 0, 1])
    (layer,) = elastic_net_path(
        np.zeros((4, 2)), y, np.ones(4), 2, l1_ratio=0.99, path=np.array([0.1]), tolerance=1e-9, max_steps=5000
    )
    share = np.exp(layer.intercept) / np.exp(layer.intercept).sum()
    np.testing.assert_allclose(share, [0.75, 0.25], atol=1e-4)
    assert layer.n_concepts_used == 0
