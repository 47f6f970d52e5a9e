from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotation.prompts import CONCEPTS_MARK, judging_request, proposing_request
from data_contracts.concepts import Concept, Vocabulary

PLAIN = Vocabulary.of([Concept("a", "first", "See a."), Concept("b", 'quo"te', "See b.")])
GROUPED = Vocabulary.of([Concept("r", "round", "", "shape"), Concept("o", "oval", "", "shape")])


def text_of(request: object) -> str:
    return "\n".join(p for p in request.parts if isinstance(p, str))  # type: ignore[attr-defined]


def test_the_judging_question_lists_the_concepts_as_json() -> None:
    request = judging_request(b"image", PLAIN, "skin", None)
    listed = json.loads(text_of(request).split(CONCEPTS_MARK)[1])
    assert [(c["id"], c["name"]) for c in listed] == [("a", "first"), ("b", 'quo"te')]
    assert set(request.schema["properties"]) == {"a", "b"}
    assert [p for p in request.parts if isinstance(p, bytes)] == [b"image"]


def test_groups_are_asked_as_one_choice() -> None:
    assert "exactly one" in text_of(judging_request(b"", GROUPED, "skin", None))
    assert "exactly one" not in text_of(judging_request(b"", PLAIN, "skin", None))


def test_the_prompt_hash_changes_with_words_but_not_with_the_image() -> None:
    base = judging_request(b"1", PLAIN, "skin", None).prompt_sha256
    assert judging_request(b"2", PLAIN, "skin", None).prompt_sha256 == base
    assert judging_request(b"1", PLAIN, "lung", None).prompt_sha256 != base
    assert judging_request(b"1", GROUPED, "skin", None).prompt_sha256 != base


def test_room_for_the_answer_grows_with_the_vocabulary() -> None:
    many = Vocabulary.of(Concept(f"c{i}", f"concept {i}") for i in range(40))
    assert judging_request(b"", many, "x", None).max_output_tokens > 40 * 40
    assert judging_request(b"", many, "x", 99).max_output_tokens == 99


@given(st.text(max_size=300))
def test_any_modality_stays_on_its_line(modality: str) -> None:
    first, second = text_of(judging_request(b"", PLAIN, modality, None)).split("\n")[:2]
    assert first.startswith("Modality:")
    assert second == ""


@given(st.text(min_size=1, max_size=200))
def test_a_class_name_is_quoted_and_cannot_add_lines(name: str) -> None:
    request = proposing_request(name, [b"1"], [b"2"], "x", n_concepts=3, name_characters=30, max_output_tokens=None)
    reference = proposing_request("x", [b"1"], [b"2"], "x", n_concepts=3, name_characters=30, max_output_tokens=None)
    assert text_of(request).count("\n") == text_of(reference).count("\n")


@pytest.mark.parametrize(("others", "expected"), [([b"2"], 1), ([], 0)])
def test_others_are_announced_only_when_there_are_any(others: list[bytes], expected: int) -> None:
    request = proposing_request("x", [b"1"], others, "x", n_concepts=3, name_characters=30, max_output_tokens=None)
    assert sum(p == "Images of other classes:" for p in request.parts) == expected


def test_without_classes_nothing_is_said_of_a_class() -> None:
    request = proposing_request(None, [b"1"], [], "x", n_concepts=3, name_characters=30, max_output_tokens=None)
    assert "class" not in text_of(request)
