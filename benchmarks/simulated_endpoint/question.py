"""What a request asks, read from its JSON schema and its images."""

from __future__ import annotations

import binascii
import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .names import (
    CHARACTERS_PER_TOKEN,
    MAX_TOP_LOGPROBS,
    NONE_OF_THEM,
    TOKENS_PER_IMAGE,
    TOKENS_PER_TILE,
    UNCERTAIN,
    JsonObject,
)
from .witness import Sight


class Refused(Exception):
    """A request that is answered with an error, in OpenAI's form."""

    def __init__(
        self, status: int, message: str, kind: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body: JsonObject = {"error": {"message": message, "type": kind, "param": None, "code": code}}
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class Question:
    """One chat request: what it asks, and how."""

    model: str
    text: str = field(repr=False)
    """Everything the user wrote."""
    sight: Sight
    """The last image."""
    n_prompt_tokens: int
    schema: Mapping[str, Any] | None = field(repr=False)
    """What shape the answer has; None: one word."""
    n_answers: int
    """How many samples are asked for."""
    salt: str
    """The request's seed where it samples; empty at temperature 0."""
    max_tokens: int | None
    n_top_logprobs: int | None
    """Log-probabilities asked for per token; None: none are."""
    key: str
    """Hash of the whole body, equal for a body that was sent in a batch or with other spacing."""


def read_question(body: bytes | Mapping[str, Any]) -> Question:
    """The question in a request body; raises `Refused`."""
    try:
        content = json.loads(body) if isinstance(body, bytes) else body
        return _question(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"The request could not be understood: {type(error).__name__}: {error}"
        raise Refused(400, message, "invalid_request_error") from error


def _question(content: Mapping[str, Any]) -> Question:
    texts: list[str] = []
    asked: list[str] = []
    sights: list[Sight] = []
    messages = []
    for message in content["messages"]:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts or []
        kept = [_read_part(part, texts, sights) for part in parts]
        asked += [part["text"] for part in kept if "text" in part and message["role"] == "user"]
        messages.append({**message, "content": kept})
    text = "\n".join(asked)
    form = content.get("response_format") or {}
    schema = form["json_schema"]["schema"] if form.get("type") == "json_schema" else None
    n_characters = sum(map(len, texts)) + (len(json.dumps(schema)) if schema else 0)
    samples = bool(content.get("temperature", 1))
    return Question(
        model=str(content["model"]),
        text=text,
        sight=sights[-1] if sights else Sight(),
        n_prompt_tokens=n_tokens(n_characters) + sum(_image_tokens(s.data) for s in sights),
        schema=schema if schema is not None else _schema_of_words(text, is_json=form.get("type") == "json_object"),
        n_answers=int(content.get("n") or 1),
        salt=f"{content.get('seed')}" if samples else "",
        max_tokens=content.get("max_completion_tokens") or content.get("max_tokens"),
        n_top_logprobs=_n_top_logprobs(content),
        key=_sha256_of({**content, "messages": messages}),
    )


def _read_part(part: Mapping[str, Any], texts: list[str], sights: list[Sight]) -> JsonObject:
    """The part with its image as a hash; texts and images are added to the lists."""
    if part["type"] == "text":
        texts.append(part["text"])
        return dict(part)
    url = part["image_url"]["url"]
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError("images must be data URLs")
    try:
        sights.append(Sight.of(binascii.a2b_base64(data)))
    except binascii.Error as error:
        raise ValueError("an image is no base64 text") from error
    return {"type": "image_url", "image_url": sights[-1].sha256}


def _n_top_logprobs(content: Mapping[str, Any]) -> int | None:
    if not content.get("logprobs"):
        if content.get("top_logprobs"):
            raise ValueError("top_logprobs needs logprobs to be true")
        return None
    asked = int(content.get("top_logprobs") or 0)
    if not 0 <= asked <= MAX_TOP_LOGPROBS:
        raise ValueError(f"top_logprobs: expected 0 to {MAX_TOP_LOGPROBS}, got {asked}")
    return asked


def _schema_of_words(text: str, *, is_json: bool) -> JsonObject | None:
    """A stand-in for the schema that a request left out: from a JSON list of questions in its words, if any."""
    found = re.search(r"\[\s*\{\s*\"id\"", text)
    if found is None:
        return {"properties": {"concepts": {"type": "array"}}} if is_json else None
    try:
        questions, _ = json.JSONDecoder().raw_decode(text, found.start())
    except ValueError:
        return None
    number, words = {"type": "number"}, {"type": "string"}
    properties: JsonObject = {}
    for question in questions:
        members = [c["id"] for c in question.get("choice_of", ())]
        enum = [*members, NONE_OF_THEM, UNCERTAIN] if members else ["present", "absent", UNCERTAIN]
        first = {"choice" if members else "state": {"enum": enum}}
        properties[question["id"]] = {"properties": {**first, "probability": number, "evidence": words}}
    return {"properties": properties}


def _image_tokens(data: bytes) -> int:
    """Tokens of one image as OpenAI counts its tiles at high detail."""
    width, height = _size_px(data)
    shrink = min(1.0, 2048 / max(width, height), 768 / min(width, height))
    tiles = math.ceil(round(width * shrink) / 512) * math.ceil(round(height * shrink) / 512)
    return TOKENS_PER_IMAGE + TOKENS_PER_TILE * tiles


def _size_px(data: bytes) -> tuple[int, int]:
    """Width and height from a PNG's or JPEG's head; one tile for anything else."""
    if data.startswith(b"\x89PNG") and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return max(width, 1), max(height, 1)
    place = 2 if data.startswith(b"\xff\xd8") else len(data)
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC}:
            height, width = struct.unpack(">HH", data[place + 5 : place + 9])
            return max(width, 1), max(height, 1)
        place += 2 + length
    return 512, 512


def n_tokens(n_characters: int) -> int:
    return math.ceil(n_characters / CHARACTERS_PER_TOKEN)


def _sha256_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
