from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from data_contracts.errors import InputRefused
from model.explain.alignment import agreement, on_grid, overlap, rank_correlation
from model.explain.regions import region_score, region_table


def test_agreement_is_spearmans_rank_correlation() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random((7, 7)), rng.random((7, 7)).round(1)  # ties too
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first.ravel(), second.ravel()).statistic)
    assert rank_correlation(first, np.exp(3 * first)) == pytest.approx(1)
    assert rank_correlation(first, -first) == pytest.approx(-1)


def test_a_constant_map_agrees_with_nothing() -> None:
    flat, other = np.zeros((4, 4)), np.random.default_rng(0).random((4, 4))
    assert np.isnan(rank_correlation(flat, other))
    assert np.isnan(overlap(flat, other))
    assert np.isnan(rank_correlation(np.full((4, 4), np.nan), other))


def test_overlap_counts_the_hottest_fifth() -> None:
    first = np.arange(25.0).reshape(5, 5)
    second = np.roll(first, -2)
    # The hottest five cells are 20–24, and 18–22: three in common, seven in all.
    assert overlap(first, second) == pytest.approx(3 / 7)
    assert overlap(first, first) == 1


def test_grids_of_different_sizes_are_brought_together() -> None:
    ramp = np.linspace(0, 1, 7)[None, :] * np.ones((7, 1))
    finer = on_grid(ramp, (14, 14))
    assert finer.shape == (14, 14)
    assert rank_correlation(ramp, np.linspace(0, 1, 14)[None, :] * np.ones((14, 1))) > 0.99


def test_each_map_is_compared_with_its_partner_and_with_its_controls_only() -> None:
    rng = np.random.default_rng(1)
    second = [rng.random((6, 6)) for _ in range(4)]
    first = [second[2] + 0.01 * rng.random((6, 6)), second[0] + 0.01 * rng.random((6, 6))]
    controls = np.array([[True, True, False, False], [False, False, False, False]])
    found = agreement(first, second, np.array([2, 0]), controls)
    assert (found.alignment > 0.99).all()
    by_hand = np.mean([spearmanr(first[0].ravel(), second[m].ravel()).statistic for m in (0, 1)])
    assert found.control[0] == pytest.approx(by_hand)
    assert np.isnan(found.control[1])
    assert agreement([], [], np.zeros(0, np.int64), np.zeros((0, 0), bool)).alignment.shape == (0,)


def test_a_map_inside_a_region_hits_it() -> None:
    heat, mask = np.zeros((4, 4)), np.zeros((4, 4), bool)
    heat[0, 0], heat[0, 1], heat[3, 3] = 1.0, 0.6, 0.4
    mask[0, :2] = True
    score = region_score(heat, mask)
    assert score.hit
    assert score.iou == 1
    assert score.inside == pytest.approx(1.6 / 2)
    assert score.by_chance == pytest.approx(2 / 16)
    assert not region_score(heat, ~mask & (np.arange(16).reshape(4, 4) < 12)).hit
    table = region_table({("x", "class"): heat, ("y", "class"): heat}, {("x", "class"): mask})
    assert table["image_id"].tolist() == ["x"]


def test_an_empty_region_is_refused() -> None:
    with pytest.raises(InputRefused, match="something inside"):
        region_score(np.ones((2, 2)), np.zeros((2, 2), bool))
