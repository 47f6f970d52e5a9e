from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score

from annotation.trust.thresholds import ThresholdMethod, ThresholdOptions, best_cut, fit_thresholds, threshold_votes
from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import ConfigurationError

N = 200
IDS = [f"i{i}" for i in range(N)]
VOCABULARY = Vocabulary.of([Concept("a", "a"), Concept("b", "b")])
TRUTH = np.random.default_rng(0).integers(0, 2, (N, 2))


def scores() -> pd.DataFrame:
    value = TRUTH * (0.4, 4.0) + np.random.default_rng(1).normal(0, (0.05, 0.5), (N, 2))
    return pd.DataFrame(
        {"image_id": np.repeat(IDS, 2), "concept_id": np.tile(["a", "b"], N), "similarity": value.ravel()}
    )


def judgements(n_images: int = N) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image_id": np.repeat(IDS[:n_images], 2),
            "concept_id": np.tile(["a", "b"], n_images),
            "witness": "vlm",
            "witness_model": "m",
            "state": np.where(TRUTH[:n_images].ravel() > 0, "present", "absent"),
            "probability": np.nan,
        }
    )


@pytest.mark.parametrize("method", ["otsu", "judgements"])
def test_each_concept_gets_the_cut_between_its_own_modes(method: str) -> None:
    found = fit_thresholds(scores(), judgements(), ThresholdOptions(method=ThresholdMethod(method)))
    assert found["concept_id"].tolist() == ["a", "b"]
    assert found["method"].tolist() == [method] * 2
    above = scores()["similarity"].to_numpy().reshape(N, 2) > found["threshold"].to_numpy()
    assert (above == TRUTH).mean(0).min() > 0.97


def test_fixed_is_one_number_for_all() -> None:
    found = fit_thresholds(scores(), judgements(), ThresholdOptions(method=ThresholdMethod.FIXED, fixed=0.45))
    assert set(found["threshold"]) == {0.45}


def test_fixed_without_a_number_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="expects a number"):
        fit_thresholds(scores(), judgements(), ThresholdOptions(method=ThresholdMethod.FIXED))


def test_too_few_judgements_fall_back_to_otsu_and_say_so() -> None:
    found = fit_thresholds(scores(), judgements(6), ThresholdOptions(method=ThresholdMethod.JUDGEMENTS))
    assert set(found["method"]) == {"otsu"}


def test_the_band_holds_the_asked_share_of_images() -> None:
    found = fit_thresholds(scores(), judgements(), ThresholdOptions(abstain_fraction=0.2))
    votes = threshold_votes(scores(), found, IDS, VOCABULARY)
    np.testing.assert_allclose((votes.weight == 0).mean(0), 0.2, atol=0.01)
    spoken = votes.weight > 0
    assert (votes.value == TRUTH)[spoken].mean() > 0.98


def test_constant_scores_have_a_threshold_and_no_crash() -> None:
    found = fit_thresholds(scores().assign(similarity=0.3), judgements(), ThresholdOptions())
    np.testing.assert_allclose(found["threshold"], 0.3)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(5, 60))
def test_best_cut_has_the_greatest_balanced_accuracy(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    score, value = rng.normal(size=n).round(1), rng.integers(0, 2, n)
    value[:2] = (0, 1)
    if np.ptp(score) == 0:
        return
    cut = best_cut(score, value.astype(np.float32), np.ones(n, np.float32))
    candidates = (np.unique(score)[1:] + np.unique(score)[:-1]) / 2
    best = max(balanced_accuracy_score(value, score > c) for c in candidates)
    assert balanced_accuracy_score(value, score > cut) == pytest.approx(best)
