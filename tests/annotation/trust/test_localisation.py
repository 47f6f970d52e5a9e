"""Maps against made lesions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from annotation.trust.honesty import COLUMNS as HONESTY
from annotation.trust.honesty import Verdict
from annotation.trust.leaks import class_leak
from annotation.trust.localisation import (
    QUANTILES,
    LocalisationOptions,
    Part,
    box_mask,
    cell_coverage,
    heat_inside,
    localisation_table,
    map_iou,
    map_scores,
    misplaced,
    pointing_hit,
    unplaced,
)
from annotation.trust.refuse import refused_witnesses
from data_contracts.tables import JUDGEMENTS

SIDE, GRID = 112, 7
CONCEPTS = ("seen", "elsewhere", "new")
N = 120
IMAGES = pd.DataFrame(
    {"image_id": [f"i{n}" for n in range(N)], "split": ["test" if n % 4 == 0 else "train" for n in range(N)]}
)
ALONE = {i: i for i in IMAGES["image_id"]}


def lesion(rng: np.random.Generator) -> np.ndarray:
    left, top = rng.integers(0, SIDE - 40, 2)
    return box_mask((left, top, left + 40, top + 40), (SIDE, SIDE))


def scores(n_new: int = 6) -> pd.DataFrame:
    """Maps that follow the lesion, maps that follow another place, and a concept with few regions."""
    rng = np.random.default_rng(1)
    rows = []
    for n, image_id in enumerate(IMAGES["image_id"]):
        for concept in CONCEPTS if n < n_new else CONCEPTS[:2]:
            mask = lesion(rng)
            at = mask if concept == "seen" else lesion(rng)
            heat = cell_coverage(at, (GRID, GRID)) + 0.3 * rng.standard_normal((GRID, GRID))
            null = rng.standard_normal((GRID, GRID))
            rows.append({"image_id": image_id, "concept_id": concept, **map_scores(heat, null, mask)})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return localisation_table(scores(), CONCEPTS, IMAGES, ALONE).set_index(["concept_id", "images"])


def test_a_map_that_points_there_passes_and_one_that_points_elsewhere_fails(table: pd.DataFrame) -> None:
    seen, elsewhere = table.loc[("seen", Part.DECIDES)], table.loc[("elsewhere", Part.DECIDES)]
    assert (seen["verdict"], elsewhere["verdict"]) == (Verdict.PASSES, Verdict.FAILS)
    assert seen["pointing_game"] > 0.9
    assert abs(elsewhere["pointing_game"] - elsewhere["chance"]) < 0.12
    assert seen["iou"] > seen["null_iou"] + 0.2
    assert seen["inside"] > seen["area"] + 0.1
    assert elsewhere["inside"] == pytest.approx(elsewhere["area"], abs=0.06)


def test_few_regions_decide_nothing(table: pd.DataFrame) -> None:
    assert table.loc[("new", Part.DECIDES), "verdict"] == Verdict.TOO_FEW
    said = unplaced(table.reset_index(), {"new": "New one"})
    assert set(said) == {"new"}
    assert "'New one'" in said["new"]
    assert "too few regions" in said["new"]


def test_the_test_split_is_measured_and_decides_nothing(table: pd.DataFrame) -> None:
    assert table.loc[("seen", Part.TEST), "n"] == N // 4
    assert not table.xs(Part.TEST, level="images")["decides"].any()
    hidden = IMAGES.assign(split="test")
    assert misplaced(localisation_table(scores(), CONCEPTS, hidden, ALONE)) == {}


def test_the_threshold_is_chosen_without_test_images() -> None:
    found = scores()
    test = found["image_id"].isin(IMAGES.loc[IMAGES["split"] == "test", "image_id"])
    ious = [f"iou_{q}" for q in QUANTILES]
    spoiled = found.copy()
    spoiled.loc[test, ious] = 0.0
    spoiled.loc[test, "iou_0.95"] = 1.0
    chosen = localisation_table(found, CONCEPTS, IMAGES, ALONE)
    again = localisation_table(spoiled, CONCEPTS, IMAGES, ALONE)
    assert chosen["iou_quantile"].equals(again["iou_quantile"])
    best = found[~test].query("concept_id == 'seen'")[ious].mean().idxmax()
    assert f"iou_{chosen.set_index('concept_id').loc['seen', 'iou_quantile'].iloc[0]}" == best


def test_intervals_are_wilsons_by_scipy_and_newcombes_from_them() -> None:
    one = scores().query("concept_id == 'seen'")
    train = one[one["image_id"].isin(IMAGES.loc[IMAGES["split"] == "train", "image_id"])].assign(hit=0.0, null_hit=0.0)
    train.iloc[:70, train.columns.get_loc("hit")] = 1.0
    train.iloc[:21, train.columns.get_loc("null_hit")] = 1.0
    row = localisation_table(train, ["seen"], IMAGES, ALONE).iloc[0]
    own, null = (binomtest(k, 90).proportion_ci(method="wilson") for k in (70, 21))
    assert (row["pointing_game_low"], row["pointing_game_high"]) == pytest.approx((own.low, own.high))
    low = 49 / 90 - np.hypot(70 / 90 - own.low, null.high - 21 / 90)
    high = 49 / 90 + np.hypot(own.high - 70 / 90, 21 / 90 - null.low)
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((low, high))


def test_images_of_one_patient_count_once() -> None:
    found = scores()
    four_each = {i: str(n // 4) for n, i in enumerate(IMAGES["image_id"])}
    alone = localisation_table(found, CONCEPTS, IMAGES, ALONE).iloc[0]
    together = localisation_table(found, CONCEPTS, IMAGES, four_each).iloc[0]
    assert (together["n"], together["n_groups"]) == (90, 30)
    assert (
        together["pointing_game_high"] - together["pointing_game_low"]
        > alone["pointing_game_high"] - alone["pointing_game_low"]
    )


def test_the_margin_is_stated_and_kept() -> None:
    strict = localisation_table(scores(), CONCEPTS, IMAGES, ALONE, LocalisationOptions(margin=0.5, max_reach=0.3))
    lenient = localisation_table(scores(), CONCEPTS, IMAGES, ALONE, LocalisationOptions(margin=0.0, max_reach=0.3))
    assert strict["verdict"].iloc[0] in (Verdict.PASSES, Verdict.FAILS)
    assert lenient["verdict"].iloc[0] == Verdict.PASSES
    assert set(misplaced(strict)) >= {"elsewhere"}


def test_a_misplaced_map_silences_the_aligner_only() -> None:
    nothing = pd.DataFrame(columns=list(HONESTY), dtype="object")
    judgements = JUDGEMENTS.empty()
    leaks = class_leak(judgements, IMAGES.assign(label="x", rejected=None))
    table = localisation_table(scores(), CONCEPTS, IMAGES, ALONE)
    refused = refused_witnesses(nothing, leaks, judgements, fitted=True, localisation=table)
    assert refused[["source", "concept_id", "reason"]].to_numpy().tolist() == [
        ["alignment", "elsewhere", "fails_null_test"]
    ]
    assert "a random cell hits" in refused["detail"].iloc[0]


def test_no_region_is_no_row() -> None:
    empty = localisation_table(pd.DataFrame(columns=["image_id", "concept_id"]), CONCEPTS, IMAGES, ALONE)
    assert empty.empty
    assert misplaced(empty) == {}


def test_a_cells_coverage_is_its_share_of_the_mask_at_any_size() -> None:
    mask = box_mask((2, 0, 5, 7), (7, 10))
    coverage = cell_coverage(mask, (2, 3))
    assert coverage.mean() == pytest.approx(mask.mean())
    np.testing.assert_allclose(coverage[0], [4 / 10, 5 / 10, 0])


def test_pointing_hits_where_the_hottest_cell_meets_the_lesion() -> None:
    mask = box_mask((60, 60, 80, 80), (100, 100))
    heat = np.zeros((10, 10))
    heat[7, 6] = 1
    assert pointing_hit(heat, mask) == 1
    assert pointing_hit(heat.T[::-1], mask) == 0
    assert pointing_hit(np.zeros((10, 10)), mask) == pytest.approx(0.04)
    assert np.isnan(pointing_hit(heat, np.zeros((100, 100), bool)))


def test_iou_is_that_of_areas() -> None:
    mask = box_mask((50, 0, 100, 100), (100, 100))
    heat = np.tile([0.0, 1.0], (2, 1))
    assert map_iou(heat, mask, 0.5) == pytest.approx(1)
    assert map_iou(1 - heat, mask, 0.5) == 0
    half = np.array([[0.0, 1.0], [0.0, 0.0]])
    assert map_iou(half, mask, 0.5) == pytest.approx(0.5)
    assert map_iou(10 * heat - 3, mask) == pytest.approx(1)  # as much area as the lesion has, whatever the scale
    assert map_iou(np.zeros((2, 2)), mask) == pytest.approx(1 / 3)
    assert np.isnan(map_iou(heat, np.zeros((100, 100), bool)))


def test_heat_inside_is_the_share_above_the_coldest_cell() -> None:
    mask = box_mask((50, 0, 100, 100), (100, 100))
    assert heat_inside(np.array([[2.0, 3.0], [2.0, 5.0]]), mask) == pytest.approx(1)
    assert heat_inside(np.array([[-1.0, 0.0], [1.0, 0.0]]), mask) == pytest.approx(0.5)
    assert heat_inside(np.zeros((2, 2)), mask) == pytest.approx(0.5)
    assert np.isnan(heat_inside(np.zeros((2, 2)), np.zeros((9, 9), bool)))


def test_chance_is_what_a_random_cell_hits() -> None:
    mask = box_mask((60, 60, 80, 80), (100, 100))
    found = map_scores(np.zeros((10, 10)), np.eye(10), mask)
    assert found["chance"] == found["hit"] == pytest.approx(0.04)
    assert found["area"] == pytest.approx(0.04)
