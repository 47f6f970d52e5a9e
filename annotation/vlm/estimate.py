"""What a run will send and cost, before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass

from annotation.prompts import judging_request
from annotation.vlm.budget import most_usage
from annotation.vlm.settings import VlmSettings
from data_contracts.concepts import Vocabulary

_SECONDS_PER_REQUEST = 6.0
_EMBEDDED_SECONDS_PER_REQUEST = 0.07
_OUTPUT_TOKENS_PER_CONCEPT = 35
_OUTPUT_TOKENS_AROUND = 20


@dataclass(frozen=True)
class Estimate:
    """Requests, tokens, money and time of judging some images."""

    requests: int
    """Requests to send; images that the journal knows are not among them if the caller leaves them out."""
    input_tokens: int
    """Tokens of all questions, images counted as OpenAI counts them."""
    output_tokens: int
    """Tokens of all answers, as answers usually are; no answer may be longer than `max_output_tokens`."""
    max_output_tokens: int
    """The limit that all answers together cannot pass."""
    cost_usd: float | None
    """Likely price; None when no price is known."""
    max_cost_usd: float | None
    """Price if every answer is as long as it may be; None when no price is known."""
    seconds: float
    """Time at the configured concurrency and rates, at six seconds an answer."""


def estimate(n_images: int, vocabulary: Vocabulary, settings: VlmSettings, modality: str = "medical image") -> Estimate:
    """What judging `n_images` for all concepts of a vocabulary takes."""
    request = judging_request(b"", vocabulary, modality, settings.max_output_tokens)
    most = most_usage(request, settings)
    usual = min(most.output_tokens, _OUTPUT_TOKENS_AROUND + _OUTPUT_TOKENS_PER_CONCEPT * len(vocabulary))
    prices = settings.usd_per_token
    per_image_usd = None if prices is None else most.input_tokens * prices[0] + usual * prices[1]
    per_image_max_usd = None if prices is None else most.input_tokens * prices[0] + most.output_tokens * prices[1]
    return Estimate(
        requests=n_images,
        input_tokens=n_images * most.input_tokens,
        output_tokens=n_images * usual,
        max_output_tokens=n_images * most.output_tokens,
        cost_usd=None if per_image_usd is None else n_images * per_image_usd,
        max_cost_usd=None if per_image_max_usd is None else n_images * per_image_max_usd,
        seconds=n_images * _seconds_per_image(settings, most.input_tokens + most.output_tokens),
    )


def _seconds_per_image(settings: VlmSettings, n_tokens: int) -> float:
    answer_s = _EMBEDDED_SECONDS_PER_REQUEST if settings.is_embedded else _SECONDS_PER_REQUEST / settings.concurrency
    by_requests_s = 60.0 / settings.requests_per_minute if settings.requests_per_minute else 0.0
    by_tokens_s = 60.0 * n_tokens / settings.tokens_per_minute if settings.tokens_per_minute else 0.0
    return max(answer_s, by_requests_s, by_tokens_s)
