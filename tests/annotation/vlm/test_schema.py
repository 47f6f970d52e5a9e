from __future__ import annotations

import json
import math

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotation.vlm.schema import (
    MAX_EVIDENCE_CHARACTERS,
    AnswerFault,
    FaultCode,
    Verdict,
    VlmRequest,
    clean_text,
    judgement_schema,
    parse_judgements,
    parse_proposals,
    proposal_schema,
)
from data_contracts.tables import State

VERDICT = {"state": "present", "probability": 0.75, "evidence": "dark middle"}
IDS = ["a", "b"]


def test_the_judging_schema_is_valid_and_accepts_only_one_verdict_per_asked_concept() -> None:
    schema = judgement_schema(IDS)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate({"a": VERDICT, "b": VERDICT}, schema)
    for wrong in ({"a": VERDICT}, {"a": VERDICT, "b": VERDICT, "c": VERDICT}, {"a": VERDICT, "b": {"state": "maybe"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_the_proposing_schema_is_valid() -> None:
    jsonschema.validate({"concepts": [{"name": "n", "definition": "d", "group": None}]}, proposal_schema())


@pytest.mark.parametrize("wrap", ["{}", "```json\n{}\n```", "Here you are:\n```\n{}\n```\nGood luck."])
def test_json_is_found_bare_and_in_code_fences(wrap: str) -> None:
    text = wrap.replace("{}", json.dumps({"a": VERDICT, "b": VERDICT}))
    assert parse_judgements(text, IDS)["a"] == Verdict(State.PRESENT, 0.75, "dark middle")


def test_missing_concepts_are_not_assessed_and_unasked_ones_are_ignored() -> None:
    found = parse_judgements(json.dumps({"a": VERDICT, "pneumonia": VERDICT}), IDS)
    assert set(found) == set(IDS)
    assert found["b"] == Verdict(State.NOT_ASSESSED)


@pytest.mark.parametrize("row", [None, "present", {"state": "maybe"}, {"state": "not_assessed"}, {}, 1, []])
def test_a_malformed_verdict_is_not_assessed(row: object) -> None:
    assert parse_judgements(json.dumps({"a": VERDICT, "b": row}), IDS)["b"].state is State.NOT_ASSESSED


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1.5", "-0.1", '"0.5"', "true", "null"])
def test_an_impossible_probability_is_none_and_the_state_stays(number: str) -> None:
    text = '{"a": {"state": "absent", "probability": NUMBER, "evidence": ""}}'.replace("NUMBER", number)
    assert parse_judgements(text, IDS)["a"] == Verdict(State.ABSENT, None, None)


def test_two_answers_for_one_concept_are_no_answer() -> None:
    text = '{"a": {"state": "absent"}, "a": {"state": "present"}, "b": {"state": "present"}}'
    assert parse_judgements(text, IDS)["a"].state is State.NOT_ASSESSED


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", FaultCode.EMPTY_ANSWER),
        ("  \n", FaultCode.EMPTY_ANSWER),
        ("I see a cell.", FaultCode.INVALID_JSON),
        ('{"a": {"state": "present"', FaultCode.INVALID_JSON),
        ("[" * 100_000, FaultCode.INVALID_JSON),
        ("[1, 2]", FaultCode.WRONG_SCHEMA),
        ('{"other": 1}', FaultCode.WRONG_SCHEMA),
        ("null", FaultCode.WRONG_SCHEMA),
    ],
)
def test_an_unusable_answer_has_its_code(text: str, code: FaultCode) -> None:
    with pytest.raises(AnswerFault) as caught:
        parse_judgements(text, IDS)
    assert caught.value.code is code


@given(
    st.text(max_size=200)
    | st.recursive(
        st.none() | st.floats() | st.text(), lambda c: st.dictionaries(st.sampled_from(["a", "state", "x"]), c)
    ).map(json.dumps)
)
def test_any_text_gives_verdicts_or_a_fault(text: str) -> None:
    try:
        found = parse_judgements(text, IDS)
    except AnswerFault:
        return
    assert set(found) == set(IDS)
    for verdict in found.values():
        assert verdict.probability is None or (math.isfinite(verdict.probability) and 0 <= verdict.probability <= 1)


@given(st.text(max_size=600))
def test_clean_text_is_one_short_line_without_control_characters(text: str) -> None:
    cleaned = clean_text(text, 40)
    assert len(cleaned) <= 40
    assert all(c.isprintable() for c in cleaned)


def test_evidence_is_limited_and_stripped_of_controls() -> None:
    row = VERDICT | {"evidence": "line\nbreak\x1b[31m\u202e " + "x" * 1000}
    evidence = parse_judgements(json.dumps({"a": row}), IDS)["a"].evidence
    assert evidence is not None
    assert evidence.startswith("line break [31m")
    assert len(evidence) <= MAX_EVIDENCE_CHARACTERS


def test_proposals_are_cleaned_and_nonsense_is_left_out() -> None:
    rows = [
        {"name": " Dark centre. ", "definition": "d", "group": ""},
        {"name": "…"},
        "bare name",
        3,
        {"definition": "x"},
    ]
    found = parse_proposals(json.dumps({"concepts": rows}))
    assert [(p.name, p.group) for p in found] == [("Dark centre", None), ("bare name", None)]


def test_proposals_may_come_as_a_bare_list() -> None:
    assert [p.name for p in parse_proposals('["one", "two"]')] == ["one", "two"]


def test_no_list_of_concepts_is_a_fault() -> None:
    with pytest.raises(AnswerFault):
        parse_proposals('{"concepts": "many"}')


def test_request_hashes_depend_on_what_decides_the_answer() -> None:
    base = VlmRequest("s", ("t", b"image"), "n", {"type": "object"}, 100)
    other_image = VlmRequest("s", ("t", b"other"), "n", {"type": "object"}, 100)
    assert base.prompt_sha256 == other_image.prompt_sha256
    assert base.sha256({"model": "m"}) == VlmRequest("s", ("t", b"image"), "n", {"type": "object"}, 100).sha256(
        {"model": "m"}
    )
    hashes = {
        base.sha256({"model": "m"}),
        base.sha256({"model": "n"}),
        other_image.sha256({"model": "m"}),
        VlmRequest("s", ("u", b"image"), "n", {"type": "object"}, 100).sha256({"model": "m"}),
        VlmRequest("s", ("t", b"image"), "n", {"type": "array"}, 100).sha256({"model": "m"}),
        VlmRequest("s", ("t", b"image"), "n", {"type": "object"}, 101).sha256({"model": "m"}),
    }
    assert len(hashes) == 6


def test_a_request_shows_no_pixels() -> None:
    assert "image" not in repr(VlmRequest("s", ("t", b"image"), "n", {}, 1))
