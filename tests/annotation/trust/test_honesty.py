"""Honesty tests on made scores."""

from __future__ import annotations

import numpy as np

from annotation.alignment.nulls import Null, NullKind
from annotation.trust.honesty import (
    HonestyOptions,
    Verdict,
    added,
    count_nulls,
    honesty_table,
    refusals,
    untested,
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


def test_what_could_not_be_told_says_how_many_images_would_tell() -> None:
    few, rng = slice(0, 60), np.random.default_rng(7)
    made = [Null(NullKind.NULL_PROMPT, rng.standard_normal((1, 60, 3)))]
    table = honesty_table(count_nulls(OWN[few], ANSWERS[few], made), IDS)
    said = untested(table, {"random": "Random one"})
    assert set(said) == {"random"}
    assert "'Random one'" in said["random"]
    assert "on 60 judged images" in said["random"]
    n_needed = int(table.set_index("concept_id").at["random", "n_needed"])
    assert f"About {n_needed} judged images would tell" in said["random"]
    # So many images are indeed enough to tell, and half of them are not.
    for n, expected in ((n_needed + 60, Verdict.FAILS), (n_needed // 2, Verdict.TOO_FEW)):
        noise = [Null(NullKind.NULL_PROMPT, rng.standard_normal((1, n, 3)))]
        assert verdicts(honesty_table(count_nulls(OWN[:n], ANSWERS[:n], noise), IDS))["random"] == expected


def test_one_answer_throughout_is_said_in_words_without_a_number() -> None:
    made = [Null(NullKind.NULL_PROMPT, RNG.standard_normal((1, 60, 3)))]
    table = honesty_table(count_nulls(OWN[:60], np.ones((60, 3)), made), IDS)
    assert table["n_needed"].isna().all()
    assert all("do not hold both answers" in sentence for sentence in untested(table).values())
    assert len(untested(table)) == 3


def test_what_fails_is_not_called_untested() -> None:
    table = honesty_table(count_nulls(OWN, ANSWERS, nulls()), IDS)
    assert untested(table) == {}
