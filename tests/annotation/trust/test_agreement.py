"""Statistics against scikit-learn, SciPy and simulation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score, precision_score, recall_score, roc_auc_score

from annotation.trust.agreement import agreement, auroc_interval, kappa_interval, proportion, witness_agreement
from data_contracts.concepts import Concept, Vocabulary


def answers(n: int, seed: int = 0, error_fraction: float = 0.2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(answers, reference, score)"""
    rng = np.random.default_rng(seed)
    true = (rng.random(n) < 0.35).astype(float)
    said = np.where(rng.random(n) < error_fraction, 1 - true, true)
    return said, true, true + rng.normal(0, 0.8, n)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(30, 300))
def test_numbers_are_scikit_learns(seed: int, n: int) -> None:
    said, true, score = answers(n, seed)
    if len(np.unique(said)) < 2 or len(np.unique(true)) < 2:
        return
    found = agreement(said, true, score)
    assert found.kappa.value == pytest.approx(cohen_kappa_score(said, true))
    assert found.sensitivity.value == pytest.approx(recall_score(true, said))
    assert found.specificity.value == pytest.approx(recall_score(true, said, pos_label=0))
    assert found.ppv.value == pytest.approx(precision_score(true, said))
    assert found.npv.value == pytest.approx(precision_score(true, said, pos_label=0))
    assert found.auroc.value == pytest.approx(roc_auc_score(true, score))
    assert (found.n, found.prevalence) == (n, pytest.approx(true.mean()))


@given(st.integers(0, 50), st.integers(1, 50))
def test_proportions_have_scipys_wilson_interval(hits: int, more: int) -> None:
    found = proportion(hits, hits + more)
    expected = binomtest(hits, hits + more).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_kappas_interval_covers_the_true_kappa_as_often_as_it_says() -> None:
    said, true, _ = answers(200_000, error_fraction=0.15)
    population = cohen_kappa_score(said, true)
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        rows = rng.integers(0, len(said), 150)
        found = agreement(said[rows], true[rows]).kappa
        covered += found.low <= population <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_aurocs_interval_covers_the_true_area_about_as_often_as_it_says() -> None:
    _, true, score = answers(100_000)
    population = roc_auc_score(true, score)
    rng = np.random.default_rng(1)
    found = [auroc_interval(score[rows], true[rows]) for rows in rng.integers(0, len(true), (300, 120))]
    assert 0.91 <= np.mean([i.low <= population <= i.high for i in found]) <= 0.99


def test_weights_undo_a_biased_draw_and_widen_the_interval() -> None:
    said, true, score = answers(40_000)
    rng = np.random.default_rng(2)
    chance = np.where(said > 0, 0.2, 0.02)
    drawn = rng.random(len(said)) < chance
    weighted = agreement(said[drawn], true[drawn], score[drawn], 1 / chance[drawn])
    assert weighted.sensitivity.value == pytest.approx(agreement(said, true).sensitivity.value, abs=0.04)
    assert weighted.prevalence == pytest.approx(true.mean(), abs=0.03)
    plain = agreement(said[drawn], true[drawn], score[drawn])
    assert abs(plain.prevalence - true.mean()) > 0.1
    assert weighted.kappa.high - weighted.kappa.low > plain.kappa.high - plain.kappa.low


def test_gaps_on_either_side_are_left_out() -> None:
    said = np.array([1, 0, np.nan, 1, 0])
    true = np.array([1, 0, 1, np.nan, 1])
    found = agreement(said, true)
    assert found.n == 3
    assert found.sensitivity.value == pytest.approx(0.5)


@pytest.mark.parametrize("true", [np.zeros(5), np.ones(5), np.full(5, np.nan), np.zeros(0)])
def test_what_is_undefined_is_not_a_number_and_no_error(true: np.ndarray) -> None:
    found = agreement(true, true)
    assert np.isnan(found.kappa.value)
    assert np.isnan(found.auroc.value)


def test_perfect_agreement_has_no_room_above_one() -> None:
    assert kappa_interval(10, 0, 0, 10).high == 1


VOCABULARY = Vocabulary.of([Concept("a", "a")])


def judged(said: np.ndarray, witness: str, model: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image_id": [f"i{i}" for i in range(len(said))],
            "concept_id": "a",
            "witness": witness,
            "witness_model": model,
            "state": np.select([said == 1, said == 0], ["present", "absent"], "uncertain"),
            "probability": np.nan,
        }
    )


def test_witnesses_are_held_against_the_expert_where_there_is_one() -> None:
    said, true, score = answers(100)
    ledger = pd.concat([judged(said, "vlm", "m"), judged(true, "expert", "dr")])
    alignment = pd.DataFrame(
        {
            "image_id": [f"i{i}" for i in range(100)],
            "concept_id": "a",
            "similarity": score,
            "probability": np.nan,
        }
    )
    table = witness_agreement(ledger, alignment, None, VOCABULARY).set_index("witness")
    table = table[table["reference"] == "expert:dr"]
    assert table.loc["vlm:m", "kappa"] == pytest.approx(cohen_kappa_score(said, true))
    assert table.loc["alignment", "auroc"] == pytest.approx(roc_auc_score(true, score))
    assert np.isnan(table.loc["alignment", "kappa"])


def test_fused_labels_that_the_expert_decided_do_not_count() -> None:
    said, true, _ = answers(60)
    ledger = pd.concat([judged(said, "vlm", "m"), judged(true, "expert", "dr")])
    labels = pd.DataFrame(
        {
            "image_id": [f"i{i}" for i in range(60)],
            "concept_id": "a",
            "present": pd.array(true > 0, "boolean"),
            "probability": true,
            "decided_by": ["expert"] * 50 + ["vlm"] * 10,
        }
    )
    table = witness_agreement(ledger, None, labels, VOCABULARY).set_index(["witness", "reference"])
    assert table.loc[("fused", "expert:dr"), "n"] == 10


def test_an_answer_sheet_can_be_the_reference() -> None:
    said, true, _ = answers(60)
    table = witness_agreement(
        judged(said, "vlm", "m"), None, None, VOCABULARY, reference=judged(true, "expert", "sheet")
    )
    assert table["reference"].tolist() == ["reference"]
    assert table["kappa"].iloc[0] == pytest.approx(cohen_kappa_score(said, true))


def test_without_people_machines_are_compared_with_each_other() -> None:
    said, true, _ = answers(60)
    table = witness_agreement(pd.concat([judged(said, "vlm", "m"), judged(true, "vlm", "n")]), None, None, VOCABULARY)
    assert table[["witness", "reference"]].to_numpy().tolist() == [["vlm:n", "vlm:m"]]


def test_every_pair_stands_once_and_the_more_trusted_is_the_reference() -> None:
    said, true, _ = answers(60)
    ledger = pd.concat([judged(said, "vlm", "m"), judged(true, "given", "csv"), judged(true, "expert", "dr")])
    table = witness_agreement(ledger, None, None, VOCABULARY)
    assert table[["reference", "witness"]].to_numpy().tolist() == [
        ["expert:dr", "given:csv"],
        ["expert:dr", "vlm:m"],
        ["given:csv", "vlm:m"],
    ]


def test_a_constant_answer_explains_its_kappa_of_zero() -> None:
    _, true, _ = answers(60)
    table = witness_agreement(
        pd.concat([judged(np.zeros(60), "vlm", "m"), judged(true, "expert", "dr")]), None, None, VOCABULARY
    )
    row = table.iloc[0]
    assert (row["kappa"], row["said_fraction"]) == (0, 0)
    assert row["pabak"] == pytest.approx(2 * (true == 0).mean() - 1)
    assert "absent of every cell" in row["note"]
    rare = np.r_[1.0, np.zeros(59)]
    other = np.r_[0.0, 1.0, np.zeros(58)]
    found = witness_agreement(
        pd.concat([judged(rare, "vlm", "m"), judged(other, "expert", "dr")]), None, None, VOCABULARY
    )
    assert "rare" in found.iloc[0]["note"]
