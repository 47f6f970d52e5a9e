from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, precision_score, recall_score, roc_auc_score

from annotation.trust.intervals import Sample, audited, weighted_auroc


def sample(n: int, seed: int = 0, *, error_fraction: float = 0.2, weighted: bool = False) -> Sample:
    rng = np.random.default_rng(seed)
    true = (rng.random(n) < 0.4) * 1.0
    said = np.where(rng.random(n) < error_fraction, 1 - true, true)
    weight = rng.uniform(1, 5, n) if weighted else np.ones(n)
    return Sample(said, true, weight, (said > 0) * 1, np.ones(n), true + rng.normal(0, 0.8, n))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_weighted_numbers_are_scikit_learns(seed: int) -> None:
    s = sample(60, seed, weighted=True)
    found = audited([s])[0]
    options = {"sample_weight": s.weight}
    assert found.kappa.value == pytest.approx(cohen_kappa_score(s.true, s.said, **options))
    assert found.sensitivity.value == pytest.approx(recall_score(s.true, s.said, **options))
    assert found.specificity.value == pytest.approx(recall_score(s.true, s.said, pos_label=0, **options))
    assert found.ppv.value == pytest.approx(precision_score(s.true, s.said, **options))
    assert found.npv.value == pytest.approx(precision_score(s.true, s.said, pos_label=0, **options))
    assert found.auroc.value == pytest.approx(roc_auc_score(s.true, s.score, **options))
    for interval in (found.kappa, found.sensitivity, found.specificity, found.ppv, found.npv, found.auroc):
        assert interval.low <= interval.value <= interval.high


def test_five_cells_that_happen_to_agree_are_no_certainty() -> None:
    others = [sample(40, seed) for seed in range(8)]
    lucky = Sample(*(np.array([1.0, 1, 0, 0, 0]),) * 2, np.ones(5), np.zeros(5, int), np.ones(5), np.arange(5.0)[::-1])
    found = audited([lucky, *others])[0]
    assert found.kappa.value == 1
    assert found.kappa.low < 0.7
    assert found.auroc.low < 0.9


def test_few_concepts_that_happen_to_agree_do_not_make_each_other_certain() -> None:
    # Every answer as its stratum has it: the design effect is measured as none, from two cells a stratum.
    answers = np.array([1.0, 1, 0, 0, 0])
    lucky = Sample(answers, answers, np.full(5, 8.0), np.array([0, 0, 1, 1, 1]), np.full(5, 0.9), answers)
    for found in audited([lucky, lucky]):
        assert found.kappa.low < 0.7
        assert found.ppv.low < 0.8


def test_more_cells_make_a_narrower_interval() -> None:
    small, large = (audited([sample(n, seed) for seed in range(6)]) for n in (15, 400))
    width = [np.mean([f.kappa.high - f.kappa.low for f in found]) for found in (small, large)]
    assert width[1] < width[0] / 3


def test_the_interval_holds_the_true_kappa_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    errors = rng.uniform(0.05, 0.35, 10)
    population = [sample(20_000, k, error_fraction=e) for k, e in enumerate(errors)]
    true = [cohen_kappa_score(p.true, p.said) for p in population]
    held = []
    for _ in range(40):
        rows = rng.integers(0, 20_000, 14)
        found = audited([Sample(*(v[rows] for v in p))._replace(stratum=np.zeros(14, int)) for p in population])
        held += [f.kappa.low <= t <= f.kappa.high for f, t in zip(found, true, strict=True)]
    assert 0.91 <= np.mean(held) <= 0.99


def test_nothing_answered_is_no_number_and_no_error() -> None:
    found = audited([sample(0), sample(20)])[0]
    assert found.n == 0
    assert np.isnan(found.kappa.value)
    assert np.isnan(weighted_auroc(sample(0)).value)
