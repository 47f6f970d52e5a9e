from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import InputRefused
from model.config import TrainConfig
from model.explain.bootstrap import Resampling
from model.explain.class_rules import ClassRule, distinct, merged, read_class_rules
from model.explain.rule_evidence import (
    Measured,
    class_rules,
    class_summary,
    faithfulness,
    jaccard,
    rules_of,
    seed_table,
)
from model.explain.rule_page import RulePage, rules_page
from model.explain.rules import Literals, holds_on, image_rules, image_terms, without_implied
from model.outputs import Outputs

WORDS = Vocabulary.of([Concept(c, f"{c}-word", group="g" if c in "de" else None) for c in "abcde"])
A, B, C, D, E = range(5)


def outputs_of_literals(concepts: np.ndarray, predicted: np.ndarray, literals: Literals, n_classes: int = 2) -> Outputs:
    """Outputs in which each image's rule for its own class has these literals, and no rule for others."""
    n, k = concepts.shape
    relevance, polarity = np.zeros((n, k, n_classes), np.float32), np.zeros((n, k, n_classes), np.float32)
    relevance[np.arange(n), :, predicted] = np.where(literals.used, 0.9, 0.1)
    polarity[np.arange(n), :, predicted] = np.where(literals.present, 0.9, 0.1)
    truth = np.full((n, n_classes), 0.3, np.float32)
    truth[np.arange(n), predicted] = 0.7
    return Outputs(
        np.eye(n_classes, dtype=np.float32)[predicted], concepts.astype(np.float32), polarity, relevance, truth
    )


@pytest.fixture(scope="module")
def two_reasons() -> Outputs:
    """Class 0 is said when (a ∧ b) or (¬c ∧ d); every rule also names terms that mean nothing."""
    rng = np.random.default_rng(1)
    concepts = (rng.random((2000, 5)) < 0.5).astype(float)
    first = (concepts[:, A] == 1) & (concepts[:, B] == 1)
    second = (concepts[:, C] == 0) & (concepts[:, D] == 1)
    predicted = np.where(first | second, 0, 1)
    used = np.zeros(concepts.shape, bool)
    used[first, A] = used[first, B] = True
    used[second & ~first, C] = used[second & ~first, D] = True
    used[:, E] = True  # a useless term, as it is in each image
    return outputs_of_literals(concepts, predicted, Literals(used, concepts == 1))


def test_an_or_of_short_rules_is_found_and_is_the_network(two_reasons: Outputs) -> None:
    rules = [r for r in read_class_rules(two_reasons, WORDS, ("yes", "no")) if r.class_name == "yes"]
    assert {frozenset(r.literals) for r in rules} == {
        frozenset({("a", True), ("b", True)}),
        frozenset({("c", False), ("d", True)}),
    }
    measured = Measured(
        two_reasons, two_reasons.predicted, WORDS, ("yes", "no"), Resampling(len(two_reasons.predicted))
    )
    summary = class_summary(rules, measured).set_index("class")
    assert summary.at["yes", "n_rules"] == 2
    assert summary.at["yes", "fidelity"] == 1
    assert summary.at["yes", "network_recall"] == 1


def test_at_most_so_many_rules_are_given(two_reasons: Outputs) -> None:
    rules = read_class_rules(two_reasons, WORDS, ("yes", "no"), max_rules_per_class=1)
    assert [r.class_name for r in rules].count("yes") == 1


def test_two_rules_that_differ_in_one_literal_become_one_and_what_is_implied_goes() -> None:
    ab, a_not_b, abc = frozenset({(0, True), (1, True)}), frozenset({(0, True), (1, False)}), None
    abc = ab | {(2, True)}
    assert merged([abc, ab, a_not_b]) == [frozenset({(0, True)})]
    assert merged([ab, frozenset({(0, False), (1, False)})]) == [ab, frozenset({(0, False), (1, False)})]
    four = [frozenset({(0, p), (1, q)}) for p in (True, False) for q in (True, False)]
    assert len(merged(four)) >= 1
    assert all(len(rule) == 1 for rule in merged(four))


def test_merging_never_changes_what_the_rules_say() -> None:
    rng = np.random.default_rng(3)
    worlds = np.array([[bool(n >> k & 1) for k in range(4)] for n in range(16)])
    for _ in range(50):
        rules = [
            frozenset((int(k), bool(rng.random() < 0.5)) for k in np.flatnonzero(rng.random(4) < 0.6)) or
            frozenset({(0, True)})
            for _ in range(6)
        ]  # fmt: skip

        def says(some: list[frozenset[tuple[int, bool]]]) -> np.ndarray:
            return np.array([any(all(world[k] == p for k, p in rule) for rule in some) for world in worlds])

        np.testing.assert_array_equal(says(merged(rules)), says(rules))
        assert len(merged(rules)) <= len(rules) + 1


def test_patterns_are_counted_as_pandas_counts_them() -> None:
    rng = np.random.default_rng(2)
    used, present = rng.random((500, 3)) < 0.6, rng.random((500, 3)) < 0.5
    found = distinct(Literals(used, present))
    frame = pd.DataFrame(np.concatenate([used, used & present], axis=1))
    expected = frame.value_counts()
    assert sorted(found.n.tolist()) == sorted(expected.tolist())
    assert (np.diff(found.n) <= 0).all()
    first = np.concatenate([found.literals.used[0], found.literals.present[0]])
    assert expected[tuple(first)] == found.n[0]


def test_a_class_whose_rules_tell_nothing_has_none_and_the_page_says_so() -> None:
    rng = np.random.default_rng(0)
    concepts, predicted = rng.random((300, 5)), rng.integers(0, 2, 300)
    nothing = Literals(np.zeros((300, 5), bool), np.zeros((300, 5), bool))
    outputs = outputs_of_literals(concepts, predicted, nothing)
    rules = read_class_rules(outputs, WORDS, ("yes", "no"))
    assert rules == []
    page = _page(rules, outputs, predicted)
    assert "No rule can be given. In 100 % of the images that are called yes" in " ".join(page.split())


def test_measures_have_wilson_intervals_and_the_true_fractions(two_reasons: Outputs) -> None:
    rule = ClassRule("yes", (("a", True), ("b", True)))
    y = two_reasons.predicted.copy()
    y[::10] = 1 - y[::10]
    row = class_rules([rule], two_reasons, y, WORDS, ("yes", "no")).iloc[0]
    holds = (two_reasons.concept_probabilities[:, :2] >= 0.5).all(1)
    assert row["support"] == holds.sum()
    assert row["precision"] == pytest.approx((y[holds] == 0).mean())
    assert row["recall"] == pytest.approx(holds[y == 0].mean())
    assert row["fidelity"] == pytest.approx((holds == (two_reasons.predicted == 0)).mean())
    assert row["network_precision"] == 1
    # Wilson's interval by its formula
    n, p, z = holds.sum(), row["precision"], 1.959964
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert row["precision_low"] == pytest.approx(centre - half, abs=1e-5)
    assert row["precision_high"] == pytest.approx(centre + half, abs=1e-5)


def test_patients_widen_the_interval(two_reasons: Outputs) -> None:
    rule = ClassRule("yes", (("a", True),))
    y = two_reasons.predicted
    order = np.argsort(two_reasons.concept_probabilities[:, A], kind="stable")
    patient = np.empty(len(y), int)
    patient[order] = np.arange(len(y)) // 100  # each patient has the concept in all images or in none
    alone, grouped = (
        class_rules([rule], two_reasons, y, WORDS, ("yes", "no"), groups=groups).iloc[0]
        for groups in (None, patient.tolist())
    )
    assert grouped["coverage"] == alone["coverage"]
    assert grouped["coverage_high"] - grouped["coverage_low"] > 3 * (alone["coverage_high"] - alone["coverage_low"])


def test_stability_is_the_likeness_with_the_closest_rule_of_each_other_seed(two_reasons: Outputs) -> None:
    rule = ClassRule("yes", (("a", True), ("b", True)))
    others = {
        1: [ClassRule("yes", (("b", True), ("a", True))), ClassRule("no", (("a", True), ("b", True)))],
        2: [ClassRule("yes", (("a", True), ("b", False))), ClassRule("yes", (("a", True),))],
        3: [],
    }
    row = class_rules([rule], two_reasons, two_reasons.predicted, WORDS, ("yes", "no"), other_seeds=others).iloc[0]
    assert (row["stability_low"], row["stability_high"]) == (0, 1)
    assert row["stability"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert (row["n_seeds"], row["n_seeds_same"]) == (3, 1)
    assert jaccard(frozenset(), frozenset()) == 1
    assert rules_of(seed_table(1, others[1], WORDS)) == others[1]


def test_the_rules_terms_are_given_as_json(two_reasons: Outputs) -> None:
    rule = ClassRule("yes", (("a", True), ("c", False)))
    row = class_rules([rule], two_reasons, two_reasons.predicted, WORDS, ("yes", "no")).iloc[0]
    assert json.loads(row["terms"]) == [
        {"concept_id": "a", "present": True},
        {"concept_id": "c", "present": False},
    ]
    assert row["rule"] == "yes ← a-word ∧ ¬ c-word"


def test_image_rules_of_many_images_are_those_of_each_alone() -> None:
    rng = np.random.default_rng(5)
    concepts = rng.random((60, 5)).astype(np.float32)
    predicted = rng.integers(0, 2, 60)
    literals = Literals(rng.random((60, 5)) < 0.6, rng.random((60, 5)) < 0.5)
    outputs = outputs_of_literals(concepts, predicted, literals)
    table = image_rules(outputs, [str(n) for n in range(60)], WORDS, ("yes", "no"))
    for n, row in enumerate(table.to_dict("records")):
        terms = image_terms(literals.used[n], literals.present[n], concepts[n], WORDS)
        assert json.loads(row["terms"]) == terms
        assert row["length"] == len(terms)
        assert [t["truth"] for t in terms] == sorted(t["truth"] for t in terms)
        body = " ∧ ".join(("" if t["present"] else "¬ ") + f"{t['concept_id']}-word" for t in terms)
        assert row["rule"] == f"{('yes', 'no')[predicted[n]]} ← {body or '(always)'}"
    np.testing.assert_array_equal(table["holds"], holds_on(literals, concepts >= 0.5))


def test_what_an_exclusive_attribute_implies_is_left_out_of_the_text_only() -> None:
    used, present = np.array([[False, False, False, True, True]]), np.array([[False, False, False, True, False]])
    assert without_implied(Literals(used, present), WORDS).used.tolist() == [[False, False, False, True, False]]
    none_present = np.zeros((1, 5), bool)
    assert without_implied(Literals(used, none_present), WORDS).used.tolist() == used.tolist()


def test_fidelity_of_the_logic_layer_is_printed_with_what_it_means(two_reasons: Outputs) -> None:
    disagreeing = two_reasons._replace(rule_truth=two_reasons.rule_truth[:, ::-1].copy())
    measured = Measured(disagreeing, disagreeing.predicted, WORDS, ("yes", "no"), Resampling(2000))
    found = faithfulness(measured)
    assert found.rule_agrees.value == 0
    assert found.network_accuracy.value == 1
    rules = read_class_rules(disagreeing, WORDS, ("yes", "no"))
    text = " ".join(_page(rules, disagreeing, disagreeing.predicted).split())
    assert "names the classifier's class in 0 % (0–0) of the images" in text
    assert "reading of the network, not the way it decides" in text
    assert "yes if a-word AND b-word" in text or "yes if b-word AND a-word" in text
    assert "NOT c-word" in text
    as_dcr = " ".join(_page(rules, disagreeing, disagreeing.predicted, TrainConfig(logic="dcr")).split())
    assert "reading of the network" not in as_dcr


def test_a_system_without_rules_is_refused(two_reasons: Outputs) -> None:
    with pytest.raises(InputRefused, match="no rule"):
        read_class_rules(two_reasons._replace(rule_truth=np.zeros((2000, 0), np.float32)), WORDS, ("yes", "no"))


def _page(rules: list[ClassRule], outputs: Outputs, y: np.ndarray, config: TrainConfig | None = None) -> str:
    names = ("yes", "no")
    measured = Measured(outputs, y, WORDS, names, Resampling(len(y)))
    table = class_rules(rules, outputs, y, WORDS, names)
    page = RulePage(
        table, class_summary(rules, measured), faithfulness(measured), config or TrainConfig(), WORDS, "test", len(y)
    )
    return rules_page(page)
