from __future__ import annotations

import asyncio
import email.utils
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from annotation.vlm.client import VlmClient
from annotation.vlm.journal import Journal
from annotation.vlm.schema import FaultCode, VlmRequest, parse_judgements
from annotation.vlm.settings import VlmSettings
from data_contracts.errors import BudgetReached, Deferred, EndpointError, ExitCode

Make = Callable[..., VlmClient]


def parse(text: str) -> dict[str, Any]:
    return dict(parse_judgements(text, ["a", "b"]))


async def test_an_answer_is_parsed_counted_and_kept(
    make_client: Make, scripted: Any, question: VlmRequest, good: str
) -> None:
    endpoint = scripted(good)
    async with make_client(endpoint) as client:
        answer = await client.ask(question, parse)
        assert answer.value is not None
        assert (answer.fault, answer.n_requests, answer.usage.input_tokens) == (None, 1, 100)
        again = await client.ask(question, parse)
    assert again.from_journal
    assert again.value == answer.value
    assert len(endpoint.sent) == 1


async def test_the_request_speaks_the_protocol(
    make_client: Make, scripted: Any, question: VlmRequest, good: str
) -> None:
    endpoint = scripted(good)
    async with make_client(endpoint, seed=3, temperature=None) as client:
        await client.ask(question, parse)
    body = endpoint.bodies[0]
    assert body["response_format"]["json_schema"]["strict"] is True
    assert body["messages"][1]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert body["max_completion_tokens"] == 200
    assert body["seed"] == 3
    assert "temperature" not in body
    assert not any(name.startswith("openai-org") for name in endpoint.sent[0].headers)


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ("no json at all", FaultCode.INVALID_JSON),
        ('{"something": "else"}', FaultCode.WRONG_SCHEMA),
        ({"content": "", "finish_reason": "stop"}, FaultCode.EMPTY_ANSWER),
        ({"content": '{"a": {"st', "finish_reason": "length"}, FaultCode.CUT_OFF),
    ],
)
async def test_an_unusable_answer_is_asked_once_more(
    make_client: Make, scripted: Any, answer: Any, question: VlmRequest, good: str, first: Any, code: FaultCode
) -> None:
    bad = answer(**first) if isinstance(first, dict) else first
    async with make_client(scripted(bad, good)) as client:
        healed = await client.ask(question, parse)
    assert (healed.fault, healed.n_requests, healed.usage.output_tokens) == (None, 2, 40)

    endpoint = scripted(bad)
    async with make_client(endpoint, model="another") as client:
        failed = await client.ask(question, parse)
        assert (failed.value, failed.fault, failed.n_requests) == (None, code, 2)
        resumed = await client.ask(question, parse)
    assert (resumed.fault, resumed.n_requests) == (code, 0)
    assert len(endpoint.sent) == 2


async def test_a_cut_off_answer_gets_more_room(
    make_client: Make, scripted: Any, answer: Any, question: VlmRequest
) -> None:
    endpoint = scripted(answer('{"a"', finish_reason="length"))
    async with make_client(endpoint) as client:
        await client.ask(question, parse)
    assert [body["max_completion_tokens"] for body in endpoint.bodies] == [200, 400]


@pytest.mark.parametrize("changes", [{"refusal": "I cannot help."}, {"finish_reason": "content_filter"}])
async def test_a_refusal_is_final_for_its_image(
    make_client: Make, scripted: Any, answer: Any, question: VlmRequest, changes: dict[str, str]
) -> None:
    endpoint = scripted(answer(None, **changes))
    async with make_client(endpoint) as client:
        refused = await client.ask(question, parse)
    assert (refused.fault, len(endpoint.sent)) == (FaultCode.REFUSED, 1)


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, FaultCode.REQUEST_REFUSED), (422, FaultCode.REQUEST_REFUSED), (503, FaultCode.SERVER_ERROR)],
)
async def test_faults_of_one_request_do_not_stop_the_run(
    make_client: Make, scripted: Any, question: VlmRequest, status: int, code: FaultCode
) -> None:
    async with make_client(scripted(httpx2.Response(status, json={"error": {"message": "no"}}))) as client:
        assert (await client.ask(question, parse)).fault is code


@pytest.mark.parametrize("body", [b"<html>a proxy's page</html>", b"", b"[]", b'{"choices": []}', b'{"id": "x"}'])
async def test_a_success_that_is_no_completion_is_a_fault(
    make_client: Make, scripted: Any, question: VlmRequest, body: bytes
) -> None:
    response = httpx2.Response(200, content=body, headers={"content-type": "application/json"})
    async with make_client(scripted(response)) as client:
        assert (await client.ask(question, parse)).fault in {FaultCode.SERVER_ERROR, FaultCode.EMPTY_ANSWER}


async def test_faults_without_end_stop_the_run(make_client: Make, scripted: Any, question: VlmRequest) -> None:
    async with make_client(scripted(httpx2.Response(400, json={"error": {}}))) as client:
        for _ in range(9):
            assert (await client.ask(question, parse)).fault is FaultCode.REQUEST_REFUSED
        with pytest.raises(EndpointError, match="10 requests in a row"):
            await client.ask(question, parse)


@pytest.mark.parametrize(
    ("status", "message"), [(401, "refused the key"), (403, "refused the key"), (404, "does not know the model 'm'")]
)
async def test_wrong_key_and_wrong_model_stop_at_once(
    make_client: Make, scripted: Any, question: VlmRequest, key: str, status: int, message: str
) -> None:
    endpoint = scripted(httpx2.Response(status, json={"error": {"message": f"bad {key}"}}))
    async with make_client(endpoint, max_retries=3) as client:
        with pytest.raises(EndpointError, match=message) as caught:
            await client.ask(question, parse)
    assert len(endpoint.sent) == 1
    assert caught.value.remedy
    assert key not in str(caught.value)


async def test_an_endpoint_that_is_down_stops_with_a_remedy(tmp_path: Path, question: VlmRequest) -> None:
    # A real socket: the discard port of this machine, where nothing listens.
    settings = VlmSettings(base_url="http://127.0.0.1:9/v1", model="m", max_retries=0)
    async with VlmClient(settings, None, Journal(tmp_path)) as client:
        with pytest.raises(EndpointError, match="did not answer"):
            await client.ask(question, parse)


async def test_a_timeout_is_a_fault_of_its_request(make_client: Make, scripted: Any, question: VlmRequest) -> None:
    async with make_client(scripted(httpx2.ReadTimeout("slow"))) as client:
        assert (await client.ask(question, parse)).fault is FaultCode.TIMED_OUT


async def test_a_long_retry_after_defers(make_client: Make, scripted: Any, question: VlmRequest) -> None:
    endpoint = scripted(httpx2.Response(429, headers={"retry-after": "900"}, json={"error": {"message": "slow"}}))
    async with make_client(endpoint, max_retries=3) as client:
        with pytest.raises(Deferred, match="900 s") as caught:
            await client.ask(question, parse)
    assert caught.value.retry_after_s == 900
    assert caught.value.exit_code == ExitCode.RESUMABLE
    assert len(endpoint.sent) == 1


async def test_retry_after_may_be_a_date(make_client: Make, scripted: Any, question: VlmRequest) -> None:
    date = email.utils.formatdate(time.time() + 600, usegmt=True)
    async with make_client(scripted(httpx2.Response(429, headers={"retry-after": date}, json={}))) as client:
        with pytest.raises(Deferred) as caught:
            await client.ask(question, parse)
    assert 590 < caught.value.retry_after_s <= 600


async def test_a_short_retry_after_is_waited_for(
    make_client: Make, scripted: Any, question: VlmRequest, good: str
) -> None:
    endpoint = scripted(httpx2.Response(429, headers={"retry-after": "0.2"}, json={}), good)
    start_s = time.monotonic()
    async with make_client(endpoint, max_retries=1) as client:
        answer = await client.ask(question, parse)
    assert answer.fault is None
    assert time.monotonic() - start_s >= 0.2


async def test_an_empty_purse_is_no_deferral(make_client: Make, scripted: Any, question: VlmRequest) -> None:
    body = {"error": {"message": "quota", "code": "insufficient_quota"}}
    async with make_client(scripted(httpx2.Response(429, json=body))) as client:
        with pytest.raises(EndpointError, match="quota"):
            await client.ask(question, parse)


async def test_never_more_in_flight_than_configured(make_client: Make, answer: Any, good: str) -> None:
    in_flight, most = 0, 0

    async def handler(_: httpx2.Request) -> httpx2.Response:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0.005)
        in_flight -= 1
        return httpx2.Response(200, json=answer(good))

    async with make_client(handler, concurrency=3) as client:
        questions = [VlmRequest("s", (str(i),), "n", {}, 50) for i in range(12)]
        await asyncio.gather(*(client.ask(q, parse) for q in questions))
    assert most == 3


async def test_the_cap_holds_and_the_next_command_goes_on(
    make_client: Make, scripted: Any, good: str, tmp_path: Path
) -> None:
    endpoint = scripted(good)
    questions = [VlmRequest("s", (str(i),), "n", {}, 50) for i in range(5)]

    async def run(journal: Journal) -> int:
        async with make_client(endpoint, journal, max_requests=2) as client:
            answers = await asyncio.gather(*(client.ask(q, parse) for q in questions), return_exceptions=True)
        return sum(isinstance(a, BudgetReached) for a in answers)

    stopped = []
    for _ in range(3):
        with Journal(tmp_path / "capped") as journal:
            stopped.append(await run(journal))
    assert stopped == [3, 1, 0]
    assert len(endpoint.sent) == 5


async def test_the_key_is_in_the_header_and_nowhere_else(
    make_client: Make,
    scripted: Any,
    question: VlmRequest,
    good: str,
    key: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    endpoint = scripted(httpx2.Response(500, json={"error": {"message": f"oops {key}"}}), good)
    async with make_client(endpoint, max_retries=1) as client:
        answer = await client.ask(question, parse)
        assert key not in repr(client) + repr(vars(client)) + repr(client.settings) + repr(answer)
    assert endpoint.sent[0].headers["authorization"] == f"Bearer {key}"
    assert key.encode() not in endpoint.sent[0].content
    assert key not in caplog.text
    for segment in (tmp_path / "journal").glob("*"):
        assert key.encode() not in segment.read_bytes()


async def test_the_environment_is_not_consulted(
    make_client: Make, scripted: Any, question: VlmRequest, good: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-environment")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-from-environment")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere.test")
    endpoint = scripted(good)
    async with make_client(endpoint) as client:
        await client.ask(question, parse)
    assert endpoint.sent[0].url.host == "endpoint.test"
    assert "from-environment" not in str(endpoint.sent[0].headers.raw)


async def test_models_are_listed_and_faults_raised(make_client: Make, scripted: Any) -> None:
    listing = {"object": "list", "data": [{"id": "llava", "object": "model", "created": 0, "owned_by": "x"}]}
    async with make_client(scripted(listing)) as client:
        assert await client.model_names() == ["llava"]
    async with make_client(scripted(httpx2.Response(401, json={}))) as client:
        with pytest.raises(EndpointError):
            await client.model_names()
