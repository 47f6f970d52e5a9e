from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.utils import resample

from model.intervals import bootstrap, highest_plausible_fraction, holm, mean_interval, proportion


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution_for_many_items() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = mean_interval(values)
    expected = stats.norm.interval(0.95, values.mean(), values.std(ddof=1) / 20)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(expected, abs=0.04)


def test_the_interval_agrees_with_a_plain_resampling_by_scikit_learn() -> None:
    values = np.random.default_rng(1).exponential(1, 60)
    plain = [resample(values, random_state=seed).mean() for seed in range(1000)]
    found = mean_interval(values)
    assert (found.low, found.high) == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.03)


def test_images_of_one_patient_make_the_interval_wider() -> None:
    rng = np.random.default_rng(2)
    patients = np.repeat(np.arange(20), 10)
    values = rng.normal(size=20)[patients] + rng.normal(0, 0.1, 200)
    alone, together = mean_interval(values), mean_interval(values, groups=patients.tolist())
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_what_is_undefined_is_left_out_or_nan() -> None:
    assert mean_interval(np.array([1.0, np.nan, 3.0])).value == 2
    assert np.isnan(mean_interval(np.array([]))).all()
    assert np.isnan(mean_interval(np.array([5.0]))[1:]).all()
    assert np.isnan(bootstrap(lambda rows: float("nan"), 5)).all()


def test_a_proportion_has_wilsons_interval() -> None:
    found = proportion(9, 10)
    expected = stats.binomtest(9, 10).proportion_ci(method="wilson")
    assert found == pytest.approx((0.9, expected.low, expected.high))
    assert np.isnan(proportion(0, 0)).all()


def test_the_highest_plausible_fraction_is_the_exact_one_sided_bound() -> None:
    bound = highest_plausible_fraction(3, 100, 0.05)
    assert stats.binom.cdf(3, 100, bound) == pytest.approx(0.05, abs=1e-9)
    assert highest_plausible_fraction(5, 5, 0.05) == 1


def test_holm_corrects_step_by_step_and_leaves_out_what_was_not_tested() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    found = holm([0.02, float("nan"), 0.5])
    assert found[0] == pytest.approx(0.04)
    assert np.isnan(found[1])
    assert holm([]) == []
