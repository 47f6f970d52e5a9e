"""What is sent to a vision-language model and what may come back.

An answer is data: it can only ever become states, probabilities and short phrases. Whatever the endpoint
promises about JSON schemas, every answer is validated here again.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from annotation.vlm.questions import Question
from data_contracts.tables import ProbabilitySource, State

MAX_EVIDENCE_CHARACTERS = 160
MAX_NAME_CHARACTERS = 120
MAX_DEFINITION_CHARACTERS = 400
MAX_PROPOSALS = 64
MAX_SYNONYMS = 8

_FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL | re.IGNORECASE)
UNDECIDED = (0.4, 0.6)
"""Between these probabilities a judgement that has no state of its own counts as uncertain."""
_ANSWERED_STATES = (State.PRESENT, State.ABSENT, State.UNCERTAIN)


class FaultCode(StrEnum):
    """Why an image or a class has no usable answer."""

    INVALID_JSON = "invalid_json"
    WRONG_SCHEMA = "wrong_schema"
    CUT_OFF = "cut_off"
    REFUSED = "refused"
    EMPTY_ANSWER = "empty_answer"
    REQUEST_REFUSED = "request_refused"
    SERVER_ERROR = "server_error"
    CONNECTION_LOST = "connection_lost"
    TIMED_OUT = "timed_out"
    NOT_ANSWERED = "not_answered"
    """Nothing was wrong with the request; no answer is in the journal yet (batches)."""


class AnswerFault(ValueError):
    """An answer that cannot be used, with its code; never leaves the vision-language half."""

    def __init__(self, code: FaultCode) -> None:
        super().__init__(code.value)
        self.code = code


@dataclass(frozen=True)
class VlmRequest:
    """One request: instructions, then texts and encoded images in order, then the shape of the answer."""

    system: str
    parts: tuple[str | bytes, ...] = field(repr=False)
    schema_name: str
    schema: Mapping[str, Any] | None = field(repr=False)
    """JSON schema of the answer; None: one word is expected."""
    max_output_tokens: int
    top_logprobs: int = 0
    """How many log-probabilities per token are asked for; 0: none."""
    sample: int = 0
    """Which of several answers to the same question this is; added to the seed."""

    @property
    def prompt_sha256(self) -> str:
        """Hash of everything but the images: equal for all images asked the same question."""
        texts = [part for part in self.parts if isinstance(part, str)]
        return sha256_of([self.system, texts, self.schema_name, self.schema, self.top_logprobs])

    def sha256(self, parameters: Mapping[str, Any]) -> str:
        """Hash of all that decides the answer: texts, image bytes, schema, and model `parameters`."""
        parts = [p if isinstance(p, str) else {"image": hashlib.sha256(p).hexdigest()} for p in self.parts]
        rest = [self.schema_name, self.schema, self.top_logprobs, self.max_output_tokens, self.sample, dict(parameters)]
        return sha256_of([self.system, parts, *rest])


@dataclass(frozen=True)
class Usage:
    """Tokens as the endpoint counted them."""

    input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.input_tokens + other.input_tokens, self.output_tokens + other.output_tokens)


@dataclass(frozen=True)
class Verdict:
    """What was said of one concept in one image."""

    state: State
    probability: float | None = None
    evidence: str | None = None
    source: ProbabilitySource | None = None
    """How the probability came about; None where there is none."""


@dataclass(frozen=True)
class Proposal:
    """One concept as it was proposed."""

    name: str
    definition: str
    group: str | None = None
    synonyms: tuple[str, ...] = ()
    contrast: str = ""


def judgement_schema(questions: Sequence[Question]) -> dict[str, Any]:
    """Strict JSON schema of a judging answer: one answer under every question's id, nothing else."""
    verdict = _object(
        {
            "state": {"type": "string", "enum": [s.value for s in _ANSWERED_STATES]},
            "probability": {"type": "number", "minimum": 0, "maximum": 1},
            "evidence": {"type": "string"},
        }
    )
    properties = {
        q.question_id: {"$ref": "#/$defs/verdict"} if q.attribute is None else _choice_schema(q) for q in questions
    }
    return {**_object(properties), "$defs": {"verdict": verdict}}


def proposal_schema() -> dict[str, Any]:
    """Strict JSON schema of a proposing answer: a list of concepts."""
    text = {"type": "string"}
    concept = _object(
        {
            "name": text,
            "definition": text,
            "group": {"type": ["string", "null"]},
            "synonyms": {"type": "array", "items": text},
            "contrast": {"type": ["string", "null"]},
        }
    )
    return _object({"concepts": {"type": "array", "items": concept}})


def parse_judgements(text: str, questions: Sequence[Question]) -> dict[str, Verdict]:
    """A verdict for every concept asked; what is missing or malformed is `not_assessed`, the unasked is ignored.

    Raises `AnswerFault` when nothing at all can be used.
    """
    content = _load(text)
    if not isinstance(content, dict) or not any(q.question_id in content for q in questions):
        raise AnswerFault(FaultCode.WRONG_SCHEMA)
    verdicts: dict[str, Verdict] = {}
    for question in questions:
        row = content.get(question.question_id)
        if question.attribute is None:
            verdicts[question.concepts[0].concept_id] = _verdict(row)
        else:
            verdicts |= _chosen(row, question)
    return verdicts


def verdict_of_yes_no(top: Sequence[tuple[str, float]]) -> Verdict:
    """The verdict in the log-probabilities of a one-word answer: p = yes / (yes + no), summed over spellings.

    A number between `UNDECIDED` counts as uncertain. Raises `AnswerFault` when neither word is among the tokens.
    """
    yes, no = _mass(top, {"yes", "y"}), _mass(top, {"no", "n"})
    if yes + no <= 0:
        raise AnswerFault(FaultCode.WRONG_SCHEMA)
    probability = yes / (yes + no)
    low, high = UNDECIDED
    state = State.PRESENT if probability > high else State.ABSENT if probability < low else State.UNCERTAIN
    return Verdict(state, probability, None, ProbabilitySource.LOGPROBS)


def parse_proposals(text: str) -> list[Proposal]:
    """The proposed concepts, cleaned and in order; raises `AnswerFault` when there is no list of concepts."""
    content = _load(text)
    rows = content.get("concepts") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise AnswerFault(FaultCode.WRONG_SCHEMA)
    found = [_proposal(row) for row in rows[:MAX_PROPOSALS]]
    return [proposal for proposal in found if proposal is not None]


def clean_text(text: str, max_characters: int) -> str:
    """One line of at most `max_characters`, without control, format or private-use characters."""
    visible = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text[: max_characters * 4])
    one_line = " ".join(visible.split())
    return one_line if len(one_line) <= max_characters else one_line[: max_characters - 1].rstrip() + "…"


def _load(text: str) -> Any:
    """The JSON value in an answer, also inside a code fence."""
    if not text.strip():
        raise AnswerFault(FaultCode.EMPTY_ANSWER)
    fenced = _FENCE.search(text)
    for candidate in (text, fenced.group(1) if fenced else ""):
        try:
            return json.loads(candidate, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError):
            continue
    raise AnswerFault(FaultCode.INVALID_JSON)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose repeated keys hold None: two answers to one question are no answer."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        result[key] = None if key in result else value
    return result


def _verdict(row: Any) -> Verdict:
    if not isinstance(row, dict) or row.get("state") not in _ANSWERED_STATES:
        return Verdict(State.NOT_ASSESSED)
    state, probability = State(row["state"]), _probability(row.get("probability"))
    if probability is not None and _contradicts(state, probability):
        # How sure it is of its answer, most likely, and not how likely the concept is present: nobody can tell.
        probability = None
    return Verdict(state, probability, _phrase(row), None if probability is None else ProbabilitySource.STATED)


def _contradicts(state: State, probability: float) -> bool:
    return (state is State.PRESENT and probability < 0.5) or (state is State.ABSENT and probability > 0.5)


def _chosen(row: Any, question: Question) -> dict[str, Verdict]:
    """One verdict per value of a group: the chosen one is present, so all others are absent."""
    choice = _choice(row, question)
    if choice is None:
        return dict.fromkeys(question.concept_ids, Verdict(State.NOT_ASSESSED))
    phrase, stated = _phrase(row), _probability(row.get("probability"))
    if choice == question.uncertain:
        return dict.fromkeys(question.concept_ids, Verdict(State.UNCERTAIN, None, phrase))
    others = [c for c in question.concept_ids if c != choice]
    # What the choice leaves over belongs to the others in equal parts; with two sides it is exactly the rest.
    left = None if stated is None else (1 - stated) / max(len(others), 1)
    excluded = Verdict(State.ABSENT, left, phrase, None if left is None else ProbabilitySource.EXCLUDED)
    verdicts = dict.fromkeys(others, excluded)
    if choice in question.concept_ids:
        source = None if stated is None else ProbabilitySource.STATED
        verdicts[choice] = Verdict(State.PRESENT, stated, phrase, source)
    return verdicts


def _choice(row: Any, question: Question) -> str | None:
    """The choice as an id; models also answer with a value's name, or in capitals, which means the same."""
    choice = row.get("choice") if isinstance(row, dict) else None
    if not isinstance(choice, str):
        return None
    by_name = {c.name.casefold(): c.concept_id for c in question.concepts}
    word = choice.strip().casefold()
    return choice if choice in question.choices else by_name.get(word, word if word in question.choices else None)


def _choice_schema(question: Question) -> dict[str, Any]:
    return _object(
        {
            "choice": {"type": "string", "enum": list(question.choices)},
            "probability": {"type": "number", "minimum": 0, "maximum": 1},
            "evidence": {"type": "string"},
        }
    )


def _phrase(row: Mapping[str, Any]) -> str | None:
    evidence = row.get("evidence")
    return (clean_text(evidence, MAX_EVIDENCE_CHARACTERS) or None) if isinstance(evidence, str) else None


def _mass(top: Sequence[tuple[str, float]], words: set[str]) -> float:
    """Probability of these words; numbers that are no log-probabilities weigh nothing, or as much as certainty."""
    return sum(math.exp(min(x, 0.0)) for token, x in top if _word(token) in words and not math.isnan(x))


def _word(token: str) -> str:
    """A token as a word: without the marks by which tokenizers write a leading space."""
    return token.strip(" \n\t▁Ġ.,:\"'*").casefold()


def _probability(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and 0 <= value <= 1 else None


def _proposal(row: Any) -> Proposal | None:
    if isinstance(row, str):
        row = {"name": row}
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        return None
    name = clean_text(row["name"], MAX_NAME_CHARACTERS).strip(" .,:;*-\"'")
    if not any(c.isalnum() for c in name):
        return None
    group, synonyms = row.get("group"), row.get("synonyms")
    return Proposal(
        name,
        _cleaned(row.get("definition"), MAX_DEFINITION_CHARACTERS),
        _cleaned(group, MAX_NAME_CHARACTERS) or None,
        tuple(filter(None, (_cleaned(s, MAX_NAME_CHARACTERS) for s in synonyms[:MAX_SYNONYMS])))
        if isinstance(synonyms, list)
        else (),
        _cleaned(row.get("contrast"), MAX_DEFINITION_CHARACTERS),
    )


def _cleaned(value: Any, max_characters: int) -> str:
    return clean_text(value, max_characters) if isinstance(value, str) else ""


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def sha256_of(value: Any) -> str:
    """Hex sha256 of a JSON-able value, independent of key order."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
