"""A simulated vision-language endpoint: real HTTP in a process of its own, with known errors and faults on demand.

    python benchmarks/simulated_endpoint.py --latency-s 1.0 --latency-jitter-s 0.2 --truth truth.json --fault reset=0.1

Prints its address on one line when it is ready, listens on 127.0.0.1 only, and ends by itself. From Python:

    with Simulator("--latency-s", "1.0") as simulator:
        ...simulator.base_url, simulator.state(), simulator.set_faults({"reset": 0.2})

It speaks OpenAI's protocol: models, chat completions, files and batches (also under Azure's deployment paths). It
imports nothing of the product, and reads what is asked from the JSON schema of a request, not from its words. The
last image of a request is the one in question. Answers depend on `--seed`, the image and the concept alone, so asking
again gives the same answer; with `--wavering-share` some depend on the request's own `seed` when its temperature is
above 0.

Truth. `--truth FILE` is a JSON object {sha256 of the image bytes as sent: {concept_id: true or false}}; its key
"noise" may hold {concept_id: {"sensitivity": .., "specificity": ..}}. What it does not tell, and everything without a
file, is a pseudo-truth: a hash of image and concept, which is the same for every seed, so that two simulators are two
witnesses of one world. For a choice, the true value is right with its own sensitivity.
Questions whose id begins with `probe-` are answered from the pixels: colour and number of plain discs.

Faults. `--fault NAME=VALUE` (several times) and `POST /simulator/faults` with {NAME: VALUE, ...}, which replaces the
whole plan and starts its clock and counters anew. VALUE is a number or an object of these, all optional:

    share            0 to 1, which part of the requests is hit (default 1); a plain number means this
    first            only so many requests are hit, then no more
    from_s, for_s    a window of time, counted from the moment the plan was set
    on               path prefix of the requests that can be hit (default /v1/chat/completions)

Which requests are hit depends on `--seed` and on how many requests the fault has looked at, on nothing else.

    rate_limit            buckets of {"requests_per_minute", "tokens_per_minute", "burst_s": 60}: 429, Retry-After and
                          x-ratelimit headers; a plain number means requests_per_minute
    retry_after_s         the Retry-After of every 429, whatever the buckets say (a number of seconds)
    storm                 429 on every path for so many seconds (the plain number)
    burst_5xx             {"statuses": [500, 502, 503]}: either by hash
    insufficient_quota    429 with that code and no Retry-After
    unknown_model         404 as for a model that does not exist
    reset                 connection reset; {"when": "before" or "middle"}, else either by hash
    truncated_body        the connection closes in the middle of the promised body
    slow_loris            one byte each {"interval_s": 0.2}, for ever
    html_page             200 with a proxy's page
    huge_body             {"megabytes": 40}
    missing_concepts, extra_concepts, wrong_types, nan_probability       in the answer
    duplicate_keys, truncated_json, fenced_json, prose                   in its text
    refusal, empty_content (null or ""), cut_off (finish_reason length)  in the message
    die_after             the process ends hard after so many delivered answers (the plain number)
    batch_failed, batch_expired ({"done_share": 0.5})                    on /v1/batches, looked at when one is created

Faults of answer, text and message combine, and apply to the lines of a batch too; of the others the first one that
hits is served. rate_limit, retry_after_s and die_after hold for every request, without share or window.
`GET /simulator/state` counts what happened (see `Tally`).
"""

from __future__ import annotations

import argparse
import asyncio
import binascii
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

JsonObject: TypeAlias = dict[str, Any]

CHAT = "/v1/chat/completions"
DEFAULT_MODEL = "simulated-vlm"
PROBE_PREFIX = "probe-"
NONE_OF_THEM = "none"
UNCERTAIN = "uncertain"

_MAX_BODY_BYTES = 256 * 2**20
_MAX_HEAD_BYTES = 2**20
_MAX_BATCH_LINES = 50_000
_MAX_TOP_LOGPROBS = 20
_CHARACTERS_PER_TOKEN = 4
_TOKENS_PER_IMAGE = 85
_TOKENS_PER_TILE = 170
_DAY_S = 86_400


# --- What it sees and says: pure functions -------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """How often a simulated witness is right."""

    sensitivity: float = 0.9
    specificity: float = 0.9


@dataclass(frozen=True)
class Witness:
    """How the simulated model sees: what is true, and how it errs."""

    seed: int = 0
    noise: Noise = Noise()
    noise_of: Mapping[str, Noise] = field(default_factory=dict)
    """Concept id → its own noise, where it differs."""
    truth: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    """sha256 of the image → concept id → whether it is there."""
    prevalence: float = 0.4
    """Share of concepts that are there, where no truth is given."""
    uncertain_share: float = 0.0
    wavering_share: float = 0.0
    """Share of answers that depend on the request's seed."""
    is_blind: bool = False

    def is_there(self, image_sha256: str, concept_id: str) -> bool:
        """Whether the concept is truly there."""
        told = self.truth.get(image_sha256, {}).get(concept_id)
        return _pseudo_truth(image_sha256, concept_id) < self.prevalence if told is None else told

    def true_choice(self, image_sha256: str, members: Sequence[str]) -> str:
        """The member that truly holds, or `none`; a pseudo-truth always has one."""
        told = self.truth.get(image_sha256, {})
        if any(member in told for member in members):
            return next((member for member in members if told.get(member)), NONE_OF_THEM)
        return min(members, key=lambda member: _pseudo_truth(image_sha256, member), default=NONE_OF_THEM)


@dataclass(frozen=True)
class Sight:
    """The image in question, as it was sent."""

    sha256: str = ""
    data: bytes = field(default=b"", repr=False)

    @classmethod
    def of(cls, data: bytes) -> Self:
        """The sight of these image bytes."""
        return cls(hashlib.sha256(data).hexdigest(), data)


class Said(NamedTuple):
    """One answer: a state or a choice, how probable it is called, and why."""

    word: str
    probability: float
    evidence: str


def chance(*parts: object) -> float:
    """A number in [0, 1) that depends on nothing but `parts`."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def answer(schema: Mapping[str, Any], sight: Sight, witness: Witness, salt: str = "") -> JsonObject:
    """What the witness says to every property of the schema; `salt` tells apart samples of a wavering answer."""
    look = _Look(witness, Sight() if witness.is_blind else sight, salt)
    fields = _resolved(schema, schema).get("properties", {})
    return {name: _value(name, _resolved(spec, schema), schema, look) for name, spec in fields.items()}


def said_of_concept(concept_id: str, sight: Sight, witness: Witness, salt: str = "") -> Said:
    """Whether the witness sees one concept; the probability is that of its presence."""
    return _Look(witness, Sight() if witness.is_blind else sight, salt).state(concept_id)


@dataclass(frozen=True)
class _Look:
    witness: Witness
    sight: Sight
    salt: str

    def state(self, concept_id: str) -> Said:
        """Present, absent or uncertain."""
        if concept_id.startswith(PROBE_PREFIX) and not self.witness.is_blind:
            return self._probed_state(concept_id)
        draw = self._draws(concept_id)
        if next(draw) < self.witness.uncertain_share:
            return Said(UNCERTAIN, round(0.4 + 0.2 * next(draw), 3), "the image does not allow to tell")
        is_there = self.witness.is_there(self.sight.sha256, concept_id)
        noise = self.witness.noise_of.get(concept_id, self.witness.noise)
        is_right = next(draw) < (noise.sensitivity if is_there else noise.specificity)
        certainty = _certainty(is_right, next(draw))
        if is_there == is_right:
            return Said("present", round(certainty, 3), "clearly seen in the centre of the image")
        return Said("absent", round(1 - certainty, 3), "nothing of the kind in view")

    def choice(self, question_id: str, choices: Sequence[str]) -> Said:
        """One of the choices."""
        members = [c for c in choices if c not in {NONE_OF_THEM, UNCERTAIN}]
        if question_id.startswith(PROBE_PREFIX) and not self.witness.is_blind:
            return self._probed_choice(members)
        draw = self._draws(question_id)
        if next(draw) < self.witness.uncertain_share and UNCERTAIN in choices:
            return Said(UNCERTAIN, round(0.4 + 0.2 * next(draw), 3), "the image does not allow to tell")
        true = self.witness.true_choice(self.sight.sha256, members)
        noise = self.witness.noise_of.get(true, self.witness.noise)
        others = [c for c in choices if c not in {true, UNCERTAIN}]
        chance_of_right = noise.specificity if true == NONE_OF_THEM else noise.sensitivity
        is_right = next(draw) < chance_of_right or not others
        word = true if is_right else others[int(next(draw) * len(others))]
        return Said(word, round(_certainty(is_right, next(draw)), 3), "this fits best what is seen")

    def _draws(self, question_id: str) -> Iterator[float]:
        """Random numbers of this question; only a wavering answer depends on the salt."""
        key = (self.witness.seed, self.sight.sha256, question_id)
        salt = self.salt if self.salt and chance("wavers", *key) < self.witness.wavering_share else ""
        return (chance(n, *key, salt) for n in itertools.count())

    def _probed_state(self, concept_id: str) -> Said:
        colour, n_discs = discs(self.sight.data)
        if colour is None:
            return Said(UNCERTAIN, 0.5, "no disc in view")
        asks_number = "several" in concept_id
        is_there = n_discs > 1 if asks_number else colour in concept_id
        seen = f"{n_discs} discs" if asks_number else f"the disc is {colour}"
        return Said("present", 0.97, seen) if is_there else Said("absent", 0.03, seen)

    def _probed_choice(self, members: Sequence[str]) -> Said:
        colour, _ = discs(self.sight.data)
        if colour is None:
            return Said(UNCERTAIN, 0.5, "no disc in view")
        word = next((m for m in members if colour in m), NONE_OF_THEM)
        return Said(word, 0.97, f"the disc is {colour}")


def discs(data: bytes) -> tuple[str | None, int]:
    """Colour name and number of the plain discs in a drawn picture; (None, 0) when there is nothing coloured."""
    from PIL import Image  # noqa: PLC0415 - only probes need it, and starting must be quick

    try:
        picture = Image.open(io.BytesIO(data)).convert("RGB").resize((48, 48), Image.Resampling.BOX)
    except (OSError, ValueError, SyntaxError):
        return None, 0
    hues = {}
    for place, pixel in enumerate(struct.iter_unpack("3B", picture.tobytes())):
        if max(pixel) - min(pixel) > 60:
            hues[place] = _colour_name(*pixel)
    if not hues:
        return None, 0
    colour = Counter(hues.values()).most_common(1)[0][0]
    return colour, _n_blobs({place for place, name in hues.items() if name == colour}, picture.width)


def _colour_name(red: int, green: int, blue: int) -> str:
    top = max(red, green, blue)
    strong = (red > 0.6 * top, green > 0.6 * top, blue > 0.6 * top)
    names = {(True, False, False): "red", (False, True, False): "green", (False, False, True): "blue"}
    return names.get(strong) or {(True, True, False): "yellow", (True, False, True): "magenta"}.get(strong, "cyan")


def _n_blobs(places: set[int], width: int) -> int:
    """Connected groups of places that are no specks."""
    left, n_blobs = set(places), 0
    while left:
        group = [left.pop()]
        for place in group:
            near = {place - width, place + width, place - 1, place + 1} & left
            left -= near
            group += near
        n_blobs += len(group) >= 8
    return n_blobs


def _pseudo_truth(image_sha256: str, concept_id: str) -> float:
    return chance("truth", image_sha256, concept_id)


def _certainty(is_right: bool, draw: float) -> float:
    """How sure an answer is stated: wrong ones tend to be less sure, and some are as sure as any."""
    return 0.6 + 0.39 * (math.sqrt(draw) if is_right else draw**2)


def _resolved(spec: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema without references and alternatives: the first alternative that is not null."""
    while True:
        if "$ref" in spec:
            path = str(spec["$ref"]).removeprefix("#/").split("/")
            spec = root
            for step in path:
                spec = spec[step]
        elif options := spec.get("anyOf") or spec.get("oneOf"):
            spec = next((o for o in options if o.get("type") != "null"), options[0])
        else:
            return spec


def _value(name: str, spec: Mapping[str, Any], root: Mapping[str, Any], look: _Look) -> Any:
    if "enum" in spec:
        return _one_of(spec["enum"], look.choice(name, [str(c) for c in spec["enum"]]).word)
    if "const" in spec:
        return spec["const"]
    if "properties" in spec:
        return _object(name, {k: _resolved(v, root) for k, v in spec["properties"].items()}, root, look)
    kinds = spec.get("type", "string")
    kind = next((k for k in kinds if k != "null"), "null") if isinstance(kinds, list) else kinds
    if kind == "array":
        return _proposals(spec, root) if name == "concepts" else []
    said = look.state(name)
    plain = {"boolean": said.word == "present", "number": said.probability, "integer": 1, "null": None}
    return plain.get(kind, said.evidence)


def _object(name: str, fields: Mapping[str, Mapping[str, Any]], root: Mapping[str, Any], look: _Look) -> JsonObject:
    """A verdict, a choice, or an object of other things."""
    if "state" in fields:
        said, word_field = look.state(name), "state"
    elif "choice" in fields:
        said, word_field = look.choice(name, [str(c) for c in fields["choice"].get("enum", [])]), "choice"
    else:
        return {key: _value(key, spec, root, look) for key, spec in fields.items()}
    known: JsonObject = {
        word_field: _one_of(fields[word_field].get("enum", [said.word]), said.word),
        "probability": said.probability,
        "evidence": said.evidence,
    }
    return {key: known[key] if key in known else _value(key, spec, root, look) for key, spec in fields.items()}


def _one_of(allowed: Sequence[Any], word: str) -> Any:
    return word if word in allowed or not allowed else UNCERTAIN if UNCERTAIN in allowed else allowed[-1]


_PROPOSED = (
    ("round outline", "The outline of the main object is close to a circle.", "outline"),
    ("lobed outline", "The outline of the main object has two or more lobes.", "outline"),
    ("irregular outline", "The outline of the main object is jagged or uneven.", "outline"),
    ("purple colour", "Purple covers more than half of the main object.", "colour"),
    ("pink colour", "Pink covers more than half of the main object.", "colour"),
    ("granular texture", "Fine grains are spread over the main object.", None),
    ("bright centre", "The centre of the main object is brighter than its rim.", None),
    ("touches the border", "The main object is cut by the border of the image.", None),
)


def _proposals(spec: Mapping[str, Any], root: Mapping[str, Any]) -> list[JsonObject]:
    """A fixed list of concepts, with the fields that the schema names."""
    fields = _resolved(spec.get("items", {}), root).get("properties", {"name": {}, "definition": {}, "group": {}})
    rows = []
    for name, definition, group in _PROPOSED:
        known: JsonObject = {"name": name, "definition": definition, "group": group, "contrast": None}
        rows.append(
            {f: known.get(f, [] if _resolved(s, root).get("type") == "array" else "") for f, s in fields.items()}
        )
    return rows


# --- What a request asks ---------------------------------------------------------------------------------------------


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
        n_prompt_tokens=_n_tokens(n_characters) + sum(_image_tokens(s.data) for s in sights),
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
    if not 0 <= asked <= _MAX_TOP_LOGPROBS:
        raise ValueError(f"top_logprobs: expected 0 to {_MAX_TOP_LOGPROBS}, got {asked}")
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
    return _TOKENS_PER_IMAGE + _TOKENS_PER_TILE * tiles


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


def _n_tokens(n_characters: int) -> int:
    return math.ceil(n_characters / _CHARACTERS_PER_TOKEN)


def _sha256_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- Faults ----------------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    number: str = "share"
    """What a plain number stands for."""
    options: Mapping[str, Any] = {}
    """Its own parameters, with their defaults."""
    on: str = CHAT


IN_ANSWER = ("missing_concepts", "extra_concepts", "wrong_types", "nan_probability")
IN_TEXT = ("duplicate_keys", "truncated_json", "fenced_json", "prose")
IN_MESSAGE = ("refusal", "empty_content", "cut_off")
ON_THE_WIRE = ("reset", "truncated_body", "slow_loris", "html_page", "huge_body")

FAULTS: Mapping[str, _Kind] = {
    "rate_limit": _Kind(
        "requests_per_minute", {"requests_per_minute": math.inf, "tokens_per_minute": math.inf, "burst_s": 60.0}
    ),
    "retry_after_s": _Kind("seconds", {"seconds": 1.0}, "/v1/"),
    "storm": _Kind("for_s", {}, "/v1/"),
    "burst_5xx": _Kind("share", {"statuses": (500, 502, 503)}),
    "insufficient_quota": _Kind(),
    "unknown_model": _Kind(),
    "reset": _Kind("share", {"when": None}),
    "truncated_body": _Kind(),
    "slow_loris": _Kind("share", {"interval_s": 0.2}),
    "html_page": _Kind(),
    "huge_body": _Kind("share", {"megabytes": 40}),
    **{name: _Kind() for name in (*IN_ANSWER, *IN_TEXT, *IN_MESSAGE)},
    "die_after": _Kind("answers", {"answers": 1}),
    "batch_failed": _Kind("share", {}, "/v1/batches"),
    "batch_expired": _Kind("share", {"done_share": 0.5}, "/v1/batches"),
}
"""Every fault that can be asked for."""


@dataclass(frozen=True)
class Fault:
    """One fault of a plan: whom it hits, and its own parameters."""

    name: str
    share: float
    first: float
    from_s: float
    for_s: float
    on: str
    options: Mapping[str, Any]


def fault_of(name: str, value: object) -> Fault:
    """The fault that a plan asks for; raises `ValueError` that says what was expected."""
    kind = FAULTS.get(name)
    if kind is None:
        raise ValueError(f"fault {name!r}: expected one of {', '.join(FAULTS)}")
    given: JsonObject = dict(value) if isinstance(value, dict) else {kind.number: value}
    who: JsonObject = {"share": 1.0, "first": math.inf, "from_s": 0.0, "for_s": math.inf, "on": kind.on}
    known = {**who, **kind.options}
    for key, number in given.items():
        if key not in known:
            raise ValueError(f"fault {name!r}: expected some of {', '.join(known)}, got {key!r}")
        if isinstance(known[key], int | float) and not _is_amount(number):
            raise ValueError(f"fault {name!r}: expected a number of 0 or more for {key}, got {number!r}")
    merged = {**known, **given}
    if merged["share"] > 1:
        raise ValueError(f"fault {name!r}: expected a share from 0 to 1, got {merged['share']!r}")
    return Fault(name, **{key: merged[key] for key in who}, options={key: merged[key] for key in kind.options})


def _is_amount(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and number >= 0


class Hit(NamedTuple):
    """A fault that hits one request."""

    name: str
    options: Mapping[str, Any]
    draw: float
    """From 0 to 1: which of its variants."""


class FaultPlan:
    """Faults to serve from now on; whom they hit depends on the seed and on how many requests they looked at."""

    def __init__(self, plan: Mapping[str, object], seed: int) -> None:
        """The plan {fault name: number or object}; raises `ValueError`."""
        self.n_answers = 0
        self._seed = seed
        self._since = time.monotonic()
        self._faults = {name: fault_of(name, value) for name, value in plan.items()}
        self._n_looked: Counter[str] = Counter()
        self._n_hit: Counter[str] = Counter()
        limit = self._faults.get("rate_limit")
        self.limiter = None if limit is None else RateLimiter(**limit.options)

    def hit(self, name: str, path: str = CHAT) -> Hit | None:
        """The fault if it hits this request, which it counts."""
        fault = self._faults.get(name)
        if fault is None or not path.startswith(fault.on):
            return None
        self._n_looked[name] += 1
        n = self._n_looked[name]
        is_time = fault.from_s <= time.monotonic() - self._since < fault.from_s + fault.for_s
        if not is_time or self._n_hit[name] >= fault.first or chance(self._seed, name, n) >= fault.share:
            return None
        self._n_hit[name] += 1
        return Hit(name, fault.options, chance(self._seed, name, n, "variant"))

    def hits(self, names: Sequence[str], path: str = CHAT) -> list[Hit]:
        """All of these faults that hit this request."""
        found = (self.hit(name, path) for name in names)
        return [hit for hit in found if hit is not None]

    def first_hit(self, names: Sequence[str], path: str = CHAT) -> Hit | None:
        """The first of these faults that hits this request."""
        return next(filter(None, (self.hit(name, path) for name in names)), None)

    def option(self, name: str, option: str) -> Any:
        """A parameter of a fault; None when the plan does not have it."""
        fault = self._faults.get(name)
        return None if fault is None else fault.options[option]


class Bucket:
    """A token bucket: `per_minute` flow in, at most `capacity` stay."""

    def __init__(self, per_minute: float, burst_s: float) -> None:
        """A full bucket that holds what flows in during `burst_s`."""
        self.per_minute = max(per_minute, 1e-9)
        self.capacity = max(1.0, per_minute * burst_s / 60)
        self._level = self.capacity
        self._at = time.monotonic()

    def level(self) -> float:
        """What is in it now."""
        now = time.monotonic()
        if math.isfinite(self.per_minute):
            self._level = min(self.capacity, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._level

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` can be taken; an amount above the capacity waits for a full bucket."""
        missing = min(amount, self.capacity) - self.level()
        return max(0.0, missing / (self.per_minute / 60)) if missing > 0 else 0.0

    def take(self, amount: float) -> None:
        """Take `amount`, which may leave less than nothing."""
        self._level = self.level() - amount


class RateLimiter:
    """Requests and tokens per minute, as OpenAI limits them."""

    def __init__(self, requests_per_minute: float, tokens_per_minute: float, burst_s: float) -> None:
        """Full buckets; infinity: no limit."""
        self._buckets = {
            "requests": Bucket(requests_per_minute, burst_s),
            "tokens": Bucket(tokens_per_minute, burst_s),
        }

    def take(self, n_tokens: int) -> tuple[str, float] | None:
        """Let one request through, or tell which limit holds it up and for how many seconds."""
        wanted = {"requests": 1, "tokens": n_tokens}
        name, wait_s = max(
            ((name, bucket.wait_s(wanted[name])) for name, bucket in self._buckets.items()), key=lambda x: x[1]
        )
        if wait_s > 0:
            return name, wait_s
        for name, bucket in self._buckets.items():
            bucket.take(wanted[name])
        return None

    def headers(self) -> dict[str, str]:
        """OpenAI's x-ratelimit headers as of now."""
        found = {}
        for name, bucket in self._buckets.items():
            if math.isfinite(bucket.per_minute):
                found[f"x-ratelimit-limit-{name}"] = str(int(bucket.per_minute))
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level())))
                found[f"x-ratelimit-reset-{name}"] = _duration(bucket.wait_s(bucket.capacity))
        return found


def _duration(seconds: float) -> str:
    """Seconds as OpenAI writes them: 120ms, 7.66s, 6m0s."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    return f"{seconds:.3g}s" if seconds < 60 else f"{int(seconds // 60)}m{int(seconds % 60)}s"


def spoiled_answer(content: JsonObject, hits: Sequence[Hit]) -> JsonObject:
    """The answer with faults in its values."""
    for hit in hits:
        content = _SPOIL_ANSWER[hit.name](content, hit)
    return content


def spoiled_text(text: str, content: JsonObject, hits: Sequence[Hit]) -> str:
    """The answer's text with faults in its form."""
    for hit in hits:
        if hit.name == "duplicate_keys" and content:
            key = next(iter(content))
            text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(_contradicted(content[key]))}}}"
        elif hit.name == "truncated_json":
            text = text[: len(text) // 2]
        elif hit.name == "fenced_json":
            text = f"```json\n{text}\n```"
        elif hit.name == "prose":
            text = "The picture shows a roundish object on a pale ground; more cannot be said with certainty."
    return text


def _without_some(content: JsonObject, hit: Hit) -> JsonObject:
    """Every second property is missing, and always the first or the second."""
    skipped = int(hit.draw * 2) % max(1, min(2, len(content)))
    return {key: value for n, (key, value) in enumerate(content.items()) if n % 2 != skipped}


def _with_more(content: JsonObject, _: Hit) -> JsonObject:
    verdict = {"state": "present", "probability": 0.9, "evidence": "nobody asked for this"}
    return {"simulated-extra-concept": verdict, **content, "label": "malignant"}


def _of_wrong_types(content: JsonObject, hit: Hit) -> JsonObject:
    def wrong(value: Any, n: int) -> Any:
        if not isinstance(value, dict):
            return "several"
        numbers = {key: "high" if key == "probability" else 1 for key in value}
        return (list(value.values()), numbers, "present", None)[(n + int(hit.draw * 4)) % 4]

    return {key: wrong(value, n) for n, (key, value) in enumerate(content.items())}


def _with_wild_numbers(content: JsonObject, hit: Hit) -> JsonObject:
    wild = (math.nan, 1.7, -0.2, math.inf)
    return {
        key: {**value, "probability": wild[(n + int(hit.draw * 4)) % 4]} if isinstance(value, dict) else value
        for n, (key, value) in enumerate(content.items())
    }


_SPOIL_ANSWER: Mapping[str, Callable[[JsonObject, Hit], JsonObject]] = {
    "missing_concepts": _without_some,
    "extra_concepts": _with_more,
    "wrong_types": _of_wrong_types,
    "nan_probability": _with_wild_numbers,
}


def _contradicted(value: Any) -> Any:
    """Another answer to the same question."""
    if isinstance(value, dict) and "state" in value:
        return {**value, "state": "absent" if value["state"] == "present" else "present"}
    return {**value, "choice": UNCERTAIN} if isinstance(value, dict) and "choice" in value else None


# --- Chat completions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manner:
    """How the simulated endpoint behaves towards its callers."""

    seed: int = 0
    latency_s: float = 0.0
    latency_jitter_s: float = 0.0
    models: tuple[str, ...] = ()
    """Names that it knows; empty: it answers to every name."""
    api_key: str | None = None
    keeps_schema: bool = True
    reports_usage: bool = True
    reports_logprobs: bool = True
    batch_seconds: float = 2.0
    batch_failure_share: float = 0.0


class Completion(NamedTuple):
    """A chat completion and the tokens it is billed for."""

    body: JsonObject
    n_prompt_tokens: int
    n_completion_tokens: int


def complete(question: Question, witness: Witness, manner: Manner, hits: Sequence[Hit] = ()) -> Completion:
    """The completion that answers a question, with the faults that hit it."""
    choices = [_choice(question, witness, manner, hits, n) for n in range(question.n_answers)]
    n_completion_tokens = sum(_n_tokens(len(c["message"]["content"] or c["message"]["refusal"] or "")) for c in choices)
    body: JsonObject = {
        "id": f"chatcmpl-{os.urandom(12).hex()}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": question.model,
        "system_fingerprint": f"simulated-{witness.seed}",
        "choices": choices,
    }
    if manner.reports_usage:
        total = question.n_prompt_tokens + n_completion_tokens
        counts = {"prompt_tokens": question.n_prompt_tokens, "completion_tokens": n_completion_tokens}
        body["usage"] = {**counts, "total_tokens": total}
    return Completion(body, question.n_prompt_tokens, n_completion_tokens)


def _choice(question: Question, witness: Witness, manner: Manner, hits: Sequence[Hit], index: int) -> JsonObject:
    # Samples of one request differ from each other where a witness wavers, and come again when it is asked again.
    salt = f"{question.salt}/{index}" if question.salt else ""
    text, logprobs = _text_of(question, witness, salt, hits)
    if question.schema is not None and not manner.keeps_schema:
        text = f"I looked at the image with care. Here is my answer:\n\n```json\n{text}\n```\n\nI hope this helps!"
    message: JsonObject = {"role": "assistant", "content": text, "refusal": None}
    finish_reason = "stop"
    if question.max_tokens is not None and _n_tokens(len(text)) > question.max_tokens:
        message["content"], finish_reason = text[: question.max_tokens * _CHARACTERS_PER_TOKEN], "length"
    for hit in hits:
        if hit.name == "refusal":
            message |= {"content": None, "refusal": "I'm sorry, but I can't help with identifying this image."}
        elif hit.name == "empty_content":
            message["content"] = None if hit.draw < 0.5 else ""
        elif hit.name == "cut_off" and message["content"]:
            message["content"], finish_reason = text[: len(text) * 3 // 5], "length"
    logprobs = logprobs if manner.reports_logprobs else None
    return {"index": index, "finish_reason": finish_reason, "message": message, "logprobs": logprobs}


def _text_of(question: Question, witness: Witness, salt: str, hits: Sequence[Hit]) -> tuple[str, JsonObject | None]:
    """The text of an answer, and its log-probabilities if it is one word and they were asked for."""
    in_text = [hit for hit in hits if hit.name in IN_TEXT]
    if question.schema is not None:
        content = answer(question.schema, question.sight, witness, salt)
        content = spoiled_answer(content, [hit for hit in hits if hit.name in IN_ANSWER])
        return spoiled_text(json.dumps(content, ensure_ascii=False), content, in_text), None
    if "yes or no" not in question.text.lower():
        return spoiled_text("I see an image.", {}, in_text), None
    named = re.search(r"\"id\"\s*:\s*\"([^\"]+)\"", question.text)
    concept_id = named.group(1) if named else hashlib.sha256(question.text.encode()).hexdigest()
    probability = said_of_concept(concept_id, question.sight, witness, salt).probability
    word = "yes" if probability > 0.5 else "no"
    n_top = question.n_top_logprobs
    return spoiled_text(word, {}, in_text), None if n_top is None else _logprobs(word, probability, n_top)


def _logprobs(word: str, probability: float, n_top: int) -> JsonObject:
    """Log-probabilities of a one-word answer; "yes" and "no" come in two spellings, and a little goes elsewhere."""
    shares = {"yes": 0.8 * probability, "Yes": 0.19 * probability}
    shares |= {"no": 0.8 * (1 - probability), "No": 0.19 * (1 - probability)}
    shares |= {"I": 0.004, "The": 0.003, "Un": 0.002, "\n": 0.001}
    ranked = sorted(shares, key=lambda token: -shares[token])[:n_top]

    def entry(token: str) -> JsonObject:
        logprob = math.log(max(shares[token], 1e-9))
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    return {"content": [{**entry(word), "top_logprobs": [entry(token) for token in ranked]}], "refusal": None}


# --- What happened ---------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What the simulator has seen and done since it started."""

    requests_received: int = 0
    """On any path of the protocol."""
    chat_requests_received: int = 0
    bytes_received: int = 0
    completed_answers: int = 0
    """Chat answers that were delivered whole."""
    abandoned_answers: int = 0
    """Chat answers whose caller had gone; they are billed."""
    batch_answers: int = 0
    prompt_tokens_billed: int = 0
    """Of every chat answer that was made, delivered or not."""
    completion_tokens_billed: int = 0
    batch_prompt_tokens_billed: int = 0
    batch_completion_tokens_billed: int = 0
    duplicate_requests: int = 0
    """Chat requests whose body had come before."""
    duplicate_answers: int = 0
    """Answers billed, in chat or batch, for a body that had been answered and billed before."""
    answers_without_truth: int = 0
    """Answers about an image that the truth file does not have."""
    concurrency: int = 0
    max_concurrency: int = 0
    """Most chat requests in flight at once."""
    faults_served: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    """HTTP status → responses, chat and all others."""

    def __post_init__(self) -> None:
        self._requested: set[str] = set()
        self._answered: set[str] = set()

    def as_json(self) -> JsonObject:
        """All counters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def asked(self, question: Question) -> None:
        """Count a chat request that could be read."""
        self.duplicate_requests += question.key in self._requested
        self._requested.add(question.key)

    def billed(self, question: Question, completion: Completion, *, in_batch: bool = False) -> None:
        """Count an answer that was made."""
        self.duplicate_answers += question.key in self._answered
        self._answered.add(question.key)
        if in_batch:
            self.batch_answers += 1
            self.batch_prompt_tokens_billed += completion.n_prompt_tokens
            self.batch_completion_tokens_billed += completion.n_completion_tokens
        else:
            self.prompt_tokens_billed += completion.n_prompt_tokens
            self.completion_tokens_billed += completion.n_completion_tokens


# --- HTTP ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HttpRequest:
    """One request as it came."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


class Reply(NamedTuple):
    """One response as it goes out."""

    status: int
    body: bytes
    headers: Mapping[str, str] = {}
    content_type: str = "application/json"

    def head(self) -> bytes:
        """Status line and headers, up to the body."""
        reason = http.client.responses.get(self.status, "")
        named = {"content-type": self.content_type, "content-length": str(len(self.body)), **self.headers}
        lines = [f"HTTP/1.1 {self.status} {reason}", *(f"{k}: {v}" for k, v in named.items() if v)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


def reply(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """A JSON response."""
    return Reply(status, json.dumps(content, ensure_ascii=False).encode(), headers or {})


_TEXT_START = b'"content": "'
_MEGABYTE = 2**20


class HangUp(Exception):
    """Nothing more is sent on this connection."""


class Wire:
    """One connection, with the means to misuse it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def request(self) -> HttpRequest | None:
        """The next request; None when the caller is done."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
            method, target, headers = _read_head(head)
            n_bytes = int(headers.get("content-length", "0"))
        except asyncio.IncompleteReadError:
            return None
        except (ValueError, asyncio.LimitOverrunError) as error:
            raise HangUp from error
        if "transfer-encoding" in headers or n_bytes > _MAX_BODY_BYTES:
            await self.send(reply({"error": {"message": "Send a body of known and moderate length."}}, 413))
            raise HangUp
        if headers.get("expect", "").lower() == "100-continue":
            self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await self._reader.readexactly(n_bytes) if n_bytes else b""
        path, _, query = target.partition("?")
        pairs = (pair.partition("=") for pair in query.split("&") if pair)
        return HttpRequest(method, _plain_path(path), {k: v for k, _, v in pairs}, headers, body)

    @property
    def is_abandoned(self) -> bool:
        """Whether the caller has closed the connection."""
        return self._reader.at_eof() or self._writer.is_closing()

    async def send(self, response: Reply) -> None:
        """A whole response."""
        self._writer.write(response.head() + response.body)
        await self._writer.drain()

    async def send_part(self, response: Reply) -> None:
        """A response of which only half the body comes."""
        self._writer.write(response.head() + response.body[: len(response.body) // 2])
        await self._writer.drain()
        await asyncio.sleep(0.02)

    async def send_huge(self, response: Reply, megabytes: float) -> None:
        """A response whose text begins with megabytes of nonsense, sent one at a time."""
        start = response.body.find(_TEXT_START)
        start = len(response.body) if start < 0 else start + len(_TEXT_START)
        n_blocks = max(1, round(megabytes))
        n_bytes = len(response.body) + n_blocks * _MEGABYTE
        head = response._replace(headers={**response.headers, "content-length": str(n_bytes)}).head()
        self._writer.write(head + response.body[:start])
        for _ in range(n_blocks):
            self._writer.write(b"x" * _MEGABYTE)
            await self._writer.drain()
        self._writer.write(response.body[start:])
        await self._writer.drain()

    async def dribble(self, response: Reply, interval_s: float) -> None:
        """A response that comes byte by byte and never ends."""
        headers = {**response.headers, "transfer-encoding": "chunked", "content-length": ""}
        self._writer.write(response._replace(headers=headers).head())
        for byte in itertools.chain(response.body[:-1], itertools.repeat(0x20)):
            self._writer.write(b"1\r\n%c\r\n" % byte)
            await self._writer.drain()
            await asyncio.sleep(interval_s)
            if self.is_abandoned:
                break

    def reset(self) -> None:
        """Break the connection so that the caller sees a reset, not an end."""
        raw = self._writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


def _read_head(head: bytes) -> tuple[str, str, dict[str, str]]:
    """Method, target and headers; raises `ValueError` for what is no HTTP."""
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ", 2)
    return method, target, {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}


def _plain_path(path: str) -> str:
    """The path as OpenAI names it, also for Azure's deployments."""
    return re.sub(r"^/openai(/deployments/[^/]+)?(/v1)?/", "/v1/", path)


# --- Files and batches -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredFile:
    """A file that was uploaded or made."""

    file_id: str
    data: bytes = field(repr=False)
    name: str
    purpose: str
    created_at: int

    def as_json(self) -> JsonObject:
        """The file as the protocol describes it."""
        return {
            "id": self.file_id,
            "object": "file",
            "bytes": len(self.data),
            "created_at": self.created_at,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


@dataclass
class Batch:
    """One batch and how far it is."""

    batch_id: str
    number: int
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: JsonObject | None
    created_at: int
    failed: Hit | None
    expired: Hit | None
    status: str = "validating"
    errors: list[JsonObject] = field(default_factory=list)
    times: dict[str, int] = field(default_factory=dict)
    """Status → when it was reached."""
    n_total: int = 0
    done: list[JsonObject] = field(default_factory=list)
    lost: list[JsonObject] = field(default_factory=list)
    output_file_id: str | None = None
    error_file_id: str | None = None
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def reach(self, status: str) -> None:
        """Set the status and note the time."""
        self.status = status
        self.times[status] = int(time.time())

    def as_json(self) -> JsonObject:
        """The batch as the protocol describes it."""
        moments = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        return {
            "id": self.batch_id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.created_at + _DAY_S,
            **{f"{moment}_at": self.times.get(moment) for moment in moments},
            "request_counts": {"total": self.n_total, "completed": len(self.done), "failed": len(self.lost)},
            "metadata": self.metadata,
        }


AnswerLine: TypeAlias = Callable[[Mapping[str, Any], str], Reply]
"""Body and path of one line → the response."""


class BatchDesk:
    """Files and batches, worked off in the background."""

    def __init__(self, manner: Manner, answer_line: AnswerLine) -> None:
        """An empty desk whose lines are answered by `answer_line`."""
        self.files: dict[str, StoredFile] = {}
        self.batches: dict[str, Batch] = {}
        self._manner = manner
        self._answer_line = answer_line
        self._tasks: set[asyncio.Task[None]] = set()

    def store(self, data: bytes, name: str, purpose: str) -> StoredFile:
        """Keep a file."""
        file = StoredFile(f"file-{os.urandom(9).hex()}", data, name, purpose, int(time.time()))
        self.files[file.file_id] = file
        return file

    def upload(self, request: HttpRequest) -> StoredFile:
        """Keep the file of a multipart upload; raises `Refused`."""
        fields = _multipart(request)
        purpose = fields.get("purpose", ("", b""))[1].decode()
        if "file" not in fields or purpose != "batch":
            message = f"Expected a field file and purpose=batch, got {sorted(fields)} and {purpose!r}."
            raise Refused(400, message, "invalid_request_error")
        name, data = fields["file"]
        return self.store(data, name, purpose)

    def file(self, file_id: str) -> StoredFile:
        """A stored file; raises `Refused`."""
        if file_id not in self.files:
            raise Refused(404, f"No such File object: {file_id}", "invalid_request_error")
        return self.files[file_id]

    def batch(self, batch_id: str) -> Batch:
        """A batch; raises `Refused`."""
        if batch_id not in self.batches:
            raise Refused(404, f"No batch found with id '{batch_id}'.", "invalid_request_error")
        return self.batches[batch_id]

    def create(self, asked: Mapping[str, Any], failed: Hit | None, expired: Hit | None) -> Batch:
        """A new batch, which starts by itself; raises `Refused`."""
        file_id = str(asked.get("input_file_id"))
        if asked.get("endpoint") != CHAT or asked.get("completion_window") != "24h":
            message = f"Expected endpoint {CHAT} and completion_window 24h."
            raise Refused(400, message, "invalid_request_error")
        data = self.file(file_id).data
        batch = Batch(
            batch_id=f"batch_{os.urandom(9).hex()}",
            number=len(self.batches),
            endpoint=CHAT,
            input_file_id=file_id,
            completion_window="24h",
            metadata=asked.get("metadata"),
            created_at=int(time.time()),
            failed=failed,
            expired=expired,
        )
        self.batches[batch.batch_id] = batch
        task = asyncio.get_running_loop().create_task(self._work(batch, data))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return batch

    def cancel(self, batch_id: str) -> Batch:
        """A batch that stops, keeping what is done; raises `Refused`."""
        batch = self.batch(batch_id)
        if batch.status not in {"validating", "in_progress", "cancelling"}:
            raise Refused(409, f"Cannot cancel a batch with status '{batch.status}'.", "invalid_request_error")
        batch.reach("cancelling")
        batch.cancelled.set()
        return batch

    def page(self, limit: int, after: str | None) -> JsonObject:
        """The batches after a given one, newest first."""
        newest = list(reversed(self.batches))
        start = newest.index(after) + 1 if after in newest else 0
        ids = newest[start : start + limit]
        return {
            "object": "list",
            "data": [self.batches[i].as_json() for i in ids],
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
            "has_more": start + limit < len(newest),
        }

    async def _work(self, batch: Batch, data: bytes) -> None:
        seconds = self._manner.batch_seconds
        await _passed(batch.cancelled, seconds * 0.2)
        lines, batch.errors = _read_lines(data)
        if batch.failed is not None:
            batch.errors = [_line_error("simulated", "The batch failed as it was told to.", None)]
        if batch.errors:
            batch.reach("failed")
            return
        batch.n_total = len(lines)
        if not batch.cancelled.is_set():
            batch.reach("in_progress")
            n_done = len(lines) if batch.expired is None else int(batch.expired.options["done_share"] * len(lines))
            await self._answer_lines(batch, lines[:n_done], seconds * 0.8)
        self._finish(batch, lines)

    async def _answer_lines(self, batch: Batch, lines: Sequence[JsonObject], seconds: float) -> None:
        started = time.monotonic()
        for n, line in enumerate(lines, 1):
            row = self._row(batch, n, line)
            (batch.done if row["response"]["status_code"] == 200 else batch.lost).append(row)
            # Spread over the time; at least one turn of the loop, so that other requests are not held up.
            await _passed(batch.cancelled, started + seconds * n / len(lines) - time.monotonic())
            if batch.cancelled.is_set():
                return
        if not lines:
            await _passed(batch.cancelled, seconds)

    def _row(self, batch: Batch, n: int, line: JsonObject) -> JsonObject:
        """One line of the output or error file."""
        draw = chance(self._manner.seed, "batch-line", batch.number, n)
        if draw < self._manner.batch_failure_share:
            transient = chance("transient", draw) < 0.5
            status, kind = (500, "server_error") if transient else (400, "invalid_request_error")
            content = Refused(status, "This line failed as it was told to.", kind).body
        else:
            response = self._answer_line(line["body"], line["url"])
            status, content = response.status, json.loads(response.body)
        answered = {"status_code": status, "request_id": f"req_{os.urandom(9).hex()}", "body": content}
        row_id = f"batch_req_{os.urandom(9).hex()}"
        return {"id": row_id, "custom_id": line["custom_id"], "response": answered, "error": None}

    def _finish(self, batch: Batch, lines: Sequence[JsonObject]) -> None:
        """Write the files and set the last status."""
        end = "cancelled" if batch.cancelled.is_set() else "completed" if batch.expired is None else "expired"
        if end != "completed":
            known = {row["custom_id"] for row in (*batch.done, *batch.lost)}
            message = f"This request could not be executed: the batch is {end}."
            error = {"code": f"batch_{end}", "message": message}
            rest = [line["custom_id"] for line in lines if line["custom_id"] not in known]
            batch.lost += [
                {"id": f"batch_req_{os.urandom(9).hex()}", "custom_id": c, "response": None, "error": error}
                for c in rest
            ]
        # The order of the output is nobody's promise.
        batch.done.sort(key=lambda row: chance(self._manner.seed, row["custom_id"]))
        if batch.done:
            batch.output_file_id = self._store_rows(batch.done, f"{batch.batch_id}_output.jsonl")
        if batch.lost:
            batch.error_file_id = self._store_rows(batch.lost, f"{batch.batch_id}_error.jsonl")
        batch.reach("finalizing")
        batch.reach(end)

    def _store_rows(self, rows: Sequence[JsonObject], name: str) -> str:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        return self.store(data, name, "batch_output").file_id


async def _passed(event: asyncio.Event, seconds: float) -> None:
    """Wait for so long, or until the event."""
    try:
        await asyncio.wait_for(event.wait(), max(seconds, 0.0))
    except TimeoutError:
        await asyncio.sleep(0)


def _read_lines(data: bytes) -> tuple[list[JsonObject], list[JsonObject]]:
    """The requests of an input file, and what is wrong with them."""
    lines: list[JsonObject] = []
    errors: list[JsonObject] = []
    seen: set[str] = set()
    for number, text in enumerate(data.splitlines(), 1):
        if not text.strip():
            continue
        line, wrong = _read_line(text)
        if wrong is None and line["custom_id"] in seen:
            wrong = _line_error("duplicate_custom_id", f"The custom_id {line['custom_id']!r} came before.", number)
        if wrong is not None:
            errors.append({**wrong, "line": number})
            continue
        seen.add(line["custom_id"])
        lines.append(line)
    if not lines and not errors:
        errors.append(_line_error("empty_file", "The input file is empty.", None))
    if len(lines) > _MAX_BATCH_LINES:
        errors.append(_line_error("too_many_tasks", f"Expected at most {_MAX_BATCH_LINES} lines.", None))
    if len({line["body"].get("model") for line in lines}) > 1:
        errors.append(_line_error("mismatched_model", "All lines of a batch must name the same model.", None))
    return lines, errors


def _read_line(text: bytes) -> tuple[JsonObject, JsonObject | None]:
    try:
        line = json.loads(text)
        expected = {"custom_id": str, "method": str, "url": str, "body": dict}
        if not all(isinstance(line[key], kind) for key, kind in expected.items()):
            raise ValueError("a field has the wrong type")
    except (ValueError, KeyError, TypeError) as error:
        return {}, _line_error("invalid_json_line", f"The line is no request: {error!r}.", None)
    if line["method"] != "POST" or line["url"] != CHAT:
        return {}, _line_error("invalid_url", f"Expected POST {CHAT}, got {line['method']} {line['url']}.", None)
    return line, None


def _line_error(code: str, message: str, number: int | None) -> JsonObject:
    return {"code": code, "message": message, "param": None, "line": number}


def _multipart(request: HttpRequest) -> dict[str, tuple[str, bytes]]:
    """Field name → file name and content of a multipart form."""
    found = re.search(r"boundary=\"?([^\";]+)", request.headers.get("content-type", ""))
    fields: dict[str, tuple[str, bytes]] = {}
    for part in request.body.split(b"--" + found.group(1).encode())[1:-1] if found else ():
        head, _, content = part.partition(b"\r\n\r\n")
        words = head.decode("utf-8", "replace")
        name, filename = (re.search(rf"[; ]{key}=\"([^\"]*)\"", words) for key in ("name", "filename"))
        if name is not None:
            fields[name.group(1)] = (filename.group(1) if filename else "", content.removesuffix(b"\r\n"))
    return fields


# --- The endpoint ----------------------------------------------------------------------------------------------------


class Endpoint:
    """The whole protocol: from a request to what goes out on its wire."""

    def __init__(self, witness: Witness, manner: Manner, plan: Mapping[str, object]) -> None:
        """An endpoint with nothing seen yet; raises `ValueError` for a plan it cannot read."""
        self.tally = Tally()
        self.plan = FaultPlan(plan, manner.seed)
        self._witness = witness
        self._manner = manner
        self._desk = BatchDesk(manner, self._answer_line)
        self._started = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a new connection in the background."""
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = Wire(reader, writer)
        try:
            while (request := await wire.request()) is not None:
                await self._handle(request, wire)
                if request.headers.get("connection", "").lower() == "close":
                    break
        except (HangUp, OSError, EOFError):
            pass  # The caller is gone, or was to be left alone.
        finally:
            writer.close()

    async def _handle(self, request: HttpRequest, wire: Wire) -> None:
        is_chat = (request.method, request.path) == ("POST", CHAT)
        if request.path.startswith("/simulator/"):
            await wire.send(self._control(request))
            return
        self.tally.requests_received += 1
        self.tally.bytes_received += len(request.body)
        request_id = {"x-request-id": f"req_{self.tally.requests_received}"}
        try:
            self._check_key(request)
            if is_chat:
                await self._chat(request, wire, request_id)
                return
            self._turn_away(request.path)
            if await self._misused(request.path, wire, lambda: self._plain(request)):
                return
            response = self._plain(request)
        except Refused as refused:
            response = reply(refused.body, refused.status, refused.headers)
        self.tally.statuses[response.status] += 1
        await wire.send(response._replace(headers={**response.headers, **request_id}))

    async def _chat(self, request: HttpRequest, wire: Wire, request_id: Mapping[str, str]) -> None:
        self.tally.chat_requests_received += 1
        self.tally.concurrency += 1
        self.tally.max_concurrency = max(self.tally.max_concurrency, self.tally.concurrency)
        number = self.tally.chat_requests_received
        try:
            question = read_question(request.body)
            self.tally.asked(question)
            self._turn_away(CHAT, question)
            headers = {**request_id, **(self.plan.limiter.headers() if self.plan.limiter else {})}
            await asyncio.sleep(self._latency_s(number))
            if await self._misused(CHAT, wire, lambda: self._answered(question)):
                return
            response = self._answered(question)
            if wire.is_abandoned:
                self.tally.abandoned_answers += 1
                raise HangUp
            self.tally.statuses[200] += 1
            await wire.send(response._replace(headers=headers))
            self._delivered()
        finally:
            self.tally.concurrency -= 1

    def _delivered(self) -> None:
        self.tally.completed_answers += 1
        self.plan.n_answers += 1
        last = self.plan.option("die_after", "answers")
        if last is not None and self.plan.n_answers >= last:
            os._exit(1)

    def _latency_s(self, number: int) -> float:
        swing = 2 * chance(self._manner.seed, "latency", number) - 1
        return max(0.0, self._manner.latency_s + self._manner.latency_jitter_s * swing)

    def _answered(self, question: Question, *, in_batch: bool = False) -> Reply:
        hits = self._served(self.plan.hits((*IN_ANSWER, *IN_TEXT, *IN_MESSAGE)))
        completion = complete(question, self._witness, self._manner, hits)
        self.tally.billed(question, completion, in_batch=in_batch)
        self.tally.answers_without_truth += (
            bool(self._witness.truth) and question.sight.sha256 not in self._witness.truth
        )
        return reply(completion.body)

    def _answer_line(self, body: Mapping[str, Any], _: str) -> Reply:
        try:
            question = read_question(body)
            self._check_model(question.model)
        except Refused as refused:
            return reply(refused.body, refused.status)
        return self._answered(question, in_batch=True)

    async def _misused(self, path: str, wire: Wire, make: Callable[[], Reply]) -> bool:
        """Serve a fault of the wire, if one hits; then the connection is of no more use."""
        hit = self.plan.first_hit(ON_THE_WIRE, path)
        if hit is None:
            return False
        self._served([hit])
        if hit.name == "html_page":
            page = b"<!DOCTYPE html><html><head><title>Gateway</title></head><body>Please sign in.</body></html>"
            self.tally.statuses[200] += 1
            await wire.send(Reply(200, page, content_type="text/html; charset=utf-8"))
            return True
        if hit.name == "reset" and (hit.options["when"] or ("before" if hit.draw < 0.5 else "middle")) == "before":
            wire.reset()
            raise HangUp
        response = make()
        ways: Mapping[str, Callable[[], Awaitable[None]]] = {
            "reset": lambda: wire.send_part(response),
            "truncated_body": lambda: wire.send_part(response),
            "slow_loris": lambda: wire.dribble(response, hit.options["interval_s"]),
            "huge_body": lambda: wire.send_huge(response, hit.options["megabytes"]),
        }
        await ways[hit.name]()
        if hit.name == "reset":
            wire.reset()
        raise HangUp

    def _turn_away(self, path: str, question: Question | None = None) -> None:
        """Raise `Refused` for a request that is not to be answered."""
        model = DEFAULT_MODEL if question is None else question.model
        hit = self.plan.first_hit(("storm", "insufficient_quota", "unknown_model", "burst_5xx"), path)
        if hit is not None:
            self._served([hit])
            if hit.name == "burst_5xx":
                statuses = hit.options["statuses"]
                status = statuses[int(hit.draw * len(statuses))]
                raise Refused(status, "The server had an error while processing your request.", "server_error")
            if hit.name == "insufficient_quota":
                message = "You exceeded your current quota, please check your plan and billing details."
                raise Refused(429, message, hit.name, hit.name)
            if hit.name == "storm":
                raise self._come_back(f"Rate limit reached for {model}.", "requests", 1.0)
            raise _unknown_model(model)
        if question is not None:
            self._check_model(model)
            self._check_rate(question)

    def _check_rate(self, question: Question) -> None:
        limiter = self.plan.limiter
        held = None if limiter is None else limiter.take(question.n_prompt_tokens + (question.max_tokens or 0))
        if held is not None:
            self.tally.faults_served["rate_limit"] += 1
            name, wait_s = held
            message = f"Rate limit reached for {question.model} on {name} per min. Please try again in"
            raise self._come_back(f"{message} {_duration(wait_s)}.", name, wait_s)

    def _come_back(self, message: str, kind: str, wait_s: float) -> Refused:
        """A 429 that says when to come back."""
        fixed_s = self.plan.option("retry_after_s", "seconds")
        wait_s = wait_s if fixed_s is None else fixed_s
        headers = {"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(math.ceil(wait_s * 1000))}
        headers |= self.plan.limiter.headers() if self.plan.limiter else {}
        return Refused(429, message, kind, "rate_limit_exceeded", headers)

    def _check_model(self, model: str) -> None:
        if self._manner.models and model not in self._manner.models:
            raise _unknown_model(model)

    def _check_key(self, request: HttpRequest) -> None:
        key = self._manner.api_key
        given = request.headers.get("api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and given != key:
            message = "Incorrect API key provided." if given else "You didn't provide an API key."
            raise Refused(401, message, "invalid_request_error", "invalid_api_key")

    def _served(self, hits: list[Hit]) -> list[Hit]:
        self.tally.faults_served.update(hit.name for hit in hits)
        return hits

    def _plain(self, request: HttpRequest) -> Reply:
        """The answer to anything but a chat request; raises `Refused`."""
        response = None
        match request.path.removeprefix("/v1/").split("/"):
            case ["models"] if request.method == "GET":
                names = self._manner.models or (DEFAULT_MODEL,)
                models = [{"id": n, "object": "model", "created": 0, "owned_by": "simulated"} for n in names]
                response = reply({"object": "list", "data": models})
            case ["files", *rest]:
                response = self._files(request, rest)
            case ["batches", *rest]:
                response = self._batches(request, rest)
        if response is None:
            message = f"Invalid URL ({request.method} {request.path})"
            raise Refused(404, message, "invalid_request_error", "unknown_url")
        return response

    def _files(self, request: HttpRequest, rest: Sequence[str]) -> Reply | None:
        desk = self._desk
        match request.method, *rest:
            case ["POST"]:
                return reply(desk.upload(request).as_json())
            case "GET", file_id:
                return reply(desk.file(file_id).as_json())
            case "GET", file_id, "content":
                return Reply(200, desk.file(file_id).data, content_type="application/octet-stream")
            case "DELETE", file_id:
                del desk.files[desk.file(file_id).file_id]
                return reply({"id": file_id, "object": "file", "deleted": True})
        return None

    def _batches(self, request: HttpRequest, rest: Sequence[str]) -> Reply | None:
        desk = self._desk
        match request.method, *rest:
            case ["POST"]:
                failed, expired = (self.plan.hit(name, request.path) for name in ("batch_failed", "batch_expired"))
                self._served([hit for hit in (failed, expired) if hit is not None])
                return reply(desk.create(_json_body(request), failed, expired).as_json())
            case ["GET"]:
                limit = request.query.get("limit", "20")
                return reply(desk.page(int(limit) if limit.isdecimal() else 20, request.query.get("after")))
            case "GET", batch_id:
                return reply(desk.batch(batch_id).as_json())
            case "POST", batch_id, "cancel":
                return reply(desk.cancel(batch_id).as_json())
        return None

    def _control(self, request: HttpRequest) -> Reply:
        """The simulator's own paths."""
        match request.method, request.path:
            case "GET", "/simulator/state":
                return reply({"uptime_s": round(time.monotonic() - self._started, 3), **self.tally.as_json()})
            case "POST", "/simulator/faults":
                try:
                    plan = _json_body(request)
                    self.plan = FaultPlan(plan, self._manner.seed)
                except (ValueError, TypeError, Refused) as error:
                    return reply({"error": {"message": str(error)}}, 400)
                return reply({"faults": plan})
        return reply({"error": {"message": "Expected GET /simulator/state or POST /simulator/faults."}}, 404)


def _unknown_model(model: str) -> Refused:
    message = f"The model `{model}` does not exist or you do not have access to it."
    return Refused(404, message, "invalid_request_error", "model_not_found")


def _json_body(request: HttpRequest) -> JsonObject:
    try:
        content = json.loads(request.body)
    except ValueError as error:
        raise Refused(400, "The body is no JSON.", "invalid_request_error") from error
    if not isinstance(content, dict):
        raise Refused(400, "The body is no JSON object.", "invalid_request_error")
    return content


# --- The program -----------------------------------------------------------------------------------------------------


async def serve(endpoint: Endpoint, port: int, stop_after_s: float, *, stop_with_stdin: bool) -> None:
    """Listen until told to stop, until the time is over, or until standard input ends."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    server = await asyncio.start_server(endpoint.connected, "127.0.0.1", port, limit=_MAX_HEAD_BYTES, backlog=1024)
    loop.call_later(stop_after_s, stop.set)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if stop_with_stdin:
        threading.Thread(target=_await_end_of_stdin, args=(loop, stop), daemon=True).start()
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await stop.wait()
    server.close()


def _await_end_of_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    while os.read(0, 4096):
        pass
    loop.call_soon_threadsafe(stop.set)


def read_truth(path: Path) -> tuple[dict[str, dict[str, bool]], dict[str, Noise]]:
    """Truth by image and concept, and the noise of single concepts, from a JSON file; raises `ValueError`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    noise = {concept_id: Noise(**values) for concept_id, values in content.pop("noise", {}).items()}
    for image_sha256, row in content.items():
        if not re.fullmatch("[0-9a-f]{64}", image_sha256) or not all(isinstance(v, bool) for v in row.values()):
            raise ValueError(
                f"{path}: expected {{sha256: {{concept_id: true or false}}}}, got {image_sha256!r}: {row!r}"
            )
    return content, noise


def _share(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value


def _seconds(text: str) -> float:
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, got {text}")
    return value


def _named_fault(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    try:
        parsed = json.loads(value) if equals else 1
        fault_of(name, parsed)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name, parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--port", type=int, default=0, help="0: any free one")
    add("--seed", type=int, default=0, help="of errors, latencies and faults")
    add("--latency-s", type=_seconds, default=0.0)
    add("--latency-jitter-s", type=_seconds, default=0.0, help="latency varies by so much to either side")
    add("--truth", type=Path, help="JSON file of what is true")
    add("--prevalence", type=_share, default=0.4, help="share of present concepts in a pseudo-truth")
    add("--sensitivity", type=_share, default=0.9, help="chance that a present concept is called present")
    add("--specificity", type=_share, default=0.9, help="chance that an absent concept is called absent")
    add("--uncertain-share", type=_share, default=0.0, help="share of questions answered uncertain")
    add("--wavering-share", type=_share, default=0.0, help="share of answers that a sampling seed changes")
    add("--model", action="append", default=[], help="a name it knows (several times); none: every name")
    add("--api-key", help="the only key it accepts; none: every key")
    add("--blind", action="store_true", help="answers whatever the pixels")
    add("--no-schema", action="store_true", help="ignores response_format: prose around fenced JSON")
    add("--no-usage", action="store_true", help="does not tell tokens")
    add("--no-logprobs", action="store_true", help="does not tell log-probabilities")
    add("--batch-seconds", type=_seconds, default=2.0, help="time from creating a batch to its end")
    add("--batch-failure-share", type=_share, default=0.0, help="share of a batch's lines that fail")
    add("--fault", type=_named_fault, action="append", default=[], metavar="NAME=VALUE")
    add("--stop-after-s", type=_seconds, default=900.0)
    add("--stop-with-stdin", action="store_true", help="ends when standard input does")
    return parser


def main() -> None:
    given = _parser().parse_args()
    try:
        truth, noise_of = read_truth(given.truth) if given.truth else ({}, {})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        sys.exit(f"--truth: {error}")
    witness = Witness(
        seed=given.seed,
        noise=Noise(given.sensitivity, given.specificity),
        noise_of=noise_of,
        truth=truth,
        prevalence=given.prevalence,
        uncertain_share=given.uncertain_share,
        wavering_share=given.wavering_share,
        is_blind=given.blind,
    )
    manner = Manner(
        seed=given.seed,
        latency_s=given.latency_s,
        latency_jitter_s=given.latency_jitter_s,
        models=tuple(given.model),
        api_key=given.api_key,
        keeps_schema=not given.no_schema,
        reports_usage=not given.no_usage,
        reports_logprobs=not given.no_logprobs,
        batch_seconds=given.batch_seconds,
        batch_failure_share=given.batch_failure_share,
    )
    endpoint = Endpoint(witness, manner, dict(given.fault))
    try:
        asyncio.run(serve(endpoint, given.port, given.stop_after_s, stop_with_stdin=given.stop_with_stdin))
    except OSError as error:
        sys.exit(f"port {given.port} of 127.0.0.1: {error}; give another --port, or 0 for any free one")


class Simulator:
    """A simulator in a process of its own, for tests and benchmarks; it ends with the `with` block."""

    def __init__(self, *arguments: object, start_timeout_s: float = 30.0) -> None:
        """A simulator with these command-line arguments, not yet started."""
        self._command = [sys.executable, __file__, "--stop-with-stdin", *map(str, arguments)]
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[str] | None = None
        self.base_url = ""
        """Address for an OpenAI client, once started."""

    def __enter__(self) -> Self:
        """Start it; raises `RuntimeError` when no address comes in time."""
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process = process
        assert process.stdout is not None
        nothing: list[int] = []
        is_ready, _, _ = select.select([process.stdout], nothing, nothing, self._start_timeout_s)
        self.base_url = process.stdout.readline().strip() if is_ready else ""
        if not self.base_url:
            self.stop()
            raise RuntimeError(f"The simulator printed no address in {self._start_timeout_s} s: {self._command}")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._started().pid

    @property
    def is_running(self) -> bool:
        """Whether its process still lives."""
        return self._started().poll() is None

    def wait(self, timeout_s: float) -> int:
        """Its exit code, once it has ended by itself; raises `subprocess.TimeoutExpired`."""
        return self._started().wait(timeout_s)

    def close_stdin(self) -> None:
        """What happens to it when its parent dies."""
        stdin = self._started().stdin
        assert stdin is not None
        stdin.close()

    def stop(self) -> None:
        """End it, whatever it is doing."""
        process = self._started()
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()

    def state(self) -> JsonObject:
        """What it has seen and done so far: the fields of `Tally`."""
        return self._call("GET", "/simulator/state")

    def set_faults(self, plan: Mapping[str, object]) -> None:
        """Replace the plan of faults; raises `ValueError` with the simulator's words for a plan it cannot read."""
        self._call("POST", "/simulator/faults", json.dumps(plan))

    def _call(self, method: str, path: str, body: str | None = None) -> JsonObject:
        # Not urllib: a proxy from the environment has no business here.
        connection = http.client.HTTPConnection(self.base_url.split("/")[2], timeout=30)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            content: JsonObject = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(content["error"]["message"])
        return content

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise RuntimeError("The simulator is not started; use it in a with block.")
        return self._process


if __name__ == "__main__":
    main()
