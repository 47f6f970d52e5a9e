from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from annotation.alignment.adapt import _Ridge, cross_fit, fold_of
from annotation.alignment.projections import projections, text_projection
from annotation.votes import Votes


def noisy_problem(n: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of three hidden factors, six true concepts of them, and votes with 20-30 % errors."""
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((n, 3))
    features = factors @ rng.standard_normal((3, 40)) + rng.standard_normal((n, 40))
    truth = (factors @ rng.standard_normal((3, 6)) > 0).astype(float)
    wrong = rng.random(truth.shape) < rng.uniform(0.2, 0.3, 6)
    return features, truth, np.where(wrong, 1 - truth, truth)


def full_votes(values: np.ndarray) -> Votes:
    return Votes(values.astype(np.float32), np.ones(values.shape, np.float32))


def mean_auroc(truth: np.ndarray, score: np.ndarray) -> float:
    return float(np.mean([roc_auc_score(truth[:, k], score[:, k]) for k in range(truth.shape[1])]))


def folds_of(n: int) -> np.ndarray:
    return fold_of(map(str, range(n)), 5, 0)


def test_held_out_scores_see_through_the_noise_of_the_votes() -> None:
    features, truth, votes = noisy_problem()
    fit = cross_fit(features, full_votes(votes), folds_of(600), 5)
    assert mean_auroc(truth, votes) < 0.8
    assert mean_auroc(truth, fit.held_out) > 0.95


def test_votes_without_any_signal_teach_nothing() -> None:
    features, truth, _ = noisy_problem()
    votes = np.random.default_rng(1).integers(0, 2, truth.shape)
    folds = folds_of(600)
    fit = cross_fit(features, full_votes(votes), folds, 5)
    probability = fit.probability(fit.held_out[folds == 0], 0)
    assert abs(mean_auroc(votes, fit.held_out) - 0.5) < 0.06
    assert np.abs(probability - 0.5).max() < 0.2


def test_no_image_is_scored_by_a_head_that_saw_its_judgement() -> None:
    features, _, votes = noisy_problem(300)
    folds = folds_of(300)
    changed = votes.copy()
    changed[folds == 2] = 1 - changed[folds == 2]
    one = cross_fit(features, full_votes(votes), folds, 5)
    other = cross_fit(features, full_votes(changed), folds, 5)
    np.testing.assert_array_equal(one.held_out[folds == 2], other.held_out[folds == 2])
    np.testing.assert_array_equal(one.calibrations[2].shape, (2, 6))
    assert not np.allclose(one.held_out[folds == 1], other.held_out[folds == 1])


def test_probabilities_are_calibrated_to_the_votes() -> None:
    features, _, votes = noisy_problem(2000)
    folds = folds_of(2000)
    fit = cross_fit(features, full_votes(votes), folds, 5)
    probability = np.zeros_like(fit.held_out)
    for fold in range(5):
        probability[folds == fold] = fit.probability(fit.held_out[folds == fold], fold)
    for low in (0.2, 0.4, 0.6):
        inside = (probability >= low) & (probability < low + 0.2)
        assert votes[inside].mean() == pytest.approx(probability[inside].mean(), abs=0.06)


def test_a_concept_nobody_judged_gets_no_probability() -> None:
    features, _, votes = noisy_problem(200)
    weight = np.ones(votes.shape, np.float32)
    weight[:, 3] = 0
    fit = cross_fit(features, Votes(votes.astype(np.float32), weight), folds_of(200), 5)
    probability = fit.probability(fit.held_out, 0)
    assert np.isnan(probability[:, 3]).all()
    assert np.isfinite(probability[:, 2]).all()


def test_full_rank_fit_is_scikit_learns_ridge() -> None:
    features, _, votes = noisy_problem(120)
    fit = _Ridge(features, votes.astype(float), np.ones(votes.shape))
    reference = Ridge(alpha=0.7 * 120).fit(features, votes)
    np.testing.assert_allclose(fit.solve(0.7), reference.coef_.T, rtol=1e-6, atol=1e-9)


def test_weighted_fit_approaches_scikit_learns_weighted_ridge() -> None:
    features, _, votes = noisy_problem(300)
    weight = np.random.default_rng(3).uniform(0.5, 1, votes.shape)
    fit = _Ridge(features, votes.astype(float), weight).solve(1.0)
    for k in range(votes.shape[1]):
        target = votes[:, k] - np.average(votes[:, k], weights=weight[:, k])
        reference = Ridge(alpha=300.0, fit_intercept=False)
        reference.fit(features - features.mean(0), target, weight[:, k])
        np.testing.assert_allclose(fit[:, k], reference.coef_, atol=2e-3)


def test_projected_dot_product_is_the_probes_score_up_to_the_shared_part() -> None:
    features, _, votes = noisy_problem(300)
    rng = np.random.default_rng(0)
    text = rng.standard_normal((6, 32))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    probe = cross_fit(features, full_votes(votes), folds_of(300), 5).probes[0]
    heads = projections(probe, text, features, rng.standard_normal((2, 32)))
    embedded = features @ heads.image_weight.T + heads.image_bias
    np.testing.assert_allclose(embedded @ heads.text(text).T, probe(features), atol=1e-8)


def test_text_projection_parts_concepts_that_were_nearly_parallel() -> None:
    rng = np.random.default_rng(0)
    text = np.ones((5, 32)) + 0.3 * rng.standard_normal((5, 32))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    apart = text @ text_projection(text).T
    apart /= np.linalg.norm(apart, axis=1, keepdims=True)
    assert (text @ text.T - np.eye(5)).max() > 0.85
    assert np.abs(apart @ apart.T - np.eye(5)).max() < 0.4


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=50, unique=True), st.integers(2, 9))
def test_folds_depend_on_the_group_alone(groups: list[str], n_folds: int) -> None:
    folds = fold_of(groups, n_folds, 7)
    assert folds.min() >= 0
    assert folds.max() < n_folds
    np.testing.assert_array_equal(fold_of(groups[::-1], n_folds, 7)[::-1], folds)


def test_everything_in_one_group_leaves_heads_that_know_nothing() -> None:
    features, _, votes = noisy_problem(50)
    folds = np.zeros(50, np.int64)
    fit = cross_fit(features, full_votes(votes), folds, 5)
    assert fit.probes[0].n_images == 0
    assert not fit.held_out.any()
    assert np.isnan(fit.probability(fit.held_out, 0)).all()
