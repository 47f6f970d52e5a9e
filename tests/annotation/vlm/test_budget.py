from __future__ import annotations

import asyncio
import threading

import pytest

from annotation.vlm.budget import Budget, Spent
from data_contracts.errors import BudgetReached, ExitCode


async def test_the_cap_of_requests_is_exact_under_concurrency() -> None:
    budget, at_once, most_at_once = Budget(max_requests=7), 0, 0

    async def one() -> None:
        nonlocal at_once, most_at_once
        await budget.reserve(0)
        at_once += 1
        most_at_once = max(most_at_once, budget.spent.n_requests + at_once)
        await asyncio.sleep(0.001)
        budget.settle(0, 0)
        at_once -= 1

    results = await asyncio.gather(*(one() for _ in range(50)), return_exceptions=True)
    assert sum(r is None for r in results) == 7
    assert sum(isinstance(r, BudgetReached) for r in results) == 43
    assert budget.spent.n_requests == 7
    assert most_at_once <= 7


async def test_spent_and_reserved_never_pass_the_cap_of_money() -> None:
    budget = Budget(max_cost_usd=0.001)
    most_usd = 0.0003  # Three fit at once, but cheap answers leave room for more.
    highest_usd = 0.0

    async def one() -> None:
        nonlocal highest_usd
        await budget.reserve(most_usd)
        highest_usd = max(highest_usd, budget.committed_usd)
        await asyncio.sleep(0.001)
        budget.settle(most_usd, 0.00014)

    results = await asyncio.gather(*(one() for _ in range(20)), return_exceptions=True)
    assert highest_usd <= 0.001 + 1e-9
    assert budget.spent.usd == pytest.approx(sum(r is None for r in results) * 0.00014)
    assert sum(r is None for r in results) == 6


def test_caps_hold_across_threads_and_their_event_loops() -> None:
    budget, ended = Budget(max_requests=40), []

    async def one() -> None:
        await budget.reserve(0)
        await asyncio.sleep(0.0005)
        budget.settle(0, 0)

    async def many() -> None:
        ended.extend(await asyncio.gather(*(one() for _ in range(30)), return_exceptions=True))

    threads = [threading.Thread(target=asyncio.run, args=(many(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sum(e is None for e in ended), budget.spent.n_requests) == (40, 40)


async def test_a_stop_at_the_cap_is_resumable_and_says_what_to_do() -> None:
    budget = Budget(max_requests=1)
    await budget.reserve(0.5)
    budget.settle(0.5, 0.25)
    with pytest.raises(
        BudgetReached, match=r"cap of 1 requests.*1 requests were sent for 0.2500 USD.*journal.*same command again"
    ) as caught:
        await budget.reserve(0.5)
    assert caught.value.exit_code == ExitCode.RESUMABLE


async def test_one_who_does_not_fit_now_waits_for_what_others_leave_over() -> None:
    budget = Budget(max_cost_usd=1.0)
    await budget.reserve(0.8)
    waiting = asyncio.create_task(budget.reserve(0.5))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    budget.settle(0.8, 0.4)
    await asyncio.wait_for(waiting, 1)
    assert budget.committed_usd == pytest.approx(0.9)


async def test_what_was_never_sent_is_given_back() -> None:
    budget = Budget(max_requests=1, max_cost_usd=1.0)
    for _ in range(3):
        await budget.reserve(1.0)
        budget.release(1.0)
    assert (budget.spent, budget.committed_usd) == (Spent(0, 0.0, 0.0), 0.0)


async def test_what_may_have_been_billed_is_spent_and_told_apart() -> None:
    budget = Budget(max_cost_usd=1.0)
    for is_lost in (True, False):
        await budget.reserve(0.4)
        budget.settle(0.4, 0.4 if is_lost else 0.1, is_lost=is_lost)
    assert budget.spent == Spent(2, pytest.approx(0.5), 0.4)
    with pytest.raises(BudgetReached, match="cap of 1 USD"):
        await budget.reserve(0.6)


def test_a_batch_is_reserved_and_settled_as_a_whole() -> None:
    budget = Budget(max_requests=100, max_cost_usd=2.0)
    budget.reserve_many(60, 1.5)
    assert not budget.fits(60, 0.1)
    assert not budget.fits(1, 0.6)
    assert budget.fits(40, 0.5)
    with pytest.raises(BudgetReached):
        budget.reserve_many(41, 0.0)
    budget.settle_many(60, 1.5, 1.0)
    assert budget.spent == Spent(60, 1.0, 0.0)
    budget.reserve_many(40, 1.0)
    budget.release_many(40, 1.0)
    assert budget.committed_usd == 1.0


async def test_rounding_of_many_small_amounts_is_no_overrun() -> None:
    budget = Budget(max_cost_usd=0.3)
    for _ in range(3):
        await budget.reserve(0.1)
    for _ in range(3):
        budget.settle(0.1, 0.1)
    assert budget.spent.n_requests == 3


async def test_nobody_waits_for_a_batch_that_settles_on_another_day() -> None:
    budget = Budget(max_requests=10)
    budget.reserve_many(9, 0.0)
    await budget.reserve(0.0)
    budget.settle(0.0, 0.0)
    with pytest.raises(BudgetReached):
        await asyncio.wait_for(budget.reserve(0.0), timeout=2)
