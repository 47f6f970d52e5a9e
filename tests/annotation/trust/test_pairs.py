"""Concordant pairs, held against other implementations and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from annotation.trust.pairs import Pairs, count_pairs

RNG = np.random.default_rng(0)
N = 300
PRESENT = (RNG.random((N, 2)) < [0.3, 0.5]).astype(float)
SCORE = np.round(RNG.standard_normal((N, 2)) + PRESENT, 1)  # with ties
NULL = RNG.standard_normal((N, 2)) + 0.3 * PRESENT


def test_areas_are_scikit_learns() -> None:
    areas = count_pairs(SCORE, PRESENT, NULL[None]).areas
    expected = [[roc_auc_score(PRESENT[:, k], s[:, k]) for s in (SCORE, NULL)] for k in range(2)]
    np.testing.assert_allclose(areas, expected)


def test_intervals_are_delongs() -> None:
    # DeLong, DeLong and Clarke-Pearson (1988) by hand, with n in place of n - 1.
    present, absent = PRESENT[:, 0] > 0, PRESENT[:, 0] == 0
    placements = []
    for score in (SCORE[:, 0], NULL[:, 0]):
        wins = (score[present][:, None] > score[absent]) + 0.5 * (score[present][:, None] == score[absent])
        placements.append((wins.mean(1), wins.mean(0)))
    (p1, a1), (p2, a2) = placements
    variance = np.var(p1 - p2) / present.sum() + np.var(a1 - a2) / absent.sum()
    value, low, high = count_pairs(SCORE, PRESENT, NULL[None]).interval((1, -1))[0]
    assert value == pytest.approx(p1.mean() - p2.mean())
    assert (high - low) / 2 == pytest.approx(1.959964 * np.sqrt(variance), rel=1e-5)


def test_only_images_of_one_stratum_are_compared() -> None:
    strata = np.arange(N) % 3
    shifted = SCORE + 100 * strata[:, None]  # heads on other scales
    np.testing.assert_allclose(
        count_pairs(shifted, PRESENT, strata=strata).areas[:, 0], count_pairs(SCORE, PRESENT, strata=strata).areas[:, 0]
    )


def test_shards_add_up() -> None:
    strata = np.arange(N) // 100
    whole = count_pairs(SCORE, PRESENT, NULL[None], strata=strata)
    parts = [count_pairs(SCORE[r], PRESENT[r], NULL[None, r]) for r in np.split(np.arange(N), 3)]
    added = parts[0] + parts[1] + parts[2]
    assert isinstance(added, Pairs)
    np.testing.assert_allclose(added.interval((1, -1)), whole.interval((1, -1)))


def test_copies_of_an_image_in_one_group_make_nothing_surer() -> None:
    once = count_pairs(SCORE, PRESENT).interval((1, 0))
    copied = np.concatenate([SCORE] * 4), np.concatenate([PRESENT] * 4)
    grouped = count_pairs(*copied, groups=np.tile(np.arange(N), 4)).interval((1, 0))
    np.testing.assert_allclose(grouped, once)
    naive = count_pairs(*copied).interval((1, 0))
    assert ((naive[:, 2] - naive[:, 1]) < 0.6 * (once[:, 2] - once[:, 1])).all()


def test_unanswered_images_do_not_count_and_one_answer_is_not_a_number() -> None:
    holes = PRESENT.copy()
    holes[::3] = np.nan
    known = np.isfinite(holes[:, 0])
    pairs = count_pairs(SCORE, holes)
    assert pairs.areas[0, 0] == pytest.approx(roc_auc_score(PRESENT[known, 0], SCORE[known, 0]))
    assert pairs.n[0] == known.sum()
    assert np.isnan(count_pairs(SCORE, np.ones((N, 2))).interval((1, 0))).all()


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    answers = np.repeat([1.0, 0.0], 60)[:, None].repeat(400, 1)
    score = rng.standard_normal(answers.shape) + answers
    _, low, high = count_pairs(score, answers).interval((1, 0)).T
    truth = 0.7602  # Φ(1/√2)
    assert 0.92 <= ((low <= truth) & (truth <= high)).mean() <= 0.975
