"""Statistics against scikit-learn, published examples and by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from annotation.trust.agreement import kappa_interval
from annotation.trust.experts import (
    ALL_CONCEPTS,
    cohen_kappa,
    disputed_cells,
    expert_agreement,
    krippendorff_alpha,
)
from data_contracts.concepts import Concept, Vocabulary

NAN = float("nan")
VOCABULARY = Vocabulary.of(
    [Concept("red", "red"), *(Concept(f"size-{s}", f"size {s}", group="size") for s in ("small", "middle", "big"))]
)
# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C: 4 observers, 12 units.
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)


@pytest.mark.parametrize(("level", "expected"), [("nominal", 0.743), ("ordinal", 0.815)])
def test_alpha_is_krippendorffs_published_one(level: str, expected: float) -> None:
    found = krippendorff_alpha(PUBLISHED, level)  # type: ignore[arg-type]
    assert found.value == pytest.approx(expected, abs=5e-4)
    assert found.low < found.value < found.high


@pytest.mark.parametrize("ratings", [np.full((2, 5), NAN), np.ones((2, 5)), np.array([[1, NAN], [NAN, 0]])])
def test_alpha_is_undefined_without_variation_or_pairs(ratings: np.ndarray) -> None:
    assert np.isnan(krippendorff_alpha(ratings).value)


def test_kappas_interval_is_that_of_the_two_by_two_table() -> None:
    first = np.r_[np.ones(30), np.zeros(50)]
    second = np.r_[np.ones(22), np.zeros(8), np.ones(6), np.zeros(44)]
    found, expected = cohen_kappa(first, second), kappa_interval(22, 8, 6, 44)
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))


@pytest.mark.parametrize("weights", ["linear", "quadratic"])
def test_weighted_kappas_interval_covers_the_truth(weights: str) -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 4, 50_000)
    second = np.clip(first + rng.choice([-1, 0, 0, 1, 2], 50_000), 0, 3)
    true = cohen_kappa_score(first, second, weights=weights)
    found = [cohen_kappa(first[r], second[r], weights=weights) for r in rng.integers(0, 50_000, (300, 120))]  # type: ignore[arg-type]
    assert 0.91 <= np.mean([f.low <= true <= f.high for f in found]) <= 0.985


def judged(name: str, states: dict[tuple[str, str], str]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image_id": [image for image, _ in states],
            "concept_id": [concept for _, concept in states],
            "witness": "expert",
            "witness_model": name,
            "state": list(states.values()),
        }
    )


def test_experts_who_disagree_are_measured_and_their_cells_listed() -> None:
    a = judged(
        "a", {("i", "red"): "present", ("j", "red"): "absent", ("k", "red"): "present", ("l", "red"): "uncertain"}
    )
    b = judged("b", {("i", "red"): "present", ("j", "red"): "absent", ("k", "red"): "absent", ("l", "red"): "present"})
    table = expert_agreement(pd.concat([a, b]), VOCABULARY).set_index(["subject", "statistic"])
    row = table.loc[("red", "cohen_kappa")]
    assert (row["first"], row["second"], row["n"]) == ("a", "b", 3)
    assert row["value"] == pytest.approx(cohen_kappa_score([1, 0, 1], [1, 0, 0]))
    assert table.loc[(ALL_CONCEPTS, "krippendorff_alpha"), "n"] == 3
    disputed = disputed_cells(pd.concat([a, b]))
    assert disputed.to_numpy().tolist() == [["k", "red", "a: present; b: absent"]]


def test_an_ordinal_group_is_compared_by_weighted_kappa() -> None:
    chosen_a, chosen_b = [0, 0, 1, 2, 2, 1], [0, 1, 1, 2, 1, 1]
    sizes = ["size-small", "size-middle", "size-big"]
    both = [
        judged(name, {(f"i{i}", sizes[c]): "present" for i, c in enumerate(chosen)})
        for name, chosen in (("a", chosen_a), ("b", chosen_b))
    ]
    table = expert_agreement(pd.concat(both), VOCABULARY, {"size": "quadratic"}).set_index(["subject", "statistic"])
    expected = cohen_kappa_score(chosen_a, chosen_b, weights="quadratic")
    assert table.loc[("group: size", "cohen_kappa_quadratic"), "value"] == pytest.approx(expected)


def test_one_expert_has_no_one_to_agree_with() -> None:
    assert expert_agreement(judged("a", {("i", "red"): "present"}), VOCABULARY).empty
