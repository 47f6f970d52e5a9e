"""What a run will send and cost, before anything is sent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from annotation.vlm.prices import Price
from annotation.vlm.schema import Usage, VlmRequest
from annotation.vlm.settings import VlmSettings
from annotation.vlm.tokens import image_tokens, text_tokens

SECONDS_PER_ANSWER = 6.0
"""How long an endpoint takes for an answer, as long as nobody has measured it."""

_EMBEDDED_SECONDS_PER_REQUEST = 0.07
_USUAL_SHARE_OF_LIMIT = 0.55
"""Answers usually have about half the tokens that they may have."""
BATCH_PRICE = 0.5
"""Part of the usual price that the Batch API costs: OpenAI's takes half."""


def most_usage(request: VlmRequest, settings: VlmSettings, tokens_per_image: int | None = None) -> Usage:
    """The tokens a request may be billed for: its input about as counted, its output at the limit it sets.

    `tokens_per_image` is what the probe measured; None: as the provider's published formula says.
    """
    n_images = sum(isinstance(part, bytes) for part in request.parts)
    texts = [request.system, *(part for part in request.parts if isinstance(part, str))]
    if request.schema is not None:
        texts.append(json.dumps(request.schema))
    side_px = settings.side_px
    formula = image_tokens(settings.model, side_px, side_px)
    per_image = formula if tokens_per_image is None else tokens_per_image
    return Usage(text_tokens(sum(map(_characters, texts))) + n_images * per_image, request.max_output_tokens)


@dataclass(frozen=True)
class Work:
    """Requests of one kind: what each is like, and how many there are."""

    request: VlmRequest
    n_requests: int


@dataclass(frozen=True)
class Estimate:
    """Requests, tokens, money and time of some work at one endpoint."""

    requests: int
    """Requests to send, if none has to be repeated."""
    images_sent: int
    """Images in all of them."""
    input_tokens: int
    """Tokens of all questions, images counted as the provider counts them."""
    output_tokens: int
    """Tokens of all answers, as answers usually are."""
    max_output_tokens: int
    """The limit that all answers together cannot pass."""
    cost_usd: float | None
    """Likely price; None when no price is known."""
    max_cost_usd: float | None
    """Price if every answer is as long as it may be; None when no price is known."""
    seconds: float
    """Time at the configured concurrency and rates."""
    most_usd_per_request: float | None
    """Highest price of a single request: a cap below it can never be kept."""


def estimate(
    works: Iterable[Work],
    settings: VlmSettings,
    price: Price | None,
    *,
    tokens_per_image: int | None = None,
    seconds_per_answer: float | None = None,
) -> Estimate:
    """What this work takes; `tokens_per_image` and `seconds_per_answer` as the probe measured them."""
    works = [w for w in works if w.n_requests]
    most = [most_usage(w.request, settings, tokens_per_image) for w in works]
    n_each = [w.n_requests for w in works]
    usual = [Usage(m.input_tokens, round(m.output_tokens * _USUAL_SHARE_OF_LIMIT)) for m in most]
    images = [sum(isinstance(p, bytes) for p in w.request.parts) for w in works]
    n_requests, at_most, likely = sum(n_each), _total(most, n_each), _total(usual, n_each)
    answer_s = SECONDS_PER_ANSWER if seconds_per_answer is None else seconds_per_answer
    return Estimate(
        requests=n_requests,
        images_sent=sum(n * k for n, k in zip(n_each, images, strict=True)),
        input_tokens=at_most.input_tokens,
        output_tokens=likely.output_tokens,
        max_output_tokens=at_most.output_tokens,
        cost_usd=_usd(likely, settings, price),
        max_cost_usd=_usd(at_most, settings, price),
        seconds=_seconds(n_requests, at_most, settings, answer_s),
        most_usd_per_request=None if price is None else max((_usd(m, settings, price) or 0.0 for m in most), default=0),
    )


def _characters(text: str) -> int:
    """The length of a text, with what is not ASCII counted for its bytes: tokenizers cut it finer."""
    return len(text) if text.isascii() else len(text.encode())


def _total(usages: Sequence[Usage], n_each: Sequence[int]) -> Usage:
    pairs = list(zip(usages, n_each, strict=True))
    return Usage(sum(u.input_tokens * n for u, n in pairs), sum(u.output_tokens * n for u, n in pairs))


def _usd(usage: Usage, settings: VlmSettings, price: Price | None) -> float | None:
    if price is None:
        return None
    full = usage.input_tokens * price.input_usd_per_token + usage.output_tokens * price.output_usd_per_token
    return full * (BATCH_PRICE if settings.batch else 1.0)


def _seconds(n_requests: int, at_most: Usage, settings: VlmSettings, answer_s: float) -> float:
    n_tokens = at_most.input_tokens + at_most.output_tokens
    answers_s = n_requests * answer_s / settings.concurrency
    if settings.is_embedded:
        answers_s = n_requests * _EMBEDDED_SECONDS_PER_REQUEST
    by_requests_s = 60.0 * n_requests / settings.requests_per_minute if settings.requests_per_minute else 0.0
    by_tokens_s = 60.0 * n_tokens / settings.tokens_per_minute if settings.tokens_per_minute else 0.0
    return max(answers_s, by_requests_s, by_tokens_s)
