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

from data_contracts.tables import State

MAX_EVIDENCE_CHARACTERS = 160
MAX_NAME_CHARACTERS = 120
MAX_DEFINITION_CHARACTERS = 400
MAX_PROPOSALS = 64

_FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL | re.IGNORECASE)
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
    TIMED_OUT = "timed_out"


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
    schema: Mapping[str, Any] = field(repr=False)
    max_output_tokens: int

    @property
    def prompt_sha256(self) -> str:
        """Hash of everything but the images: equal for all images asked the same question."""
        texts = [part for part in self.parts if isinstance(part, str)]
        return _sha256([self.system, texts, self.schema_name, self.schema])

    def sha256(self, parameters: Mapping[str, Any]) -> str:
        """Hash of all that decides the answer: texts, image bytes, schema, and model `parameters`."""
        parts = [p if isinstance(p, str) else {"image": hashlib.sha256(p).hexdigest()} for p in self.parts]
        limit = self.max_output_tokens
        return _sha256([self.system, parts, self.schema_name, self.schema, limit, dict(parameters)])


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


@dataclass(frozen=True)
class Proposal:
    """One concept as it was proposed."""

    name: str
    definition: str
    group: str | None = None


def judgement_schema(concept_ids: Sequence[str]) -> dict[str, Any]:
    """Strict JSON schema of a judging answer: one verdict under every concept id, nothing else."""
    verdict = _object(
        {
            "state": {"type": "string", "enum": [s.value for s in _ANSWERED_STATES]},
            "probability": {"type": "number", "minimum": 0, "maximum": 1},
            "evidence": {"type": "string"},
        }
    )
    answer = _object({concept_id: {"$ref": "#/$defs/verdict"} for concept_id in concept_ids})
    return {**answer, "$defs": {"verdict": verdict}}


def proposal_schema() -> dict[str, Any]:
    """Strict JSON schema of a proposing answer: a list of concepts."""
    concept = _object(
        {"name": {"type": "string"}, "definition": {"type": "string"}, "group": {"type": ["string", "null"]}}
    )
    return _object({"concepts": {"type": "array", "items": concept}})


def parse_judgements(text: str, concept_ids: Sequence[str]) -> dict[str, Verdict]:
    """A verdict for every asked concept; what is missing or malformed is `not_assessed`, what was not asked is ignored.

    Raises `AnswerFault` when nothing at all can be used.
    """
    content = _load(text)
    if not isinstance(content, dict) or not set(content) & set(concept_ids):
        raise AnswerFault(FaultCode.WRONG_SCHEMA)
    return {concept_id: _verdict(content.get(concept_id)) for concept_id in concept_ids}


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
    evidence = row.get("evidence")
    phrase = clean_text(evidence, MAX_EVIDENCE_CHARACTERS) if isinstance(evidence, str) else ""
    return Verdict(State(row["state"]), _probability(row.get("probability")), phrase or None)


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
    definition, group = row.get("definition"), row.get("group")
    return Proposal(
        name,
        clean_text(definition, MAX_DEFINITION_CHARACTERS) if isinstance(definition, str) else "",
        clean_text(group, MAX_NAME_CHARACTERS) or None if isinstance(group, str) else None,
    )


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def _sha256(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
