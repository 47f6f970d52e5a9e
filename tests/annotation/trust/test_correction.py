from __future__ import annotations

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from annotation.trust.correction import pooled_correction

RNG = np.random.default_rng(0)
LOG_ODDS = RNG.normal(0, 2, 4000)
CONCEPT = np.repeat([0, 1], 2000)


def drawn(log_odds: np.ndarray) -> np.ndarray:
    return (np.random.default_rng(1).random(len(log_odds)) < expit(log_odds)).astype(float)


def test_right_log_odds_are_left_alone_and_wrong_ones_corrected_by_concept() -> None:
    assert np.abs(pooled_correction(LOG_ODDS[:, None], drawn(LOG_ODDS), CONCEPT, 2)).max() < 0.2
    truth = drawn(0.5 * LOG_ODDS + np.array([1.0, -1.0])[CONCEPT])
    found = pooled_correction(LOG_ODDS[:, None], truth, CONCEPT, 2)
    np.testing.assert_allclose(found, [[-0.5, 1.0], [-0.5, -1.0]], atol=0.15)
    own = LogisticRegression(C=np.inf).fit(LOG_ODDS[:2000, None], truth[:2000])
    np.testing.assert_allclose(found[0], [own.coef_[0, 0] - 1, own.intercept_[0]], atol=0.06)


def test_a_concept_without_answers_takes_what_the_others_have_in_common() -> None:
    truth = drawn(LOG_ODDS - 1.5)
    found = pooled_correction(LOG_ODDS[:, None], truth, CONCEPT, 3)
    assert found[2, 1] < -0.5
    assert abs(found[2, 1]) < np.abs(found[:2, 1]).min()


def test_weights_count_as_repeated_answers() -> None:
    truth = drawn(LOG_ODDS - 1)[:100]
    weight = np.tile([1.0, 2.0], 50)
    times = weight.astype(int)
    one = pooled_correction(LOG_ODDS[:100, None], truth, CONCEPT[:100], 1, weight)
    other = pooled_correction(np.repeat(LOG_ODDS[:100], times)[:, None], np.repeat(truth, times), np.zeros(150, int), 1)
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_one_odd_answer_bends_less_the_firmer_it_is_held() -> None:
    loose, firm = (
        np.abs(pooled_correction(np.array([[4.0]]), np.zeros(1), np.zeros(1, int), 1, firmness=firmness)).max()
        for firmness in (1.0, 4.0)
    )
    assert firm < loose / 2
