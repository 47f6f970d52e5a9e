from __future__ import annotations

import asyncio
import contextlib
import email.utils
import gzip
import json
import random
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotation.vlm.budget import Budget, Spent
from annotation.vlm.client import VlmClient
from annotation.vlm.estimate import most_usage
from annotation.vlm.gate import Gate, Stopped, retry_after_s, usd
from annotation.vlm.pace import Pace
from annotation.vlm.prices import Price
from annotation.vlm.schema import FaultCode, Usage, VlmRequest
from data_contracts.errors import BudgetReached, ConfigurationError, Deferred, EndpointError, ExitCode

Make = Callable[..., VlmClient]

PRICE = Price(1e-6, 4e-6, "test")
BROKEN = httpx2.Response(500, headers={"retry-after-ms": "1"}, json={"error": {"message": "oops"}})


def most_usd(question: VlmRequest, client: VlmClient) -> float:
    return usd(most_usage(question, client.settings), PRICE)


def numbered(n: int) -> list[VlmRequest]:
    return [VlmRequest("s", (str(i),), "n", {}, 50) for i in range(n)]


# ---- every attempt counts -----------------------------------------------------------------------------------------


async def test_every_attempt_of_the_openai_client_counts(
    make_client: Make, scripted: Any, question: VlmRequest, good: str
) -> None:
    endpoint, budget = scripted(BROKEN, BROKEN, good), Budget()
    async with make_client(endpoint, budget=budget, price=PRICE, max_retries=3) as client:
        assert await client.send(question)
    assert len(endpoint.sent) == 3
    # Only the answer is billed: 100 tokens in and 20 out.
    assert budget.spent == Spent(3, pytest.approx(180e-6), 0.0)


async def test_an_attempt_beyond_the_cap_never_reaches_the_server(
    make_client: Make, scripted: Any, question: VlmRequest, good: str
) -> None:
    endpoint = scripted(BROKEN, BROKEN, good)
    async with make_client(endpoint, max_requests=2, max_retries=3) as client:
        with pytest.raises(BudgetReached, match="cap of 2 requests"):
            await client.send(question)
        assert client.budget.spent.n_requests == len(endpoint.sent) == 2


async def test_a_lost_attempt_uses_up_money_so_that_its_repetition_may_not_fit(
    make_client: Make, scripted: Any, question: VlmRequest, good: str
) -> None:
    endpoint = scripted(httpx2.ReadTimeout("slow"), good)
    async with make_client(endpoint, price=PRICE, max_retries=1, max_cost_usd=0.004) as client:
        assert most_usd(question, client) < 0.004 < 2 * most_usd(question, client)
        with pytest.raises(BudgetReached, match="cap of 0.004 USD"):
            await client.send(question)
    assert len(endpoint.sent) == 1


@pytest.mark.parametrize(
    "error", [httpx2.ReadTimeout, httpx2.WriteTimeout, httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError]
)
async def test_an_attempt_whose_answer_was_lost_is_counted_at_its_highest_price_as_possible_only(
    make_client: Make, scripted: Any, question: VlmRequest, error: type[httpx2.TransportError]
) -> None:
    async with make_client(scripted(error("lost")), price=PRICE) as client:
        assert await client.send(question) in {FaultCode.TIMED_OUT, FaultCode.CONNECTION_LOST}
        most = most_usd(question, client)
        assert client.budget.spent == Spent(1, most, most)
        assert client.budget.committed_usd == pytest.approx(most)


@pytest.mark.parametrize("error", [httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout])
async def test_an_attempt_that_never_left_is_not_counted(
    make_client: Make, scripted: Any, question: VlmRequest, error: type[httpx2.TransportError]
) -> None:
    async with make_client(scripted(error("nobody there")), price=PRICE) as client:
        with contextlib.suppress(EndpointError):
            await client.send(question)
        assert client.budget.spent == Spent(0, 0.0, 0.0)
        assert client.budget.committed_usd == 0


@pytest.mark.parametrize("told", [None, {}, "many", {"prompt_tokens": -5, "completion_tokens": 3}, {"total_tokens": 3}])
async def test_tokens_that_are_not_told_are_counted_as_the_most_they_may_be(
    make_client: Make, scripted: Any, answer: Any, question: VlmRequest, good: str, told: object
) -> None:
    async with make_client(scripted(answer(good, usage=told)), price=PRICE) as client:
        record = await client.send(question)
        assert not isinstance(record, FaultCode)
        assert (record.usage, record.is_counted) == (most_usage(question, client.settings), False)
        assert client.budget.spent == Spent(1, most_usd(question, client), 0.0)


async def test_after_a_dearer_answer_than_foreseen_more_is_set_aside(
    make_client: Make, scripted: Any, answer: Any, question: VlmRequest, good: str
) -> None:
    async with make_client(scripted(good), price=PRICE) as client:
        foreseen_usd = most_usd(question, client)
    # An endpoint that bills three times what the formula says: after one such answer a second does not fit any more.
    n_input = int(3 * foreseen_usd / PRICE.input_usd_per_token)
    dear = answer(good, usage={"prompt_tokens": n_input, "completion_tokens": 0})
    endpoint = scripted(dear)
    async with make_client(endpoint, price=PRICE, max_cost_usd=4.5 * foreseen_usd) as client:
        await client.send(question)
        with pytest.raises(BudgetReached):
            await client.send(question)
    assert len(endpoint.sent) == 1


async def test_one_who_is_cancelled_while_waiting_for_its_turn_was_not_sent(
    make_client: Make, scripted: Any, question: VlmRequest, good: str
) -> None:
    pace = Pace(requests_per_minute=1)
    await pace.wait(1)
    async with make_client(scripted(good), pace=pace, price=PRICE) as client:
        waiting = asyncio.create_task(client.send(question))
        await asyncio.sleep(0.1)
        assert client.budget.committed_usd > 0
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert (client.budget.spent, client.budget.committed_usd) == (Spent(0, 0.0, 0.0), 0.0)


async def test_one_who_is_cancelled_in_flight_may_have_been_billed(make_client: Make, question: VlmRequest) -> None:
    async def handler(_: httpx2.Request) -> httpx2.Response:
        await asyncio.sleep(60)
        raise AssertionError

    async with make_client(handler, price=PRICE) as client:
        waiting = asyncio.create_task(client.send(question))
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert client.budget.spent == Spent(1, most_usd(question, client), most_usd(question, client))


async def test_a_list_of_models_costs_nothing(make_client: Make, scripted: Any) -> None:
    async with make_client(scripted({"data": [{"id": "m"}]}), max_requests=1) as client:
        assert await client.model_names() == ["m"]
        assert client.budget.spent.n_requests == 0


async def test_spent_and_reserved_money_never_pass_the_cap_however_many_ask(make_client: Make, answer: Any) -> None:
    cap_usd, draw = 0.002, random.Random(0)
    budget, committed, n_sent = Budget(max_cost_usd=cap_usd), [], 0

    async def handler(request: httpx2.Request) -> httpx2.Response:
        nonlocal n_sent
        n_sent += 1
        limit = json.loads(request.content)["max_completion_tokens"]
        await asyncio.sleep(draw.random() * 0.02)
        if draw.random() < 0.2:
            raise httpx2.ReadError("lost")
        usage = {"prompt_tokens": 1, "completion_tokens": draw.randint(1, limit)}
        return httpx2.Response(200, json=answer("{}", usage=usage))

    async def watch() -> None:
        while True:
            committed.append(budget.committed_usd)
            await asyncio.sleep(0)

    watcher = asyncio.create_task(watch())
    async with make_client(handler, budget=budget, price=PRICE, concurrency=50) as client:
        ended = await asyncio.gather(*(client.send(q) for q in numbered(50)), return_exceptions=True)
    watcher.cancel()
    assert max(committed) <= cap_usd + 1e-9
    assert max(committed) > cap_usd / 2
    n_stopped = sum(isinstance(e, BudgetReached) for e in ended)
    assert 0 < n_stopped < 50
    assert n_sent == 50 - n_stopped == budget.spent.n_requests


async def test_the_cap_holds_and_the_next_command_goes_on(
    make_client: Make, scripted: Any, good: str, tmp_path: Any
) -> None:
    endpoint, stopped = scripted(good), []
    for _ in range(3):
        # Every command has a budget of its own; the journal is the same.
        async with make_client(endpoint, max_requests=2) as client:
            asked = (client.ask(q, json.loads) for q in numbered(5))
            ended = await asyncio.gather(*asked, return_exceptions=True)
        errors = [e for e in ended if isinstance(e, BaseException)]
        assert all(isinstance(e, BudgetReached) and e.exit_code == ExitCode.RESUMABLE for e in errors)
        stopped.append(len(errors))
    assert stopped == [3, 1, 0]
    assert len(endpoint.sent) == 5


# ---- time, size and place of an answer ----------------------------------------------------------------------------


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n"], ids=["head", "body"])
async def test_an_answer_that_trickles_in_ends_at_the_timeout(
    make_client: Make, listen: Any, question: VlmRequest, head: bytes
) -> None:
    async def trickle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        for byte in (b"" if head else b"HTTP/1.1 200 OK\r\nx: ") + b"x" * 1000:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.02)

    start_s = time.monotonic()
    async with make_client(base_url=await listen(trickle), timeout_s=0.3, price=PRICE) as client:
        assert await client.send(question) is FaultCode.TIMED_OUT
        assert client.budget.spent.maybe_usd == most_usd(question, client)
    assert 0.3 <= time.monotonic() - start_s < 3


async def test_an_answer_without_end_is_refused(
    make_client: Make, listen: Any, question: VlmRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("annotation.vlm.gate.MAX_ANSWER_BYTES", 100_000)
    written = 0

    async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")
        while True:
            writer.write(b" " * 10_000)
            await writer.drain()
            written += 10_000

    async with make_client(base_url=await listen(flood), timeout_s=20) as client:
        assert await client.send(question) is FaultCode.CONNECTION_LOST
    # What the sockets themselves hold has been written, too.
    assert 100_000 <= written < 50_000_000


async def test_an_answer_that_unpacks_without_end_is_refused(
    make_client: Make, scripted: Any, question: VlmRequest
) -> None:
    packed = gzip.compress(b" " * 20 * 2**20)
    assert len(packed) < 50_000
    headers = {"content-encoding": "gzip", "content-type": "application/json"}

    async def pieces() -> Any:
        yield packed

    def handler(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers=headers, content=pieces())

    async with make_client(handler) as client:
        assert await client.send(question) is FaultCode.CONNECTION_LOST


async def test_a_packed_answer_is_read(make_client: Make, answer: Any, question: VlmRequest, good: str) -> None:
    packed = gzip.compress(json.dumps(answer(good)).encode())

    async def pieces() -> Any:
        yield packed

    def handler(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-encoding": "gzip"}, content=pieces())

    async with make_client(handler) as client:
        record = await client.send(question)
    assert not isinstance(record, FaultCode)
    assert record.text == good


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_to_another_host_is_not_followed(
    make_client: Make, listen: Any, question: VlmRequest, status: int
) -> None:
    n_elsewhere = 0

    async def elsewhere(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal n_elsewhere
        n_elsewhere += 1

    target = (await listen(elsewhere)).replace("127.0.0.1", "localhost")

    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status} Moved\r\nlocation: {target}\r\ncontent-length: 0\r\n\r\n".encode())
        await writer.drain()
        await reader.read()

    async with make_client(base_url=await listen(redirect)) as client:
        assert await client.send(question) is FaultCode.REQUEST_REFUSED
    assert n_elsewhere == 0


async def test_nothing_is_sent_to_another_host_even_by_one_who_follows_redirects() -> None:
    sent: list[str] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        sent.append(request.url.host)
        return httpx2.Response(307, headers={"location": "http://elsewhere.test/v1/x"})

    gate = Gate(
        httpx2.MockTransport(handler),
        budget=Budget(),
        pace=Pace(),
        price=None,
        timeout_s=5,
        only_host="endpoint.test",
    )
    async with httpx2.AsyncClient(transport=gate, follow_redirects=True) as http:
        with pytest.raises(Stopped) as caught:
            await http.post("http://endpoint.test/v1/x", content=b"pixels")
    assert isinstance(caught.value.reason, ConfigurationError)
    assert "'endpoint.test' only, got one to 'elsewhere.test'" in caught.value.reason.message
    assert sent == ["endpoint.test"]


# ---- too many -----------------------------------------------------------------------------------------------------


def busy(**headers: str) -> httpx2.Response:
    return httpx2.Response(429, headers={k.replace("_", "-"): v for k, v in headers.items()}, json={"error": {}})


async def test_a_wait_too_long_for_the_openai_client_is_still_waited_for(
    make_client: Make, scripted: Any, question: VlmRequest, good: str, skipping_clock: Any
) -> None:
    endpoint, start_s = scripted(busy(retry_after="900"), good), skipping_clock.now_s
    async with make_client(endpoint, max_retries=3, max_wait_s=1800) as client:
        assert not isinstance(await client.send(question), FaultCode)
    assert skipping_clock.now_s - start_s == 900
    assert len(endpoint.sent) == 2


async def test_a_wait_beyond_patience_defers(
    make_client: Make, scripted: Any, question: VlmRequest, skipping_clock: Any
) -> None:
    endpoint = scripted(busy(retry_after="900"))
    async with make_client(endpoint, max_retries=3, max_wait_s=600) as client:
        with pytest.raises(Deferred, match="900 s") as caught:
            await client.send(question)
        assert client.budget.committed_usd == 0
    assert (caught.value.retry_after_s, len(endpoint.sent)) == (900, 1)


async def test_refusals_without_end_defer_after_the_configured_wait(
    make_client: Make, scripted: Any, question: VlmRequest, skipping_clock: Any
) -> None:
    start_s = skipping_clock.now_s
    async with make_client(scripted(busy(retry_after_ms="50")), max_retries=0, max_wait_s=600) as client:
        with pytest.raises(Deferred):
            await client.send(question)
    assert 600 <= skipping_clock.now_s - start_s <= 700


async def test_a_short_wait_is_kept_for_everybody(
    make_client: Make, scripted: Any, question: VlmRequest, good: str
) -> None:
    endpoint, arrived_s = scripted(busy(retry_after="0.3"), good), []

    def handler(request: httpx2.Request) -> httpx2.Response:
        arrived_s.append(time.monotonic())
        return endpoint(request)

    async with make_client(handler, max_retries=1) as client:
        first = asyncio.create_task(client.send(question))
        await asyncio.sleep(0.1)
        await asyncio.gather(first, *(client.send(q) for q in numbered(2)))
    first_s, *others_s = arrived_s
    assert len(others_s) == 3
    assert min(others_s) - first_s >= 0.29


async def test_money_that_is_used_up_is_said_at_once_and_never_waited_for(
    make_client: Make, scripted: Any, question: VlmRequest
) -> None:
    body = {"error": {"message": "quota", "code": "insufficient_quota"}}
    endpoint, pace = scripted(httpx2.Response(429, headers={"retry-after": "1"}, json=body)), Pace()
    start_s = time.monotonic()
    async with make_client(endpoint, max_retries=5, pace=pace) as client:
        with pytest.raises(EndpointError, match="quota of this key is used up"):
            await client.send(question)
    assert time.monotonic() - start_s < 0.4
    assert (len(endpoint.sent), pace.waits_s, pace.gap_s) == (1, 0, 0)


def test_the_wait_is_read_in_every_form_that_servers_use() -> None:
    def told(**headers: str) -> float:
        return retry_after_s(httpx2.Headers({k.replace("_", "-"): v for k, v in headers.items()}))

    assert told(retry_after="12.5") == 12.5
    assert told(retry_after_ms="250", retry_after="12") == 0.25
    assert told(retry_after_ms="soon", retry_after="12") == 12
    assert 590 < told(retry_after=email.utils.formatdate(time.time() + 600, usegmt=True)) <= 600
    assert told(retry_after=email.utils.formatdate(time.time() - 600, usegmt=True)) == 0
    assert told(retry_after="-3") == 0


def test_a_wait_that_is_not_told_grows_with_the_present_gap_within_bounds() -> None:
    assert [retry_after_s(httpx2.Headers(), gap_s) for gap_s in (0, 1, 5, 1000)] == [1, 4, 20, 60]


@given(st.text(st.characters(codec="ascii", exclude_characters="\r\n\0"), max_size=40) | st.floats().map(str))
def test_any_header_gives_a_wait_that_can_be_waited(text: str) -> None:
    for name in ("retry-after", "retry-after-ms"):
        assert 0 <= retry_after_s(httpx2.Headers({name: text})) < float("inf")


def test_money_is_tokens_times_price() -> None:
    assert usd(Usage(1000, 100), PRICE) == pytest.approx(0.0014)
    assert usd(Usage(1000, 100), None) == 0
