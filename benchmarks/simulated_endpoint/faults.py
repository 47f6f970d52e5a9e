"""Faults on demand: which requests they hit, and what they do to an answer."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .names import CHAT, UNCERTAIN, JsonObject
from .witness import chance


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
                found[f"x-ratelimit-reset-{name}"] = duration(bucket.wait_s(bucket.capacity))
        return found


def duration(seconds: float) -> str:
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
