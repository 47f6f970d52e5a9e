"""Cuts of alignment scores: which rule they follow, how right their calls are, and what few answers may change."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from annotation.trust.cuts import threshold_votes
from annotation.trust.expert_cells import expert_cells
from annotation.trust.thresholds import ThresholdMethod, ThresholdOptions, fit_thresholds
from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import ConfigurationError

N = 600
IDS = [f"i{i:04d}" for i in range(N)]
VOCABULARY = Vocabulary.of([Concept("a", "a"), Concept("b", "b")])
TRUTH = np.random.default_rng(0).random((N, 2)) < (0.5, 0.3)


def scores(shift: float = 0.0, spread: float = 0.25) -> pd.DataFrame:
    """Two concepts of other scales; `spread` 0.5 leaves the two modes overlapping."""
    value = TRUTH + shift + np.random.default_rng(1).normal(0, spread, (N, 2))
    return pd.DataFrame(
        {
            "image_id": np.repeat(IDS, 2),
            "concept_id": np.tile(["a", "b"], N),
            "similarity": (value * (0.4, 4.0)).ravel(),
            "probability": np.nan,
        }
    )


def judged(answers: np.ndarray, witness: str, rows: slice = slice(None)) -> pd.DataFrame:
    ids = IDS[rows]
    return pd.DataFrame(
        {
            "image_id": np.repeat(ids, 2),
            "concept_id": np.tile(["a", "b"], len(ids)),
            "witness": witness,
            "witness_model": "m",
            "state": np.where(answers[rows].ravel(), "present", "absent"),
            "probability": np.nan,
            "evidence": None,
        }
    )


def vlm(sensitivity: float = 0.9, specificity: float = 0.75) -> pd.DataFrame:
    luck = np.random.default_rng(2).random((N, 2))
    return judged(np.where(TRUTH, luck < sensitivity, luck > specificity), "vlm")


def options(method: str, **more: float) -> ThresholdOptions:
    return ThresholdOptions(method=ThresholdMethod(method), **more)


def values(cuts_scores: pd.DataFrame) -> np.ndarray:
    return cuts_scores["similarity"].to_numpy().reshape(N, 2)


def called(found: object, table: pd.DataFrame) -> tuple[float, float, float]:
    """(precision, npv, coverage) of the votes that follow."""
    votes = threshold_votes(table, found, IDS, VOCABULARY)  # type: ignore[arg-type]
    said = votes.weight > 0
    present, absent = said & (votes.value > 0.5), said & (votes.value < 0.5)
    return float(TRUTH[present].mean()), float(1 - TRUTH[absent].mean()), float(said.mean())


def test_otsu_cuts_between_the_modes_of_each_concept() -> None:
    found = fit_thresholds(vlm(), scores(), VOCABULARY, options("otsu")).table
    assert found["concept_id"].tolist() == ["a", "b"]
    assert set(found["method"]) == {"otsu"}
    assert ((values(scores()) > found["threshold"].to_numpy()) == TRUTH).mean(0).min() > 0.95


def test_fixed_is_one_number_for_all() -> None:
    found = fit_thresholds(vlm(), scores(), VOCABULARY, options("fixed", fixed=0.45)).table
    assert set(found["threshold"]) == {0.45}


def test_fixed_without_a_number_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="expects a number"):
        fit_thresholds(vlm(), scores(), VOCABULARY, options("fixed"))


def test_the_band_of_the_papers_rule_holds_the_asked_share_of_images() -> None:
    found = fit_thresholds(vlm(), scores(), VOCABULARY, options("otsu", abstain_fraction=0.2))
    votes = threshold_votes(scores(), found, IDS, VOCABULARY)
    np.testing.assert_allclose((votes.weight == 0).mean(0), 0.2, atol=0.01)
    np.testing.assert_allclose(found.table["coverage"], 0.8, atol=0.01)


def test_constant_scores_have_a_threshold_and_no_crash() -> None:
    found = fit_thresholds(vlm(), scores().assign(similarity=0.3), VOCABULARY, options("otsu")).table
    np.testing.assert_allclose(found["threshold"], 0.3)


def test_agreement_makes_up_for_the_judges_false_alarms() -> None:
    """A judge that calls a quarter of the absent present would, taken at its word, pull the cut down."""
    found = fit_thresholds(vlm(), scores(spread=0.4), VOCABULARY, options("agreement"))
    assert set(found.table["method"]) == {"agreement"}
    assert found.table["precision"].isna().all()
    precision, npv, coverage = called(found, scores(spread=0.4))
    assert min(precision, npv) > 0.87
    assert coverage > 0.7


def test_a_wished_precision_is_had_and_costs_coverage() -> None:
    strict = fit_thresholds(vlm(), scores(spread=0.5), VOCABULARY, options("agreement", min_precision=0.98))
    loose = fit_thresholds(vlm(), scores(spread=0.5), VOCABULARY, options("agreement", min_precision=0.8))
    assert called(strict, scores(spread=0.5))[0] > called(loose, scores(spread=0.5))[0] + 0.05
    assert (strict.table["abstain_high"] > loose.table["abstain_high"]).all()


def misled() -> pd.DataFrame:
    """A judge that follows the score, not the truth: only an expert can know that it is too generous."""
    return judged(values(scores(spread=0.3)) > np.array([0.4, 4.0]) * 0.1, "vlm")


def test_audited_answers_correct_what_witnesses_agree_on_wrongly() -> None:
    table = scores(spread=0.3)
    ledger = pd.concat([misled(), judged(TRUTH, "expert", slice(0, 150))])
    cells = expert_cells(ledger, None, VOCABULARY)
    agreed = fit_thresholds(ledger, table, VOCABULARY, options("agreement"))
    audited = fit_thresholds(ledger, table, VOCABULARY, options("audited"), cells=cells)
    assert audited.table["method"].tolist() == ["audited", "audited"]
    assert audited.table["n_audited"].tolist() == [150, 150]
    assert called(audited, table)[0] > max(0.86, called(agreed, table)[0] + 0.05)
    told = audited.table["precision"].dropna()
    assert (audited.table["precision_low"].dropna() < told).all()
    assert abs(told.mean() - called(audited, table)[0]) < 0.08


def test_an_image_is_judged_by_a_cut_that_its_answer_had_no_part_in() -> None:
    def held_out(answers: np.ndarray) -> pd.DataFrame:
        ledger = pd.concat([misled(), judged(answers, "expert", slice(0, 40))])
        cells = expert_cells(ledger, None, VOCABULARY)
        found = fit_thresholds(ledger, scores(), VOCABULARY, options("audited"), cells=cells)
        return found.held_out.merge(cells[["image_id", "fold"]].drop_duplicates(), on="image_id")

    other = TRUTH.copy()
    before = held_out(other)
    mine = before.loc[before["image_id"] == IDS[0], "fold"].iloc[0]
    flipped = before.loc[before["fold"] == mine, "image_id"].unique()
    other[[IDS.index(i) for i in flipped]] ^= True
    after = held_out(other)
    same, changed = before["fold"] == mine, before["fold"] != mine
    pd.testing.assert_frame_equal(before[same], after[same])
    assert not np.allclose(before.loc[changed, "threshold"], after.loc[changed, "threshold"])


def test_one_odd_answer_moves_a_cut_little_and_says_whose_cells_it_comes_from() -> None:
    odd = judged(~TRUTH, "expert", slice(0, 1)).head(1)
    cells = expert_cells(odd, None, VOCABULARY)
    plain = fit_thresholds(vlm(), scores(), VOCABULARY, options("agreement")).table
    moved = fit_thresholds(vlm(), scores(), VOCABULARY, options("audited"), cells=cells).table
    assert set(moved["method"]) == {"audited (pooled)"}
    assert (np.abs(moved["threshold"] - plain["threshold"]) / np.array([0.4, 4.0])).max() < 0.2


def test_without_any_other_witness_the_score_parts_itself_and_says_so() -> None:
    found = fit_thresholds(vlm().iloc[:0], scores(), VOCABULARY, options("audited")).table
    assert set(found["method"]) == {"otsu"}
    assert found[["expected_precision", "precision"]].isna().all(axis=None)


def test_a_score_that_says_nothing_never_votes() -> None:
    noise = scores().assign(similarity=0.5)
    votes = threshold_votes(noise, fit_thresholds(vlm(), noise, VOCABULARY, options("agreement")), IDS, VOCABULARY)
    assert not votes.weight.any()


def test_the_test_splits_scores_have_no_part_in_a_cut() -> None:
    moved = scores()
    moved.loc[moved["image_id"].isin(IDS[400:]), "similarity"] += 5
    for method in ("otsu", "agreement"):
        one, other = (
            fit_thresholds(vlm(), table, VOCABULARY, options(method), learn_from=IDS[:400]).table
            for table in (scores(), moved)
        )
        pd.testing.assert_frame_equal(one, other)
