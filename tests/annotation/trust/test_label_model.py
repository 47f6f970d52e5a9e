"""The label model recovers what it was generated from."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from annotation.trust.label_model import (
    MAX_SCORE_LOG_ODDS,
    TRUSTED_RATE,
    Evidence,
    LabelModel,
    fit_label_model,
)


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
    return expit(model.log_odds(evidence))


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


def weakly_scored(separation: float, seed: int) -> tuple[np.ndarray, Evidence]:
    """A judge who is right on 97 % of the cells, and a score that knows little."""
    rng = np.random.default_rng(seed)
    truth = rng.random((1000, 4)) < (0.3, 0.5, 0.2, 0.1)
    value = np.where(rng.random(truth.shape) < 0.97, truth, ~truth)[None].astype(np.float32)
    score = separation * truth + rng.standard_normal(truth.shape)
    return truth, Evidence(score, value, np.ones_like(value), np.full(truth.shape, np.nan))


@pytest.mark.parametrize("separation", [0.3, 1.0, 1.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_good_judge_keeps_its_kappa_beside_a_weak_score(separation: float, seed: int) -> None:
    truth, evidence = weakly_scored(separation, seed)
    fused = posterior(fit_label_model(evidence), evidence) > 0.5
    for k in range(4):
        own = cohen_kappa_score(truth[:, k], evidence.value[0, :, k])
        assert cohen_kappa_score(truth[:, k], fused[:, k]) >= own - 0.01


def test_a_good_judge_gains_from_a_good_score() -> None:
    truth, evidence = weakly_scored(3.0, 0)
    fused = posterior(fit_label_model(evidence), evidence) > 0.5
    assert (fused == truth).mean() > (evidence.value[0] == truth).mean() + 0.005


def test_a_judge_is_trusted_until_most_concepts_or_an_expert_speak_against_it() -> None:
    truth, evidence = weakly_scored(1.0, 0)
    np.testing.assert_array_equal(fit_label_model(evidence).sensitivity, TRUSTED_RATE)
    wrong = np.where(np.random.default_rng(1).random(truth.shape[0]) < 0.35, ~truth[:, 1], truth[:, 1])
    value = evidence.value.copy()
    value[0, :, 1] = wrong
    decided = np.full(truth.shape, np.nan)
    decided[:60] = truth[:60]
    model = fit_label_model(evidence._replace(value=value, decided=decided))
    assert model.sensitivity[0, 1] < 0.9
    assert model.sensitivity[0, 3] == TRUSTED_RATE


def test_experts_on_several_concepts_shake_trust_in_all() -> None:
    rng = np.random.default_rng(4)
    truth = rng.random((300, 8)) < 0.3
    value = np.where(rng.random(truth.shape) < 0.7, truth, ~truth)[None].astype(np.float32)
    score = 0.5 * truth + rng.standard_normal(truth.shape)
    decided = np.full(truth.shape, np.nan)
    blind = Evidence(score, value, np.ones_like(value), decided.copy())
    decided[:30, :4] = truth[:30, :4]
    np.testing.assert_array_equal(fit_label_model(blind).sensitivity, TRUSTED_RATE)
    assert (fit_label_model(blind._replace(decided=decided)).sensitivity < 0.95).all()


def correlated(same_luck: float, seed: int = 0, n_settled: int = 0) -> tuple[np.ndarray, Evidence]:
    """Two judges; on `same_luck` of the cells the second errs exactly where the first does."""
    rng = np.random.default_rng(seed)
    truth = rng.random((1500, 4)) < (0.3, 0.5, 0.2, 0.4)
    first = rng.random(truth.shape)
    second = np.where(rng.random(truth.shape) < same_luck, first, rng.random(truth.shape))
    value = np.array([np.where(truth, luck < 0.85, luck > 0.75) for luck in (first, second)], np.float32)
    decided = np.full(truth.shape, np.nan)
    decided[:n_settled] = truth[:n_settled]
    return truth, Evidence(2.5 * truth + rng.standard_normal(truth.shape), value, np.ones_like(value), decided)


def test_witnesses_that_err_together_do_not_count_twice() -> None:
    truth, evidence = correlated(0.7)
    model = fit_label_model(evidence)
    assert 0.35 < model.dependence[0, 1] < 0.85
    np.testing.assert_allclose(model.sensitivity, 0.85, atol=0.06)
    alone = evidence._replace(value=evidence.value[:1], weight=evidence.weight[:1])
    both, one = posterior(model, evidence), posterior(fit_label_model(alone), alone)
    for k in range(4):
        assert roc_auc_score(truth[:, k], both[:, k]) > roc_auc_score(truth[:, k], one[:, k]) - 0.01
    assert abs(both.mean() - truth.mean()) < 0.03


def test_independent_witnesses_are_hardly_discounted() -> None:
    _, evidence = correlated(0.0)
    assert fit_label_model(evidence).dependence[0, 1] < 0.2
    silent = evidence._replace(score=np.full_like(evidence.score, np.nan))
    assert fit_label_model(silent).dependence[0, 1] == 0


def test_experts_show_dependence_where_there_is_no_score() -> None:
    _, evidence = correlated(0.7, n_settled=200)
    model = fit_label_model(evidence._replace(score=np.full_like(evidence.score, np.nan)))
    assert 0.5 < model.dependence[0, 1] < 0.9


def test_experts_correct_errors_that_score_and_votes_share() -> None:
    rng = np.random.default_rng(2)
    truth = rng.random((3000, 6)) < 0.3
    shared = rng.standard_normal(truth.shape) * 1.2
    score = 2 * truth + shared + 0.4 * rng.standard_normal(truth.shape)
    value = (2 * truth + 2 * shared + rng.standard_normal(truth.shape) > 0.5)[None].astype(np.float32)
    blind = Evidence(score, value, np.ones_like(value), np.full(truth.shape, np.nan))
    decided = blind.decided.copy()
    decided[:30] = truth[:30]

    def gap(evidence: Evidence) -> float:
        fused = posterior(fit_label_model(evidence), evidence)[30:]
        bins = np.minimum((fused * 10).astype(int), 9)
        return sum(abs((fused - truth[30:])[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins))

    assert gap(blind) > 0.1
    assert gap(blind._replace(decided=decided)) < 0.6 * gap(blind)


def test_half_hearted_answers_are_no_half_lies() -> None:
    truth, evidence = simulated(sensitivity=(0.95,), specificity=(0.95,))
    decided = np.where(np.arange(len(truth))[:, None] < 1000, truth, np.nan)
    soft = evidence._replace(value=0.1 + 0.8 * evidence.value, decided=decided)
    np.testing.assert_allclose(fit_label_model(soft).sensitivity, 0.95, atol=0.03)


def test_no_image_at_all_makes_a_model_that_says_nothing() -> None:
    empty = Evidence(np.zeros((0, 2)), np.zeros((1, 0, 2)), np.zeros((1, 0, 2)), np.zeros((0, 2)))
    assert posterior(fit_label_model(empty), empty).shape == (0, 2)
