from __future__ import annotations

import asyncio
import itertools
import threading
import time
from typing import Any

import pytest

from annotation.vlm.pace import Pace
from data_contracts.errors import Deferred, ExitCode


async def leave(pace: Pace, clock: Any, n_tokens: int = 1) -> float:
    """Seconds after which a request left."""
    start_s = clock.now_s
    await pace.wait(n_tokens)
    return clock.now_s - start_s


async def test_requests_leave_at_an_even_pace(clock: Any) -> None:
    pace = Pace(requests_per_minute=60)
    assert await clock.run(*(leave(pace, clock) for _ in range(4))) == [0, 1, 2, 3]


async def test_tokens_per_minute_hold_big_requests_back(clock: Any) -> None:
    pace = Pace(requests_per_minute=600, tokens_per_minute=60_000)
    left = await clock.run(leave(pace, clock, 2000), leave(pace, clock, 10), leave(pace, clock, 10))
    assert left == pytest.approx([0, 2, 2.1])


async def test_without_rates_nobody_waits(clock: Any) -> None:
    pace = Pace()
    assert await clock.run(*(leave(pace, clock, 10**6) for _ in range(5))) == [0] * 5


async def test_too_many_for_one_holds_all_others_back_and_slows_them(clock: Any) -> None:
    pace = Pace()
    left_at_s = await pace.wait(1)
    pace.told_to_wait(10, left_at_s)
    left = await clock.run(*(leave(pace, clock) for _ in range(4)))
    assert left[0] == 10
    gaps = [b - a for a, b in itertools.pairwise(left)]
    assert gaps == pytest.approx([pace.gap_s] * 3)
    assert pace.gap_s > 0


async def test_those_who_already_queue_are_held_back_too(clock: Any) -> None:
    pace = Pace(requests_per_minute=60)

    async def refused() -> None:
        left_at_s = await pace.wait(1)
        await clock.sleep(0.5)
        pace.told_to_wait(20, left_at_s)

    _, *left = await clock.run(refused(), *(leave(pace, clock) for _ in range(3)))
    assert left == pytest.approx([20.5, 21.5, 22.5])


async def test_after_a_refusal_sending_goes_on_below_the_rate_that_was_answered(clock: Any) -> None:
    pace = Pace()
    for _ in range(50):
        clock.now_s += 0.1
        left_at_s = await pace.wait(1)
        pace.answered()
    pace.told_to_wait(1, left_at_s)
    assert 0.1 < pace.gap_s < 0.2


async def test_answers_make_it_faster_again_until_nothing_is_left_of_the_refusal(clock: Any) -> None:
    pace = Pace()
    pace.told_to_wait(1, clock.now_s)
    gaps = []
    for _ in range(400):
        gaps.append(pace.gap_s)
        pace.answered()
    assert gaps == sorted(gaps, reverse=True)
    assert pace.gap_s == 0
    assert await clock.run(leave(pace, clock), leave(pace, clock)) == [1, 1]


async def test_many_refusals_of_what_left_before_the_first_are_one_event(clock: Any) -> None:
    once, often = Pace(), Pace()
    left_at_s = clock.now_s
    once.told_to_wait(0.05, left_at_s)
    for _ in range(64):
        # Each hold is over before the next refusal of the same burst comes in.
        often.told_to_wait(0.05, left_at_s)
        clock.now_s += 0.1
    assert often.gap_s == once.gap_s


async def test_a_refusal_of_what_left_more_slowly_slows_further(clock: Any) -> None:
    pace = Pace()
    pace.told_to_wait(1, clock.now_s)
    gap_s = pace.gap_s
    pace.told_to_wait(1, (await clock.run(pace.wait(1)))[0])
    assert pace.gap_s > gap_s


async def test_a_refusal_does_not_shorten_what_the_configured_rate_demands(clock: Any) -> None:
    pace = Pace(requests_per_minute=1)
    start_s = clock.now_s
    pace.told_to_wait(1, await pace.wait(1))
    await clock.run(pace.wait(1))
    assert clock.now_s - start_s == pytest.approx(60)


async def test_a_long_wait_within_patience_is_waited_for(clock: Any) -> None:
    pace = Pace(max_wait_s=1800)
    pace.told_to_wait(900, clock.now_s)
    assert await clock.run(leave(pace, clock)) == [900]


async def test_a_wait_beyond_patience_is_deferred_with_its_length(clock: Any) -> None:
    pace = Pace(max_wait_s=600)
    pace.told_to_wait(900, clock.now_s)
    (ended,) = await clock.run(pace.wait(1))
    assert isinstance(ended, Deferred)
    assert (ended.retry_after_s, ended.exit_code) == (900, ExitCode.RESUMABLE)
    assert "come back in 900 s; a run waits at most vlm.max_wait_s = 600 s" in ended.message


async def test_those_who_sleep_are_deferred_as_well(clock: Any) -> None:
    pace = Pace(requests_per_minute=60, max_wait_s=600)

    async def refused() -> None:
        pace.told_to_wait(900, await pace.wait(1))

    _, *others = await clock.run(refused(), pace.wait(1), pace.wait(1))
    assert [type(e) for e in others] == [Deferred, Deferred]


async def test_short_refusals_without_end_are_deferred_when_patience_is_over(clock: Any) -> None:
    pace, start_s = Pace(max_wait_s=600), clock.now_s

    async def refused_again_and_again() -> None:
        for _ in range(1000):
            pace.told_to_wait(2, await pace.wait(1))

    (ended,) = await clock.run(refused_again_and_again())
    assert isinstance(ended, Deferred)
    assert 600 <= clock.now_s - start_s <= 700


async def test_an_answer_renews_patience(clock: Any) -> None:
    pace = Pace(max_wait_s=600)
    for _ in range(5):
        pace.told_to_wait(400, clock.now_s)
        assert await clock.run(leave(pace, clock)) == [400]
        pace.answered()
    pace.told_to_wait(400, clock.now_s)
    await clock.run(pace.wait(1))
    pace.told_to_wait(400, clock.now_s)
    (ended,) = await clock.run(pace.wait(1))
    assert isinstance(ended, Deferred)


def test_one_pace_holds_across_threads_and_their_event_loops() -> None:
    pace, start_s = Pace(requests_per_minute=1200), time.monotonic()

    async def three() -> None:
        for _ in range(3):
            await pace.wait(1)

    threads = [threading.Thread(target=asyncio.run, args=(three(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.24 <= time.monotonic() - start_s < 2
