"""Honesty tests on made scores, and maps against made lesions."""

from __future__ import annotations

import numpy as np
import pytest

from annotation.alignment.nulls import Null, NullKind
from annotation.trust.honesty import (
    HonestyOptions,
    Verdict,
    added,
    box_mask,
    cell_coverage,
    count_nulls,
    honesty_table,
    map_iou,
    pointing_hit,
    refusals,
    verdicts,
)

RNG = np.random.default_rng(0)
N = 1500
ANSWERS = (RNG.random((N, 3)) < 0.4).astype(float)
NOISE = RNG.standard_normal((N, 3))
IDS = ["clear", "deaf", "random"]
OWN = NOISE + ANSWERS * [1.5, 1.5, 0]
DENIED = OWN + 0.05 * RNG.standard_normal((N, 3))
DENIED[:, 0] = RNG.standard_normal(N)
"""`clear` reads the denial; `deaf` takes it for the concept; `random` knows nothing."""


def nulls(**changes: bool) -> list[Null]:
    empty = [Null(NullKind.NULL_PROMPT, RNG.standard_normal((1, N, 3)), **changes) for _ in range(3)]
    return [*empty, Null(NullKind.NEGATION, DENIED[None], **changes)]


def test_a_concept_must_beat_every_null() -> None:
    table = honesty_table(count_nulls(OWN, ANSWERS, nulls()), IDS)
    assert verdicts(table) == {"clear": Verdict.PASSES, "deaf": Verdict.FAILS, "random": Verdict.FAILS}
    assert len(table) == 3 * 2  # prompts are one null: the strongest of them
    deaf = table[(table["concept_id"] == "deaf") & (table["null"] == "null_prompt")]
    assert deaf["verdict"].item() == Verdict.PASSES


def test_a_refusal_names_concept_null_and_numbers() -> None:
    sentences = refusals(honesty_table(count_nulls(OWN, ANSWERS, nulls()), IDS), {"deaf": "Deaf one"})
    assert set(sentences) == {"deaf", "random"}
    assert "'Deaf one'" in sentences["deaf"]
    assert "the denied concept reaches 0.8" in sentences["deaf"]
    assert "1500 images" in sentences["deaf"]
    assert "may not label" in sentences["random"]


def test_nulls_for_information_fail_nobody() -> None:
    table = honesty_table(count_nulls(OWN, ANSWERS, nulls(decides=False)), IDS)
    assert set(verdicts(table).values()) == {Verdict.PASSES}
    assert refusals(table) == {}


def test_few_images_fail_nobody_but_pass_what_is_plain() -> None:
    few = slice(0, 60)
    made = [Null(NullKind.NULL_PROMPT, RNG.standard_normal((1, 60, 3)))]
    found = verdicts(honesty_table(count_nulls(OWN[few], ANSWERS[few], made), IDS))
    assert found == {"clear": Verdict.PASSES, "deaf": Verdict.PASSES, "random": Verdict.TOO_FEW}
    one_answer = honesty_table(count_nulls(OWN[few], np.ones((60, 3)), made), IDS)
    assert set(verdicts(one_answer).values()) == {Verdict.TOO_FEW}


def test_the_margin_is_stated_and_kept() -> None:
    counts = count_nulls(OWN, ANSWERS, nulls())
    strict = honesty_table(counts, IDS, HonestyOptions(margin=0.45))
    assert verdicts(strict)["clear"] == Verdict.FAILS


def test_shards_add_up_to_the_whole() -> None:
    made = nulls()
    parts = [
        count_nulls(OWN[r], ANSWERS[r], [n._replace(scores=n.scores[:, r]) for n in made])
        for r in np.split(np.arange(N), 3)
    ]
    whole = count_nulls(OWN, ANSWERS, made, strata=np.arange(N) // 500)
    both = [honesty_table(counts, IDS) for counts in (added(added(parts[0], parts[1]), parts[2]), whole)]
    np.testing.assert_allclose(both[0]["difference_low"], both[1]["difference_low"])


def test_random_concepts_pass_no_more_often_than_the_interval_says() -> None:
    rng = np.random.default_rng(3)
    answers = (rng.random((800, 400)) < rng.uniform(0.1, 0.7, 400)).astype(float)
    made = [Null(NullKind.PERMUTATION, rng.standard_normal((1, 800, 400)), exchangeable=True)]
    found = verdicts(
        honesty_table(count_nulls(rng.standard_normal((800, 400)), answers, made), [*map(str, range(400))])
    )
    passed = np.mean([v == Verdict.PASSES for v in found.values()])
    assert passed <= 0.045  # one side of a 95 % interval, with its sampling error


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
