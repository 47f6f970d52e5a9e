from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotation.prompts import (
    CONCEPTS_MARK,
    EXAMPLE_MARK,
    IMAGE_MARK,
    Example,
    Framing,
    asked_sha256,
    judging_request,
    yes_no_request,
)
from annotation.vlm.questions import Question, questions_of
from annotation.vlm.schema import VlmRequest
from annotation.vlm.settings import VlmSettings
from data_contracts.concepts import Concept, Vocabulary
from data_contracts.tables import State

A, B = Concept("a", "first", "See a."), Concept("b", 'quo"te', "See b.")
ROUND, OVAL = Concept("r", "round", "", "shape"), Concept("o", "oval", "", "shape")
PLAIN = questions_of(Vocabulary.of([A, B]))
MIXED = questions_of(Vocabulary.of([A, ROUND, OVAL]))
SKIN = Framing("skin")
STATED = VlmSettings(base_url="http://x/v1", model="m").parameters
LOGPROBS = VlmSettings(base_url="http://x/v1", model="m", probability="logprobs").parameters


def text_of(request: VlmRequest) -> str:
    return "\n".join(p for p in request.parts if isinstance(p, str))


def listed(request: VlmRequest) -> list[dict[str, Any]]:
    return json.loads(text_of(request).split(CONCEPTS_MARK)[1])


# ---- all questions in one request ---------------------------------------------------------------------------------


def test_the_judging_question_lists_the_concepts_as_json() -> None:
    request = judging_request(b"image", PLAIN, SKIN, None)
    assert [(c["id"], c["name"]) for c in listed(request)] == [("a", "first"), ("b", 'quo"te')]
    assert request.schema is not None
    assert set(request.schema["properties"]) == {"a", "b"}
    assert [p for p in request.parts if isinstance(p, bytes)] == [b"image"]


def test_groups_are_asked_as_one_choice() -> None:
    request = judging_request(b"", MIXED, SKIN, None)
    assert [c["id"] for c in listed(request)] == ["a", "choice-shape"]
    assert [v["id"] for v in listed(request)[1]["choice_of"]] == ["r", "o"]
    assert request.schema is not None
    assert set(request.schema["properties"]) == {"a", "choice-shape"}


def test_only_the_kinds_of_question_that_are_asked_are_explained() -> None:
    choice = "exclude each other"
    concept = '"absent" when you can tell'
    explained = [
        (concept in text_of(r), choice in text_of(r))
        for r in (judging_request(b"", q, SKIN, None) for q in (PLAIN, MIXED, MIXED[1:]))
    ]
    assert explained == [(True, False), (True, True), (False, True)]


def test_the_prompt_hash_changes_with_words_but_not_with_the_image() -> None:
    base = judging_request(b"1", PLAIN, SKIN, None).prompt_sha256
    assert judging_request(b"2", PLAIN, SKIN, None).prompt_sha256 == base
    assert judging_request(b"1", PLAIN, Framing("lung"), None).prompt_sha256 != base
    assert judging_request(b"1", MIXED, SKIN, None).prompt_sha256 != base


def test_room_for_the_answer_grows_with_the_vocabulary() -> None:
    many = questions_of(Vocabulary.of(Concept(f"c{i}", f"concept {i}") for i in range(40)))
    assert judging_request(b"", many, SKIN, None).max_output_tokens > 40 * 40
    assert judging_request(b"", many, SKIN, 99).max_output_tokens == 99


@given(st.text(max_size=300))
def test_any_modality_stays_on_its_line(modality: str) -> None:
    first, second = text_of(judging_request(b"", PLAIN, Framing(modality), None)).split("\n")[:2]
    assert first.startswith("Modality:")
    assert second == ""


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_name_and_definition_stay_within_their_json(name: str, definition: str) -> None:
    question = Question("c", (Concept("c", name, definition),))
    (row,) = listed(judging_request(b"", [question], SKIN, None))
    assert row["id"] == "c"
    assert (row.get("name", ""), row.get("definition", "")) == (name, definition)


# ---- one word -----------------------------------------------------------------------------------------------------


def test_one_word_is_asked_about_one_concept_without_a_schema() -> None:
    request = yes_no_request(b"image", A, SKIN)
    assert (request.schema, request.top_logprobs > 1) == (None, True)
    assert "yes or no" in request.system
    assert "See a." in text_of(request)
    assert CONCEPTS_MARK not in text_of(request)
    assert request.parts[-1] == b"image"
    assert request.max_output_tokens <= 16


# ---- examples -----------------------------------------------------------------------------------------------------

BOTH = Example(b"first example", {"a": State.PRESENT, "b": State.ABSENT, "o": State.PRESENT, "r": State.ABSENT})
ONLY_A = Example(b"second example", {"a": State.ABSENT})


def answers(request: VlmRequest) -> list[dict[str, Any]]:
    marked = [p for p in request.parts if isinstance(p, str) and p.startswith(EXAMPLE_MARK)]
    return [json.loads(p.removeprefix(EXAMPLE_MARK)) for p in marked]


def test_examples_come_before_the_image_each_after_what_the_expert_said() -> None:
    request = judging_request(b"image", PLAIN, Framing("skin", (BOTH, ONLY_A)), None)
    kinds = [p if isinstance(p, bytes) else p.split(":")[0] for p in request.parts[1:]]
    mark = EXAMPLE_MARK.rstrip(":")
    assert kinds == [mark, b"first example", mark, b"second example", IMAGE_MARK.rstrip(":"), b"image"]
    assert answers(request) == [{"a": {"state": "present"}, "b": {"state": "absent"}}, {"a": {"state": "absent"}}]
    assert "the last image" in text_of(request)


def test_examples_say_only_what_is_asked() -> None:
    framing = Framing("skin", (BOTH, ONLY_A))
    request = judging_request(b"image", PLAIN[1:], framing, None)
    assert answers(request) == [{"b": {"state": "absent"}}]
    assert b"second example" not in request.parts


def test_an_example_of_a_group_tells_the_chosen_value() -> None:
    assert answers(judging_request(b"", MIXED[1:], Framing("skin", (BOTH,)), None)) == [
        {"choice-shape": {"choice": "o"}}
    ]
    without_choice = Example(b"e", {"o": State.ABSENT})
    assert answers(judging_request(b"", MIXED[1:], Framing("skin", (without_choice,)), None)) == []


def test_examples_that_say_nothing_of_the_question_leave_it_as_it_is() -> None:
    silent = Framing("skin", (Example(b"e", {"z": State.PRESENT}),))
    request = judging_request(b"image", PLAIN, silent, None)
    assert IMAGE_MARK not in request.parts
    assert [p for p in request.parts if isinstance(p, bytes)] == [b"image"]


def test_one_word_is_asked_with_examples_too() -> None:
    request = yes_no_request(b"image", B, Framing("skin", (BOTH, ONLY_A)))
    assert [p for p in request.parts if isinstance(p, str) and p.startswith(EXAMPLE_MARK)] == [f"{EXAMPLE_MARK} no"]
    assert request.parts[-1] == b"image"


def test_an_example_shows_no_pixels() -> None:
    assert "first example" not in repr(BOTH)


# ---- what was asked -----------------------------------------------------------------------------------------------


def sha(question: Question = PLAIN[0], framing: Framing = SKIN, parameters: dict[str, Any] = STATED) -> str:
    return asked_sha256(question, framing, parameters)


@pytest.mark.parametrize("parameters", [STATED, LOGPROBS])
def test_everything_that_bears_on_an_answer_is_in_its_hash(parameters: dict[str, Any]) -> None:
    def variant(framing: Framing = SKIN, more: dict[str, Any] | None = None, **change: Any) -> str:
        concept = Concept(**({"concept_id": "a", "name": "first", "definition": "See a."} | change))
        return sha(Question("a", (concept,)), framing, parameters | (more or {}))

    other_pixels = Example(b"other", BOTH.states)
    hashes = [
        variant(),
        variant(definition="See A."),
        variant(name="First"),
        variant(synonyms=("one",)),
        variant(contrast="two"),
        variant(Framing("lung")),
        variant(Framing("skin", (BOTH,))),
        variant(Framing("skin", (other_pixels,))),
        variant(Framing("skin", (ONLY_A,))),
        variant(more={"model": "n"}),
        variant(more={"temperature": 1}),
        variant(more={"image": [64, "PNG"]}),
    ]
    assert len(set(hashes)) == len(hashes)
    assert variant() == sha(PLAIN[0], SKIN, parameters)


def test_the_questions_beside_it_are_not() -> None:
    alone = questions_of(Vocabulary.of([A]))[0]
    assert sha(alone) == sha(PLAIN[0]) == sha(MIXED[0])


def test_a_group_changes_with_each_of_its_values() -> None:
    changed = questions_of(Vocabulary.of([A, ROUND, Concept("o", "oval", "Egg-shaped.", "shape")]))[1]
    longer = questions_of(Vocabulary.of([ROUND, OVAL, Concept("k", "kidney", "", "shape")]))[0]
    assert len({sha(q) for q in (MIXED[1], changed, longer)}) == 3


def test_one_word_and_json_are_different_questions() -> None:
    assert sha() != sha(parameters=LOGPROBS)
    assert sha(MIXED[1]) != sha(MIXED[1], parameters=LOGPROBS)
