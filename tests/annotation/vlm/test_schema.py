from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotation.vlm.questions import Question
from annotation.vlm.schema import (
    MAX_EVIDENCE_CHARACTERS,
    MAX_SYNONYMS,
    AnswerFault,
    FaultCode,
    Usage,
    Verdict,
    VlmRequest,
    clean_text,
    judgement_schema,
    parse_judgements,
    parse_proposals,
    proposal_schema,
    verdict_of_yes_no,
)
from data_contracts.concepts import Concept
from data_contracts.tables import ProbabilitySource, State

VERDICT = {"state": "present", "probability": 0.75, "evidence": "dark middle"}
SINGLES = tuple(Question(i, (Concept(i, i.upper()),)) for i in ("a", "b"))
SHAPES = tuple(Concept(i, name, "", "nucleus shape") for i, name in (("r", "round shape"), ("o", "oval"), ("x", "X")))
SHAPE = Question("choice-nucleus-shape", SHAPES, "nucleus shape")
MIXED = (*SINGLES, SHAPE)


def chosen(row: Any, question: Question = SHAPE) -> dict[str, Verdict]:
    return parse_judgements(json.dumps({question.question_id: row}), [question])


def states(verdicts: dict[str, Verdict]) -> dict[str, str]:
    return {concept_id: v.state.value for concept_id, v in verdicts.items()}


# ---- single concepts ----------------------------------------------------------------------------------------------


def test_the_judging_schema_is_valid_and_accepts_only_one_verdict_per_asked_concept() -> None:
    schema = judgement_schema(SINGLES)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate({"a": VERDICT, "b": VERDICT}, schema)
    for wrong in ({"a": VERDICT}, {"a": VERDICT, "b": VERDICT, "c": VERDICT}, {"a": VERDICT, "b": {"state": "maybe"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_the_proposing_schema_is_valid() -> None:
    concept = {"name": "n", "definition": "d", "group": None, "synonyms": ["m"], "contrast": None}
    jsonschema.Draft202012Validator.check_schema(proposal_schema())
    jsonschema.validate({"concepts": [concept, concept | {"group": "shape", "contrast": "c"}]}, proposal_schema())


def objects(schema: Any) -> Any:
    """Every object schema within a schema."""
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for value in schema.values():
            yield from objects(value)


@pytest.mark.parametrize("schema", [judgement_schema(MIXED), proposal_schema()])
def test_schemas_keep_what_strict_endpoints_demand(schema: dict[str, Any]) -> None:
    # OpenAI's structured outputs: every field required, no further ones, and at the root an object.
    found = list(objects(schema))
    assert found[0] is schema
    for part in found:
        assert part["required"] == list(part["properties"])
        assert part["additionalProperties"] is False


@pytest.mark.parametrize("wrap", ["{}", "```json\n{}\n```", "Here you are:\n```\n{}\n```\nGood luck."])
def test_json_is_found_bare_and_in_code_fences(wrap: str) -> None:
    text = wrap.replace("{}", json.dumps({"a": VERDICT, "b": VERDICT}))
    found = parse_judgements(text, SINGLES)["a"]
    assert found == Verdict(State.PRESENT, 0.75, "dark middle", ProbabilitySource.STATED)


def test_missing_concepts_are_not_assessed_and_unasked_ones_are_ignored() -> None:
    found = parse_judgements(json.dumps({"a": VERDICT, "pneumonia": VERDICT}), SINGLES)
    assert set(found) == {"a", "b"}
    assert found["b"] == Verdict(State.NOT_ASSESSED)


@pytest.mark.parametrize("row", [None, "present", {"state": "maybe"}, {"state": "not_assessed"}, {}, 1, []])
def test_a_malformed_verdict_is_not_assessed(row: object) -> None:
    assert parse_judgements(json.dumps({"a": VERDICT, "b": row}), SINGLES)["b"].state is State.NOT_ASSESSED


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1.5", "-0.1", '"0.5"', "true", "null"])
def test_an_impossible_probability_is_none_without_a_source_and_the_state_stays(number: str) -> None:
    text = '{"a": {"state": "absent", "probability": NUMBER, "evidence": ""}}'.replace("NUMBER", number)
    assert parse_judgements(text, SINGLES)["a"] == Verdict(State.ABSENT, None, None, None)


def test_two_answers_for_one_concept_are_no_answer() -> None:
    text = '{"a": {"state": "absent"}, "a": {"state": "present"}, "b": {"state": "present"}}'
    assert parse_judgements(text, SINGLES)["a"].state is State.NOT_ASSESSED


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
        parse_judgements(text, SINGLES)
    assert caught.value.code is code


@given(
    st.text(max_size=200)
    | st.recursive(
        st.none() | st.floats() | st.text() | st.sampled_from(["r", "none", "present"]),
        lambda c: st.dictionaries(
            st.sampled_from(["a", SHAPE.question_id, "state", "choice", "probability", "evidence"]), c
        ),
    ).map(json.dumps)
)
def test_any_text_gives_verdicts_or_a_fault(text: str) -> None:
    try:
        found = parse_judgements(text, MIXED)
    except AnswerFault:
        return
    assert set(found) == {"a", "b", "r", "o", "x"}
    for verdict in found.values():
        assert verdict.probability is None or (math.isfinite(verdict.probability) and 0 <= verdict.probability <= 1)
        assert (verdict.probability is None) == (verdict.source is None)
    assert sum(found[c].state is State.PRESENT for c in SHAPE.concept_ids) <= 1
    assert sum(found[c].probability or 0 for c in SHAPE.concept_ids) <= 1 + 1e-9


# ---- exclusive groups ---------------------------------------------------------------------------------------------


def test_a_group_is_one_choice_in_the_schema() -> None:
    schema = judgement_schema(MIXED)
    jsonschema.Draft202012Validator.check_schema(schema)
    row = {"choice": "o", "probability": 0.7, "evidence": "longer than wide"}
    singles = {"a": VERDICT, "b": VERDICT}
    for choice in ("r", "o", "x", "none", "uncertain"):
        jsonschema.validate(singles | {SHAPE.question_id: row | {"choice": choice}}, schema)
    for wrong in (VERDICT, row | {"choice": "square"}, row | {"choice": "oval shape"}, {"choice": "o"}, ["o"]):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(singles | {SHAPE.question_id: wrong}, schema)


def test_the_chosen_value_is_present_and_the_others_share_what_is_left() -> None:
    found = chosen({"choice": "o", "probability": 0.7, "evidence": "longer"})
    assert found["o"] == Verdict(State.PRESENT, 0.7, "longer", ProbabilitySource.STATED)
    assert found["r"] == found["x"]
    assert found["r"] == Verdict(State.ABSENT, pytest.approx(0.15), "longer", ProbabilitySource.EXCLUDED)


def test_a_choice_without_a_probability_leaves_none_to_the_others() -> None:
    found = chosen({"choice": "o"})
    assert found["o"] == Verdict(State.PRESENT)
    assert found["r"] == Verdict(State.ABSENT)


def test_none_of_them_makes_all_absent() -> None:
    found = chosen({"choice": "none", "probability": 0.9})
    assert states(found) == dict.fromkeys("rox", "absent")
    assert sum(v.probability or 0 for v in found.values()) == pytest.approx(0.1)


def test_uncertain_makes_all_uncertain_without_a_probability() -> None:
    found = chosen({"choice": "uncertain", "probability": 0.5, "evidence": "blurred"})
    assert set(found.values()) == {Verdict(State.UNCERTAIN, None, "blurred")}


@pytest.mark.parametrize("word", ["oval", "Oval", " OVAL ", "O"])
def test_a_value_may_be_chosen_by_its_name_or_in_capitals(word: str) -> None:
    assert states(chosen({"choice": word})) == {"r": "absent", "o": "present", "x": "absent"}


@pytest.mark.parametrize(("word", "state"), [("None", "absent"), ("UNCERTAIN", "uncertain")])
def test_none_and_uncertain_may_be_in_capitals_too(word: str, state: str) -> None:
    assert states(chosen({"choice": word})) == dict.fromkeys("rox", state)


@pytest.mark.parametrize("row", [None, "o", {}, {"choice": "square"}, {"choice": 1}, {"choice": None}, ["o"], VERDICT])
def test_a_malformed_choice_is_not_assessed_for_every_value(row: object) -> None:
    found = parse_judgements(json.dumps({"a": VERDICT, SHAPE.question_id: row}), MIXED)
    assert {found[c].state for c in SHAPE.concept_ids} == {State.NOT_ASSESSED}
    assert found["a"].state is State.PRESENT


def test_a_value_that_is_itself_called_none_or_uncertain_is_that_value() -> None:
    values = tuple(Concept(i, i, "", "vacuoles") for i in ("none", "uncertain", "many"))
    question = Question("choice-vacuoles", values, "vacuoles")
    schema = judgement_schema([question])
    choice = schema["properties"]["choice-vacuoles"]["properties"]["choice"]
    assert sorted(choice["enum"]) == ["many", "none", "none-", "uncertain", "uncertain-"]
    for word in ("none", "uncertain"):
        found = chosen({"choice": word, "probability": 0.8}, question)
        assert [c for c, v in found.items() if v.state is State.PRESENT] == [word]
        assert found["many"].state is State.ABSENT
    assert {v.state for v in chosen({"choice": "none-", "probability": 0.8}, question).values()} == {State.ABSENT}
    assert {v.state for v in chosen({"choice": "uncertain-"}, question).values()} == {State.UNCERTAIN}


@pytest.mark.parametrize(("state", "probability"), [("absent", 0.95), ("present", 0.1)])
def test_a_probability_against_its_own_state_is_no_probability_of_presence(state: str, probability: float) -> None:
    question = Question("a", (Concept("a", "a"),))
    text = json.dumps({"a": {"state": state, "probability": probability, "evidence": ""}})
    assert parse_judgements(text, [question])["a"] == Verdict(State(state), None, None, None)


# ---- one word -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("yes", "no", "state"),
    [(0.9, 0.1, State.PRESENT), (0.1, 0.9, State.ABSENT), (0.5, 0.5, State.UNCERTAIN), (0.41, 0.59, State.UNCERTAIN)],
)
def test_the_probability_is_yes_against_no(yes: float, no: float, state: State) -> None:
    found = verdict_of_yes_no([("yes", math.log(yes / 2)), ("no", math.log(no / 2)), ("well", math.log(0.5))])
    assert found == Verdict(state, pytest.approx(yes), None, ProbabilitySource.LOGPROBS)


def test_all_spellings_of_a_word_are_summed() -> None:
    top = [(token, math.log(0.1)) for token in ("Yes", " yes", "▁YES", "Ġyes", "Yes.", "no", "nothing", "yesterday")]
    assert verdict_of_yes_no(top).probability == pytest.approx(5 / 6)


@pytest.mark.parametrize("top", [[], [("maybe", -0.1), ("I", -2.0)]])
def test_without_either_word_there_is_no_verdict(top: list[tuple[str, float]]) -> None:
    with pytest.raises(AnswerFault) as caught:
        verdict_of_yes_no(top)
    assert caught.value.code is FaultCode.WRONG_SCHEMA


def test_one_word_alone_is_certain_and_impossible_numbers_do_no_harm() -> None:
    assert verdict_of_yes_no([("no", -0.5)]).probability == 0
    with pytest.raises(AnswerFault):
        verdict_of_yes_no([("yes", -math.inf), ("no", -9999.0)])
    assert verdict_of_yes_no([("yes", 1e9), ("yes", math.inf), ("no", math.nan)]).probability == 1


# ---- texts --------------------------------------------------------------------------------------------------------


@given(st.text(max_size=600))
def test_clean_text_is_one_short_line_without_control_characters(text: str) -> None:
    cleaned = clean_text(text, 40)
    assert len(cleaned) <= 40
    assert all(c.isprintable() for c in cleaned)


def test_evidence_is_limited_and_stripped_of_controls() -> None:
    row = VERDICT | {"evidence": "line\nbreak\x1b[31m\u202e " + "x" * 1000}
    evidence = parse_judgements(json.dumps({"a": row}), SINGLES)["a"].evidence
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


def test_proposals_bring_synonyms_and_a_contrast() -> None:
    full = {"name": "n", "synonyms": ["one\ntwo", "", 3, *["more"] * 20], "contrast": "a fold", "group": "shape"}
    odd = {"name": "m", "synonyms": "one", "contrast": 7}
    first, second = parse_proposals(json.dumps([full, odd]))
    assert (first.synonyms[0], first.contrast, first.group) == ("one two", "a fold", "shape")
    assert len(first.synonyms) <= MAX_SYNONYMS
    assert (second.synonyms, second.contrast) == ((), "")


def test_proposals_may_come_as_a_bare_list() -> None:
    assert [p.name for p in parse_proposals('["one", "two"]')] == ["one", "two"]


def test_no_list_of_concepts_is_a_fault() -> None:
    with pytest.raises(AnswerFault):
        parse_proposals('{"concepts": "many"}')


# ---- requests -----------------------------------------------------------------------------------------------------


def test_request_hashes_depend_on_what_decides_the_answer() -> None:
    def request(text: str = "t", image: bytes = b"image", limit: int = 100, **more: Any) -> VlmRequest:
        return VlmRequest("s", (text, image), "n", more.pop("schema", {"type": "object"}), limit, **more)

    base = request()
    assert base.prompt_sha256 == request(image=b"other").prompt_sha256
    assert base.sha256({"model": "m"}) == request().sha256({"model": "m"})
    others = [
        request(text="u"),
        request(image=b"other"),
        request(limit=101),
        request(schema={"type": "array"}),
        request(schema=None),
        request(top_logprobs=5),
        request(sample=1),
    ]
    assert len({r.sha256({"model": "m"}) for r in (base, *others)} | {base.sha256({"model": "n"})}) == 9


def test_a_text_never_passes_for_an_image() -> None:
    image = VlmRequest("s", (b"t",), "n", {}, 1).sha256({})
    assert VlmRequest("s", ("t",), "n", {}, 1).sha256({}) != image


def test_a_request_shows_no_pixels() -> None:
    assert "image" not in repr(VlmRequest("s", ("t", b"image"), "n", {}, 1))


def test_tokens_add_up() -> None:
    assert Usage(1, 2) + Usage(10, 20) == Usage(11, 22)
