from __future__ import annotations

import pytest

from annotation.vlm.estimate import estimate
from annotation.vlm.settings import VlmSettings
from data_contracts.concepts import Concept, Vocabulary

VOCABULARY = Vocabulary.of(Concept(f"c{i}", f"concept number {i}", "What to look for.") for i in range(10))
REMOTE = {"base_url": "http://x/v1", "model": "m"}


def test_everything_grows_with_the_images() -> None:
    one, hundred = (estimate(n, VOCABULARY, VlmSettings()) for n in (1, 100))
    assert (one.requests, hundred.requests) == (1, 100)
    assert hundred.input_tokens == 100 * one.input_tokens
    assert hundred.seconds == pytest.approx(100 * one.seconds)
    assert one.output_tokens < one.max_output_tokens


def test_the_price_is_tokens_times_prices_and_has_an_upper_bound() -> None:
    settings = VlmSettings(**REMOTE, input_usd_per_million_tokens=2.0, output_usd_per_million_tokens=8.0)
    found = estimate(1000, VOCABULARY, settings)
    assert found.cost_usd == pytest.approx((2 * found.input_tokens + 8 * found.output_tokens) / 1e6)
    assert found.max_cost_usd == pytest.approx((2 * found.input_tokens + 8 * found.max_output_tokens) / 1e6)


def test_an_unknown_price_is_said_not_guessed() -> None:
    found = estimate(1000, VOCABULARY, VlmSettings(**REMOTE))
    assert (found.cost_usd, found.max_cost_usd) == (None, None)
    assert estimate(1000, VOCABULARY, VlmSettings()).cost_usd == 0


def test_rates_bound_the_time_from_below() -> None:
    assert estimate(600, VOCABULARY, VlmSettings(**REMOTE, requests_per_minute=60, concurrency=64)).seconds >= 600
    slow = estimate(600, VOCABULARY, VlmSettings(**REMOTE, tokens_per_minute=10_000, concurrency=64))
    assert slow.seconds > estimate(600, VOCABULARY, VlmSettings(**REMOTE, concurrency=64)).seconds


def test_nothing_to_do_costs_nothing() -> None:
    found = estimate(0, VOCABULARY, VlmSettings())
    assert (found.requests, found.input_tokens, found.cost_usd, found.seconds) == (0, 0, 0, 0)
