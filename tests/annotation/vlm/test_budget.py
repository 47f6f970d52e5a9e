from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotation.vlm.budget import Budget, Pace, image_tokens, most_usage, reserved, text_tokens
from annotation.vlm.schema import Usage, VlmRequest
from annotation.vlm.settings import VlmSettings
from data_contracts.errors import BudgetReached, ExitCode

PRICES = {"input_usd_per_million_tokens": 1.0, "output_usd_per_million_tokens": 4.0}


def settings(**changes: float) -> VlmSettings:
    return VlmSettings.model_validate(PRICES | changes)


async def test_the_cap_of_requests_is_exact_under_concurrency() -> None:
    budget = Budget(settings(max_requests=7))
    at_once, most_at_once = 0, 0

    async def one() -> None:
        nonlocal at_once, most_at_once
        async with reserved(budget, Usage(10, 10)) as billed:
            at_once += 1
            most_at_once = max(most_at_once, budget.n_requests + at_once)
            await asyncio.sleep(0.001)
            billed.append(Usage(10, 5))
            at_once -= 1

    results = await asyncio.gather(*(one() for _ in range(50)), return_exceptions=True)
    assert sum(r is None for r in results) == 7
    assert sum(isinstance(r, BudgetReached) for r in results) == 43
    assert budget.n_requests == 7
    assert most_at_once <= 7


async def test_spent_and_reserved_never_pass_the_cap_of_money() -> None:
    budget = Budget(settings(max_cost_usd=0.001))
    most = Usage(100, 50)  # 0.0003 USD: three fit at once, but cheap answers leave room for more.
    highest_usd = 0.0

    async def one() -> None:
        nonlocal highest_usd
        async with reserved(budget, most) as billed:
            highest_usd = max(highest_usd, (budget.spent_usd or 0) + budget._reserved_usd)
            await asyncio.sleep(0.001)
            billed.append(Usage(100, 10))

    results = await asyncio.gather(*(one() for _ in range(20)), return_exceptions=True)
    assert highest_usd <= 0.001 + 1e-9
    assert budget.spent_usd == pytest.approx(sum(r is None for r in results) * 0.00014)
    assert sum(r is None for r in results) == 6


async def test_a_stop_at_the_cap_is_resumable_and_says_what_to_do() -> None:
    budget = Budget(settings(max_requests=1))
    async with reserved(budget, Usage(1, 1)):
        pass
    with pytest.raises(BudgetReached, match=r"cap of 1 requests.*journal.*same command again") as caught:
        await budget.reserve(Usage(1, 1))
    assert caught.value.exit_code == ExitCode.RESUMABLE


async def test_a_failed_request_counts_but_costs_nothing() -> None:
    budget = Budget(settings(max_requests=2))
    with pytest.raises(RuntimeError):
        async with reserved(budget, Usage(1000, 1000)):
            raise RuntimeError
    assert (budget.n_requests, budget.spent_usd) == (1, 0.0)


def test_without_prices_money_is_unknown() -> None:
    assert Budget(VlmSettings(base_url="http://x/v1", model="m")).spent_usd is None
    assert Budget(VlmSettings()).spent_usd == 0.0


async def test_requests_leave_at_an_even_pace() -> None:
    pace = Pace(settings(requests_per_minute=1200))
    start_s = time.monotonic()
    await asyncio.gather(*(pace.wait(Usage(1, 1)) for _ in range(5)))
    assert 0.2 <= time.monotonic() - start_s < 1.0


async def test_tokens_per_minute_hold_big_requests_back() -> None:
    pace = Pace(settings(tokens_per_minute=60_000))
    start_s = time.monotonic()
    for _ in range(3):
        await pace.wait(Usage(80, 20))
    assert 0.2 <= time.monotonic() - start_s < 1.0


def test_image_tokens_follow_the_published_tile_rule() -> None:
    # 85 + 170 per 512 px tile, as in OpenAI's pricing examples for high detail.
    assert [image_tokens(side) for side in (256, 512, 1024)] == [255, 255, 765]


@given(st.integers(0, 100_000))
def test_text_tokens_never_undercount_plain_english_much(n: int) -> None:
    assert n / 4 <= text_tokens(n) <= n / 3 + 2


def test_most_usage_counts_text_images_and_the_output_limit() -> None:
    request = VlmRequest("s" * 350, ("t" * 350, b"i", b"i"), "n", {}, 77)
    most = most_usage(request, VlmSettings())
    assert most.output_tokens == 77
    assert most.input_tokens == pytest.approx(200 + 2 * 255, abs=5)
