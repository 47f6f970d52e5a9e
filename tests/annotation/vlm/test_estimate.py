from __future__ import annotations

from typing import Any

import pytest

from annotation.vlm.estimate import Work, estimate, most_usage
from annotation.vlm.prices import Price
from annotation.vlm.schema import VlmRequest
from annotation.vlm.settings import VlmSettings
from annotation.vlm.tokens import image_tokens, text_tokens

REMOTE: dict[str, Any] = {"base_url": "http://x/v1", "model": "gpt-4o", "image_side_px": 512}
PRICE = Price(2e-6, 8e-6, "test")
REQUEST = VlmRequest("s" * 350, ("t" * 350, b"i"), "n", None, 100)
WITH_EXAMPLE = VlmRequest("s" * 350, ("t" * 350, b"e", b"i"), "n", None, 40)


def remote(**changes: Any) -> VlmSettings:
    return VlmSettings(**(REMOTE | changes))


def test_the_most_is_text_images_schema_and_the_output_limit() -> None:
    most = most_usage(WITH_EXAMPLE, remote())
    assert most.output_tokens == 40
    assert most.input_tokens == text_tokens(700) + 2 * image_tokens("gpt-4o", 512, 512)
    with_schema = VlmRequest("s" * 350, ("t" * 350, b"e", b"i"), "n", {"description": "x" * 700}, 40)
    assert most_usage(with_schema, remote()).input_tokens > most.input_tokens + text_tokens(650)


def test_larger_images_and_dearer_models_cost_more() -> None:
    small, large = (most_usage(REQUEST, remote(image_side_px=side)).input_tokens for side in (512, 1024))
    assert large - small == image_tokens("gpt-4o", 1024, 1024) - image_tokens("gpt-4o", 512, 512) > 0
    assert most_usage(REQUEST, remote(model="gpt-4o-mini")).input_tokens > small


def test_what_the_probe_measured_replaces_the_formula() -> None:
    assert most_usage(WITH_EXAMPLE, remote(), 1000).input_tokens == text_tokens(700) + 2000
    assert most_usage(WITH_EXAMPLE, remote(), 0).input_tokens == text_tokens(700)


def test_everything_grows_with_the_requests() -> None:
    one, hundred = (estimate([Work(REQUEST, n)], VlmSettings(), None) for n in (1, 100))
    assert (one.requests, hundred.requests, hundred.images_sent) == (1, 100, 100)
    assert hundred.input_tokens == 100 * one.input_tokens
    assert hundred.seconds == pytest.approx(100 * one.seconds)
    assert one.output_tokens < one.max_output_tokens == 100


def test_works_of_several_kinds_are_added() -> None:
    both = estimate([Work(REQUEST, 3), Work(WITH_EXAMPLE, 2)], remote(), PRICE)
    first, second = (estimate([w], remote(), PRICE) for w in (Work(REQUEST, 3), Work(WITH_EXAMPLE, 2)))
    assert (both.requests, both.images_sent) == (5, 3 + 4)
    assert both.input_tokens == first.input_tokens + second.input_tokens
    assert both.max_output_tokens == 3 * 100 + 2 * 40
    assert both.max_cost_usd == pytest.approx((first.max_cost_usd or 0) + (second.max_cost_usd or 0))


def test_the_price_is_tokens_times_prices_and_has_an_upper_bound() -> None:
    found = estimate([Work(REQUEST, 1000)], remote(), PRICE)
    assert found.cost_usd == pytest.approx((2 * found.input_tokens + 8 * found.output_tokens) / 1e6)
    assert found.max_cost_usd == pytest.approx((2 * found.input_tokens + 8 * found.max_output_tokens) / 1e6)


def test_the_dearest_request_is_what_a_cap_must_allow() -> None:
    found = estimate([Work(REQUEST, 10), Work(WITH_EXAMPLE, 10)], remote(), PRICE)
    single = [estimate([Work(r, 1)], remote(), PRICE).max_cost_usd or 0 for r in (REQUEST, WITH_EXAMPLE)]
    assert found.most_usd_per_request == pytest.approx(max(single))


def test_a_batch_costs_half() -> None:
    plain, batch = (estimate([Work(REQUEST, 10)], remote(batch=b), PRICE).max_cost_usd or 0 for b in (False, True))
    assert batch == pytest.approx(plain / 2)


def test_an_unknown_price_is_said_not_guessed() -> None:
    found = estimate([Work(REQUEST, 1000)], remote(), None)
    assert (found.cost_usd, found.max_cost_usd, found.most_usd_per_request) == (None, None, None)


def test_rates_bound_the_time_from_below() -> None:
    work = [Work(REQUEST, 600)]
    assert estimate(work, remote(requests_per_minute=60, concurrency=64), None).seconds >= 600
    slow = estimate(work, remote(tokens_per_minute=10_000, concurrency=64), None)
    assert slow.seconds == pytest.approx((slow.input_tokens + slow.max_output_tokens) / 10_000 * 60)
    assert slow.seconds > estimate(work, remote(concurrency=64), None).seconds


def test_time_is_shared_by_all_who_ask_and_follows_what_was_measured() -> None:
    work = [Work(REQUEST, 600)]
    assert estimate(work, remote(concurrency=10), None, seconds_per_answer=2).seconds == pytest.approx(120)
    assert estimate(work, remote(concurrency=20), None, seconds_per_answer=2).seconds == pytest.approx(60)


def test_nothing_to_do_costs_nothing() -> None:
    for works in ([], [Work(REQUEST, 0)]):
        found = estimate(works, remote(), PRICE)
        assert (found.requests, found.input_tokens, found.cost_usd, found.seconds) == (0, 0, 0, 0)
        assert found.most_usd_per_request == 0


def test_what_is_not_ascii_is_counted_for_more_than_its_characters() -> None:
    plain, umlauts = (VlmRequest("s", (c * 700,), "n", None, 100) for c in ("e", "細"))
    assert most_usage(umlauts, remote()).input_tokens > 2.5 * most_usage(plain, remote()).input_tokens
