"""The label model recovers what it was generated from."""

from __future__ import annotations

import numpy as np
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from annotation.trust.label_model import MAX_SCORE_LOG_ODDS, Evidence, LabelModel, fit_label_model


def simulated(
    n: int = 4000, sensitivity: tuple[float, ...] = (0.9,), specificity: tuple[float, ...] = (0.7,), seed: int = 0
) -> tuple[np.ndarray, Evidence]:
    """Truth (n, 2) and evidence: a score with separation and one vote per witness."""
    rng = np.random.default_rng(seed)
    truth = rng.random((n, 2)) < (0.3, 0.5)
    score = truth * 2.5 + rng.standard_normal((n, 2))
    votes = [
        np.where(truth, rng.random((n, 2)) < se, rng.random((n, 2)) > sp)
        for se, sp in zip(sensitivity, specificity, strict=True)
    ]
    value = np.array(votes, np.float32)
    return truth, Evidence(score, value, np.ones_like(value), np.full((n, 2), np.nan))


def posterior(model: LabelModel, evidence: Evidence) -> np.ndarray:
    return expit(model.prior_log_odds(evidence.score) + model.vote_log_odds(evidence.value, evidence.weight).sum(0))


def test_error_rates_of_one_voter_are_found_with_the_help_of_a_score() -> None:
    truth, evidence = simulated()
    model = fit_label_model(evidence)
    np.testing.assert_allclose(model.sensitivity, 0.9, atol=0.05)
    np.testing.assert_allclose(model.specificity, 0.7, atol=0.05)
    np.testing.assert_allclose(model.prevalence, (0.3, 0.5), atol=0.05)
    fused = posterior(model, evidence)
    for k in range(2):
        assert roc_auc_score(truth[:, k], fused[:, k]) > max(
            roc_auc_score(truth[:, k], evidence.score[:, k]), roc_auc_score(truth[:, k], evidence.value[0, :, k])
        )


def test_posteriors_are_calibrated_against_the_truth() -> None:
    truth, evidence = simulated(8000)
    fused = posterior(fit_label_model(evidence), evidence)
    for low in np.arange(0, 1, 0.2):
        inside = (fused >= low) & (fused < low + 0.2)
        assert abs(truth[inside].mean() - fused[inside].mean()) < 0.08


def test_better_of_two_voters_is_recognised_without_any_score() -> None:
    truth, evidence = simulated(sensitivity=(0.95, 0.8, 0.65), specificity=(0.95, 0.8, 0.65))
    evidence = evidence._replace(score=np.full_like(evidence.score, np.nan))
    model = fit_label_model(evidence)
    assert (np.diff(model.sensitivity, axis=0) < -0.05).all()
    np.testing.assert_allclose(model.sensitivity[:, 1], (0.95, 0.8, 0.65), atol=0.05)
    assert roc_auc_score(truth[:, 1], posterior(model, evidence)[:, 1]) > 0.97


def test_a_voter_that_answers_at_random_gets_no_say() -> None:
    _, evidence = simulated(sensitivity=(0.9, 0.5), specificity=(0.8, 0.5))
    model = fit_label_model(evidence)
    said = model.vote_log_odds(evidence.value, evidence.weight)
    assert np.abs(said[1]).max() < 0.35 < np.abs(said[0]).min()


def test_a_score_that_votes_do_not_follow_gets_no_say() -> None:
    _, evidence = simulated(sensitivity=(0.95, 0.95), specificity=(0.95, 0.95))
    noise = np.random.default_rng(5).standard_normal(evidence.score.shape)
    model = fit_label_model(evidence._replace(score=noise))
    assert model.slope.max() < 0.3


def test_a_single_voter_alone_keeps_the_cautious_prior() -> None:
    _, evidence = simulated(sensitivity=(0.6,), specificity=(0.6,))
    model = fit_label_model(evidence._replace(score=np.full_like(evidence.score, np.nan)))
    np.testing.assert_allclose(model.sensitivity, 0.85)
    np.testing.assert_allclose(model.specificity, 0.8)


def test_settled_cells_teach_a_lone_voters_rates() -> None:
    truth, evidence = simulated(sensitivity=(0.6,), specificity=(0.9,))
    evidence = evidence._replace(score=np.full_like(evidence.score, np.nan), decided=truth.astype(float))
    model = fit_label_model(evidence)
    np.testing.assert_allclose(model.sensitivity, 0.6, atol=0.04)
    np.testing.assert_allclose(model.specificity, 0.9, atol=0.04)


def test_silence_says_nothing_and_a_score_never_says_everything() -> None:
    _, evidence = simulated()
    model = fit_label_model(evidence)
    assert not model.vote_log_odds(evidence.value, 0 * evidence.weight).any()
    assert np.abs(model.prior_log_odds(np.array([[1e9, -1e9]]))).max() == MAX_SCORE_LOG_ODDS


def test_a_score_alone_is_a_soft_threshold_between_its_modes() -> None:
    truth, evidence = simulated()
    alone = Evidence(evidence.score, evidence.value[:0], evidence.weight[:0], evidence.decided)
    fused = posterior(fit_label_model(alone), alone)
    assert ((fused > 0.5) == truth).mean() > 0.85
