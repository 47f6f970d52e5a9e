from __future__ import annotations

import jsonschema
from hypothesis import given
from hypothesis import strategies as st

from annotation.vlm.questions import in_chunks, questions_of, select
from annotation.vlm.schema import judgement_schema
from data_contracts.concepts import Concept, Vocabulary

ROUND = Concept("round", "round", "As wide as long.", "nucleus shape")
OVAL = Concept("oval", "oval", "", "nucleus shape", ("egg-shaped",), "a kidney shape")
RED = Concept("red", "red", "Redness.")
PALE = Concept("pale", "pale", "", "colour")


def test_each_concept_is_one_question_and_each_group_one_choice_in_order() -> None:
    found = questions_of(Vocabulary.of([ROUND, RED, OVAL]))
    assert [(q.question_id, q.attribute, q.concept_ids) for q in found] == [
        ("choice-nucleus-shape", "nucleus shape", ("round", "oval")),
        ("red", None, ("red",)),
    ]


def test_a_group_with_a_single_asked_value_is_a_single_concept() -> None:
    assert [(q.question_id, q.attribute) for q in questions_of(Vocabulary.of([PALE, RED]))] == [
        ("pale", None),
        ("red", None),
    ]


def test_every_concept_is_asked_exactly_once() -> None:
    vocabulary = Vocabulary.of([ROUND, RED, OVAL, PALE])
    asked = [c for q in questions_of(vocabulary) for c in q.concept_ids]
    assert sorted(asked) == sorted(vocabulary.ids)


def test_a_question_says_all_that_is_known_and_nothing_that_is_not() -> None:
    choice, red = questions_of(Vocabulary.of([ROUND, OVAL, RED]))
    assert red.as_json() == {"id": "red", "name": "red", "definition": "Redness."}
    assert choice.as_json() == {
        "id": "choice-nucleus-shape",
        "attribute": "nucleus shape",
        "choice_of": [
            {"id": "round", "name": "round", "definition": "As wide as long."},
            {"id": "oval", "name": "oval", "also_called": ["egg-shaped"], "not_to_be_confused_with": "a kidney shape"},
        ],
    }


def test_a_choice_has_its_values_none_and_uncertain() -> None:
    (choice,) = questions_of(Vocabulary.of([ROUND, OVAL]))
    assert choice.choices == ("round", "oval", "none", "uncertain")


def test_a_value_called_none_is_not_the_choice_that_none_holds() -> None:
    none = Concept("none", "none", "", "nucleus shape")
    (choice,) = questions_of(Vocabulary.of([ROUND, none]))
    assert choice.choices == ("round", "none", "none-", "uncertain")
    assert choice.none == "none-"


def test_the_name_of_a_choice_never_meets_that_of_a_concept() -> None:
    taken = Concept("choice-nucleus-shape", "choice nucleus shape")
    found = questions_of(Vocabulary.of([ROUND, taken, OVAL]))
    names = [q.question_id for q in found]
    assert len(set(names)) == 2
    verdict = {"state": "present", "probability": 1, "evidence": ""}
    choice = {"choice": "round", "probability": 1, "evidence": ""}
    jsonschema.validate(dict(zip(names, (choice, verdict), strict=True)), judgement_schema(found))


def test_selected_questions_keep_their_own_order() -> None:
    found = questions_of(Vocabulary.of([ROUND, RED, OVAL, PALE]))
    assert [q.question_id for q in select(found, ["pale", "choice-nucleus-shape", "unknown"])] == [
        "choice-nucleus-shape",
        "pale",
    ]


@given(st.integers(0, 130), st.integers(1, 50))
def test_chunks_hold_everything_in_order_and_are_as_equal_as_possible(n: int, most: int) -> None:
    questions = questions_of(Vocabulary.of(Concept(f"c{i}", f"concept {i}") for i in range(n)))
    chunks = in_chunks(questions, most)
    assert tuple(q for chunk in chunks for q in chunk) == questions
    assert len(chunks) == -(-n // most)
    sizes = [len(chunk) for chunk in chunks] or [0]
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
