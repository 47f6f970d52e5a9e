from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from annotation.prompts import Example
from annotation.vlm.questions import select
from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import ImageRejected, RejectReason
from data_contracts.store import RunFolder
from data_contracts.tables import JUDGEMENTS, State
from flows.judging import (
    ANSWERED,
    NEVER,
    OTHER_QUESTION,
    UNUSABLE,
    OpenWork,
    WitnessPlan,
    choose_examples,
    ledger_parts,
    open_work,
)
from flows.settings import EndpointSettings

RED, LARGE = Concept("red", "red", "Redness."), Concept("large", "large")
ROUND, OVAL = Concept("round", "round", "", "shape"), Concept("oval", "oval", "", "shape")
VOCABULARY = Vocabulary.of([RED, ROUND, OVAL])
IDS = ["i1", "i2", "i3", "i4"]
START = pd.Timestamp("2026-11-01", tz="UTC")


def plan_of(
    vocabulary: Vocabulary = VOCABULARY, examples: dict[str, Example] | None = None, **settings: Any
) -> WitnessPlan:
    endpoint = EndpointSettings(**({"base_url": "http://x/v1", "model": "m"} | settings))
    shown = examples or {}
    return WitnessPlan(endpoint, vocabulary, "skin", tuple(shown.values()), frozenset(shown))


def said(
    plan: WitnessPlan, image_id: str, concept_id: str, state: str = "present", at_s: float = 0, **changes: Any
) -> dict[str, Any]:
    """A row of the ledger: by default the answer to the plan's own question."""
    row = {
        "image_id": image_id,
        "concept_id": concept_id,
        "witness": "vlm",
        "witness_model": plan.settings.model,
        "prompt_sha256": plan.asked(plain=image_id in plan.example_ids)[concept_id],
        "state": state,
        "created_at": START + pd.Timedelta(seconds=at_s),
    }
    return row | changes


def part(*rows: dict[str, Any]) -> pa.Table:
    return JUDGEMENTS.to_arrow(pd.DataFrame(rows), "test")


def work_of(plan: WitnessPlan, *parts: pa.Table, image_ids: Sequence[str] = IDS) -> OpenWork:
    return open_work(plan, image_ids, iter(parts))


def patterns(work: OpenWork) -> dict[tuple[str, ...], list[str]]:
    return {tuple(q.question_id for q in questions): ids for questions, _, ids in work.patterns()}


# ---- open cells ---------------------------------------------------------------------------------------------------


def test_at_first_everything_is_open() -> None:
    work = work_of(plan_of())
    assert (work.n_images, work.n_cells) == (4, 12)
    assert work.reasons() == {"never asked": 12}
    assert patterns(work) == {("red", "choice-shape"): IDS}


def test_what_was_answered_is_not_open() -> None:
    plan = plan_of()
    work = work_of(plan, part(*(said(plan, i, c) for i in IDS[:3] for c in VOCABULARY.ids)))
    assert (work.n_images, work.n_cells, patterns(work)) == (1, 3, {("red", "choice-shape"): ["i4"]})
    everything = part(*(said(plan, i, c) for i in IDS for c in VOCABULARY.ids))
    assert (work_of(plan, everything).n_images, patterns(work_of(plan, everything))) == (0, {})


@pytest.mark.parametrize("state", ["present", "absent", "uncertain"])
def test_every_state_that_was_said_is_an_answer(state: str) -> None:
    plan = plan_of()
    assert work_of(plan, part(said(plan, "i1", "red", state))).standing[0, 0] == ANSWERED


def test_each_reason_is_told() -> None:
    plan = plan_of()
    rows = [
        said(plan, "i1", "red"),
        said(plan, "i2", "red", prompt_sha256="of other words"),
        said(plan, "i3", "red", "not_assessed"),
        said(plan, "i4", "red", "not_assessed", prompt_sha256=None),
    ]
    work = work_of(plan, part(*rows))
    assert list(work.standing[:, 0]) == [ANSWERED, OTHER_QUESTION, UNUSABLE, OTHER_QUESTION]
    assert (work.standing[:, 1:] == NEVER).all()
    assert work.reasons() == {
        "never asked": 8,
        "asked before in other words or with other settings": 2,
        "asked before without a usable answer": 1,
    }


@pytest.mark.parametrize("change", [{"witness": "expert"}, {"witness": "alignment"}, {"witness_model": "another"}])
def test_what_others_said_answers_nothing(change: dict[str, str]) -> None:
    plan = plan_of()
    assert work_of(plan, part(said(plan, "i1", "red", **change))).reasons() == {"never asked": 12}


def test_images_and_concepts_that_are_gone_are_passed_over() -> None:
    plan = plan_of()
    rows = [said(plan, "gone", "red"), said(plan, "i1", "red") | {"concept_id": "gone"}, said(plan, "i2", "red")]
    assert work_of(plan, part(*rows)).n_cells == 11


@pytest.mark.parametrize("in_one_part", [True, False])
def test_the_last_answer_in_time_stands_wherever_it_was_written(in_one_part: bool) -> None:
    plan = plan_of()
    rows = [
        said(plan, "i1", "red", at_s=5),
        said(plan, "i1", "red", at_s=1, prompt_sha256="older words"),
        said(plan, "i2", "red", at_s=1),
        said(plan, "i2", "red", at_s=5, prompt_sha256="newer words"),
        said(plan, "i3", "red", "not_assessed", at_s=3),
        said(plan, "i3", "red", at_s=3),
    ]
    parts = [part(*rows)] if in_one_part else [part(row) for row in rows]
    # Of two at the same moment the one written later stands.
    assert list(work_of(plan, *parts).standing[:, 0]) == [ANSWERED, OTHER_QUESTION, ANSWERED, NEVER]


def test_a_question_is_open_as_a_whole_when_one_of_its_values_is() -> None:
    plan = plan_of()
    rows = [said(plan, i, c) for i in IDS for c in VOCABULARY.ids if (i, c) != ("i2", "oval")]
    work = work_of(plan, part(*rows))
    assert (work.n_cells, work.n_images, patterns(work)) == (1, 1, {("choice-shape",): ["i2"]})


def test_a_changed_definition_opens_that_concept_only() -> None:
    before = plan_of()
    everything = part(*(said(before, i, c) for i in IDS for c in VOCABULARY.ids))
    after = plan_of(Vocabulary.of([Concept("red", "red", "Any red at all."), ROUND, OVAL]))
    assert patterns(work_of(after, everything)) == {("red",): IDS}
    assert patterns(work_of(plan_of(Vocabulary.of([OVAL, LARGE, ROUND, RED])), everything)) == {
        ("choice-shape", "large"): IDS
    }


def test_a_concept_that_comes_back_opens_nothing() -> None:
    plan, single = plan_of(Vocabulary.of([RED, LARGE])), plan_of(Vocabulary.of([LARGE]))
    everything = part(*(said(plan, i, c) for i in IDS for c in ("red", "large")))
    assert work_of(single, everything).n_images == 0
    assert work_of(plan_of(Vocabulary.of([LARGE, RED])), everything).n_images == 0


@pytest.mark.parametrize(
    "change", [{"temperature": 1}, {"image_side_px": 64}, {"seed": 3}, {"probability": "logprobs"}]
)
def test_changed_settings_open_everything(change: dict[str, Any]) -> None:
    before = plan_of()
    everything = part(*(said(before, i, c) for i in IDS for c in VOCABULARY.ids))
    assert work_of(plan_of(**change), everything).reasons() == {
        "asked before in other words or with other settings": 12
    }


def test_the_fingerprint_changes_with_every_question_and_with_nothing_else() -> None:
    example = {"i1": Example(b"pixels", {"red": State.PRESENT})}
    others = [
        plan_of(),
        plan_of(Vocabulary.of([Concept("red", "red", "Any red."), ROUND, OVAL])),
        plan_of(Vocabulary.of([RED, ROUND])),
        plan_of(model="n"),
        plan_of(temperature=1),
        plan_of(examples=example),
    ]
    assert len({plan.fingerprint for plan in others}) == len(others)
    assert plan_of(concurrency=2, timeout_s=7, max_requests=9).fingerprint == plan_of().fingerprint


def test_nothing_to_ask_is_no_work() -> None:
    for work in (work_of(plan_of(Vocabulary.of([]))), work_of(plan_of(), image_ids=[])):
        assert (work.n_images, work.n_cells, list(work.patterns())) == (0, 0, [])
        assert (list(work.shards(0, 10)), list(work.works())) == ([], [])


def test_the_ledger_is_read_from_the_run_folder_part_by_part(tmp_path: Path) -> None:
    plan, run = plan_of(), RunFolder(tmp_path)
    assert open_work(plan, IDS, ledger_parts(run)).n_cells == 12
    for image_id in IDS[:2]:
        run.append_judgements(part(*(said(plan, image_id, c) for c in VOCABULARY.ids)))
    assert len(list(ledger_parts(run))) == 2
    assert open_work(plan, IDS, ledger_parts(run)).n_cells == 6


# ---- patterns and shards ------------------------------------------------------------------------------------------


def test_images_with_the_same_open_questions_are_asked_together() -> None:
    plan = plan_of()
    rows = [said(plan, i, "red") for i in ("i1", "i3")] + [said(plan, "i4", c) for c in ("round", "oval")]
    assert patterns(work_of(plan, part(*rows))) == {
        ("red",): ["i4"],
        ("choice-shape",): ["i1", "i3"],
        ("red", "choice-shape"): ["i2"],
    }


@given(st.lists(st.tuples(st.sampled_from(IDS), st.sampled_from(VOCABULARY.ids)), min_size=1, unique=True))
def test_patterns_cover_every_open_question_once_and_no_other(answered: list[tuple[str, str]]) -> None:
    plan = plan_of()
    work = work_of(plan, part(*(said(plan, i, c) for i, c in answered)))
    covered = [(i, c) for questions, _, ids in work.patterns() for i in ids for q in questions for c in q.concept_ids]
    assert len(covered) == len(set(covered))
    groups = [("red",), ("round", "oval")]
    expected = {(i, c) for i in IDS for g in groups for c in g if not all((i, x) in answered for x in g)}
    assert set(covered) == expected


def test_shards_are_plain_values_of_at_most_the_size_that_lead_back_to_their_questions() -> None:
    plan = plan_of()
    work = work_of(plan, part(said(plan, "i2", "red")))
    shards = json.loads(json.dumps(list(work.shards(1, 2))))
    assert [len(s["image_ids"]) for s in shards] == [1, 2, 1]
    assert sorted(i for s in shards for i in s["image_ids"]) == IDS
    assert {(s["witness"], s["plain"]) for s in shards} == {(1, False)}
    asked = {i: [q.question_id for q in select(plan.questions, s["questions"])] for s in shards for i in s["image_ids"]}
    assert asked == {i: ["choice-shape"] if i == "i2" else ["red", "choice-shape"] for i in IDS}


@pytest.mark.parametrize(
    ("settings", "n_requests"),
    [
        ({}, 4),
        ({"concepts_per_request": 1}, 7),
        ({"samples": 3, "temperature": 0.7}, 12),
        # Three concepts of three images, and two of the one whose redness is known.
        ({"probability": "logprobs"}, 11),
    ],
)
def test_the_work_is_as_many_requests_as_will_be_sent(settings: dict[str, Any], n_requests: int) -> None:
    plan = plan_of(**settings)
    works = list(work_of(plan, part(said(plan, "i2", "red"))).works())
    assert sum(w.n_requests for w in works) == n_requests
    assert all(sum(isinstance(p, bytes) for p in w.request.parts) == 1 for w in works)


# ---- examples -----------------------------------------------------------------------------------------------------

EXAMPLES = {"i2": Example(b"pixels", {"red": State.PRESENT, "oval": State.PRESENT})}


def test_an_example_is_judged_without_any_and_all_others_with_it() -> None:
    plan = plan_of(examples=EXAMPLES)
    found = [(plain, ids, len(plan.framing(plain=plain).examples)) for _, plain, ids in work_of(plan).patterns()]
    assert sorted(found) == [(False, ["i1", "i3", "i4"], 1), (True, ["i2"], 0)]
    shards = list(work_of(plan).shards(0, 10))
    assert {tuple(s["image_ids"]): s["plain"] for s in shards} == {("i1", "i3", "i4"): False, ("i2",): True}


def test_no_request_shows_an_image_beside_its_own_answers() -> None:
    plan = plan_of(examples=EXAMPLES)
    for work in work_of(plan).works():
        n_shown = sum(part == b"pixels" for part in work.request.parts)
        assert n_shown == (0 if work.n_requests == 1 else 1)


def test_an_answer_that_was_given_beside_the_examples_does_not_count_for_an_example() -> None:
    plan, plain = plan_of(examples=EXAMPLES), plan_of()
    told = plan.asked(plain=False)
    rows = [said(plan, i, c, prompt_sha256=told[c]) for i in IDS for c in VOCABULARY.ids]
    assert patterns(work_of(plan, part(*rows))) == {("red", "choice-shape"): ["i2"]}
    # What was asked without examples is what an example is asked.
    before = [said(plain, "i2", c) for c in VOCABULARY.ids]
    assert work_of(plan, part(*rows, *before)).n_images == 0


IMAGES = pd.DataFrame(
    {"image_id": ["a", "b", "c", "v", "t", "u"], "split": ["train", "train", "train", "val", "test", None]}
)


def pixels(image_id: str) -> Any:
    if image_id == "b":
        raise ImageRejected(RejectReason.TRUNCATED, image_id)
    return np.full((300, 400, 3), 100 + ord(image_id) % 50, np.uint8)


def experts(*rows: tuple[str, str, str], **changes: Any) -> pd.DataFrame:
    plan = plan_of()
    made = [
        said(plan, i, c, state, at_s=n, **({"witness": "expert", "witness_model": "dr"} | changes))
        for n, (i, c, state) in enumerate(rows)
    ]
    return part(*made).to_pandas()


def chosen(judgements: pd.DataFrame, n: int = 4, **settings: Any) -> dict[str, Example]:
    endpoint = EndpointSettings(**({"base_url": "http://x/v1", "model": "m", "examples": n} | settings))
    return choose_examples(judgements, IMAGES, pixels, endpoint)


def test_examples_are_training_images_only() -> None:
    found = chosen(experts(*((i, "red", "present") for i in ("a", "v", "t", "u", "elsewhere"))))
    assert list(found) == ["a"]
    assert found["a"].states == {"red": State.PRESENT}


@pytest.mark.parametrize("witness", ["vlm", "alignment", "given"])
def test_examples_are_told_by_experts_only(witness: str) -> None:
    assert chosen(experts(("a", "red", "present"), witness=witness)) == {}


def test_only_what_an_expert_could_tell_is_told() -> None:
    rows = [("a", "red", "present"), ("a", "round", "absent"), ("a", "oval", "uncertain"), ("c", "red", "not_assessed")]
    found = chosen(experts(*rows))
    assert {i: dict(e.states) for i, e in found.items()} == {"a": {"red": State.PRESENT, "round": State.ABSENT}}


def test_the_last_word_of_an_expert_counts() -> None:
    rows = [("a", "red", "present"), ("a", "round", "present"), ("a", "red", "absent"), ("a", "round", "uncertain")]
    assert chosen(experts(*rows))["a"].states == {"red": State.ABSENT}


def test_images_of_which_most_was_told_come_first_and_no_more_than_asked_for() -> None:
    rows = [("a", "red", "present"), ("c", "red", "absent"), ("c", "round", "present")]
    assert list(chosen(experts(*rows))) == ["c", "a"]
    assert list(chosen(experts(*rows), n=1)) == ["c"]
    assert chosen(experts(*rows), n=0) == {}


def test_an_image_that_cannot_be_read_gives_its_place_to_the_next() -> None:
    rows = [("b", "red", "present"), ("b", "round", "present"), ("a", "red", "present")]
    assert list(chosen(experts(*rows), n=1)) == ["a"]


def test_examples_are_encoded_like_the_images_they_stand_before() -> None:
    rows = experts(("a", "red", "present"))
    for changes, kind, size in (
        ({}, "JPEG", (400, 300)),
        ({"image_side_px": 40, "image_format": "PNG"}, "PNG", (40, 30)),
    ):
        with Image.open(io.BytesIO(chosen(rows, **changes)["a"].image)) as image:
            assert (image.format, image.size) == (kind, size)


def test_without_experts_there_are_no_examples() -> None:
    assert chosen(JUDGEMENTS.empty()) == {}
