from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotation.proposal_prompts import CLASS_MARK, OTHERS_MARK, proposing_request
from annotation.vlm.schema import VlmRequest


def ask(class_name: str | None, others: tuple[bytes, ...] = (b"2",), **changes: Any) -> VlmRequest:
    words = {"n_concepts": 3, "name_characters": 30, "max_output_tokens": None} | changes
    return proposing_request(class_name, [b"1"], others, "skin", **words)


def texts(request: VlmRequest) -> list[str]:
    return [p for p in request.parts if isinstance(p, str)]


@given(st.text(min_size=1, max_size=200), st.text(min_size=1, max_size=200))
def test_class_names_are_quoted_and_cannot_add_lines(name: str, against: str) -> None:
    for other in (None, against):
        request = ask(name, against=other)
        reference = ask("x", against=None if other is None else "y")
        assert "\n".join(texts(request)).count("\n") == "\n".join(texts(reference)).count("\n")


@pytest.mark.parametrize(("others", "expected"), [((b"2",), 1), ((), 0)])
def test_others_are_announced_only_when_there_are_any(others: tuple[bytes, ...], expected: int) -> None:
    assert sum(t == f"{OTHERS_MARK}:" for t in texts(ask("x", others))) == expected


def test_a_pair_is_shown_one_after_the_other() -> None:
    request = ask("melanoma", against="nevus")
    question, first, image, second, other = request.parts
    assert 'tell the class "melanoma" from the class "nevus"' in str(question)
    assert str(first).startswith(CLASS_MARK)
    assert "melanoma" in str(first)
    assert str(second).startswith(OTHERS_MARK)
    assert "nevus" in str(second)
    assert (image, other) == (b"1", b"2")


def test_a_class_alone_is_asked_without_any_other_name() -> None:
    assert not any("nevus" in t for t in texts(ask("melanoma")))
    assert any('"melanoma"' in t for t in texts(ask("melanoma")))


def test_without_classes_nothing_is_said_of_a_class() -> None:
    assert not any("class" in t for t in texts(ask(None, ())))


def test_what_is_asked_for_is_in_the_question() -> None:
    request = ask("x", n_concepts=7, name_characters=21)
    assert "up to 7 visual concepts" in texts(request)[0]
    assert "at most 21 characters" in texts(request)[0]
    assert texts(request)[0].startswith("Modality: skin\n")


def test_room_for_the_answer_grows_with_the_number_of_concepts() -> None:
    few, many = ask("x", n_concepts=2), ask("x", n_concepts=20)
    assert many.max_output_tokens > few.max_output_tokens > 200
    assert ask("x", max_output_tokens=99).max_output_tokens == 99
