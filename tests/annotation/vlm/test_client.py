from __future__ import annotations

import asyncio
import base64
import json
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from annotation.vlm.budget import Budget
from annotation.vlm.client import VlmClient, first_token, usable_text
from annotation.vlm.journal import Journal
from annotation.vlm.prices import Price
from annotation.vlm.questions import Question
from annotation.vlm.schema import FaultCode, VlmRequest, parse_judgements, verdict_of_yes_no
from annotation.vlm.settings import VlmSettings
from data_contracts.concepts import Concept
from data_contracts.errors import EndpointError, StorageError

Make = Callable[..., VlmClient]


def parse(text: str) -> dict[str, Any]:
    return dict(parse_judgements(text, [Question(i, (Concept(i, i),)) for i in ("a", "b")]))


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
    assert not {"temperature", "logprobs", "top_logprobs"} & set(body)
    assert endpoint.sent[0].headers["content-type"] == "application/json"
    assert not any(name.startswith("openai-org") for name in endpoint.sent[0].headers)


async def test_an_older_server_is_told_the_limit_by_its_own_name(
    make_client: Make, scripted: Any, question: VlmRequest, good: str
) -> None:
    endpoint = scripted(good)
    async with make_client(endpoint, output_limit_field="max_tokens") as client:
        await client.ask(question, parse)
    assert (endpoint.bodies[0]["max_tokens"], "max_completion_tokens" in endpoint.bodies[0]) == (200, False)


async def test_images_are_declared_as_what_they_are(make_client: Make, scripted: Any, good: str) -> None:
    endpoint = scripted(good)
    async with make_client(endpoint) as client:
        await client.send(VlmRequest("s", (b"\x89PNG x", b"\xff\xd8\xff x"), "n", {}, 50))
    urls = [part["image_url"]["url"].partition(";")[0] for part in endpoint.bodies[0]["messages"][1]["content"]]
    assert urls == ["data:image/png", "data:image/jpeg"]


async def test_samples_differ_in_their_seed_and_are_kept_apart(make_client: Make, scripted: Any, good: str) -> None:
    endpoint = scripted(good)
    samples = [VlmRequest("s", ("t",), "n", {}, 50, sample=k) for k in range(3)]
    async with make_client(endpoint, seed=7, temperature=0.7) as client:
        for sample in [*samples, samples[1]]:
            await client.ask(sample, json.loads)
    assert [body["seed"] for body in endpoint.bodies] == [7, 8, 9]


async def test_one_word_is_asked_for_with_log_probabilities_and_they_are_read(
    make_client: Make, scripted: Any, answer: Any
) -> None:
    first = {"token": "Yes", "logprob": -0.1, "top_logprobs": [{"token": "Yes", "logprob": -0.1, "bytes": [89]}]}
    first["top_logprobs"].append({"token": " no", "logprob": -2.4})
    endpoint = scripted(answer("Yes", logprobs={"content": [first, {"token": ".", "logprob": 0, "top_logprobs": []}]}))
    async with make_client(endpoint) as client:
        record = await client.send(VlmRequest("s", ("t",), "n", None, 16, top_logprobs=5))
    body = endpoint.bodies[0]
    assert (body["logprobs"], body["top_logprobs"], "response_format" in body) == (True, 5, False)
    assert not isinstance(record, FaultCode)
    assert record.top_logprobs == (("Yes", -0.1), (" no", -2.4))
    assert verdict_of_yes_no(record.top_logprobs).probability == pytest.approx(0.909, abs=0.001)


@pytest.mark.parametrize(
    "odd",
    [
        None,
        {},
        {"content": None},
        {"content": []},
        {"content": [{}]},
        {"content": [{"top_logprobs": [{"token": "x"}]}]},
    ],
)
def test_log_probabilities_that_cannot_be_read_are_none(odd: object) -> None:
    assert first_token(odd) == ()


async def test_a_word_that_is_cut_off_is_still_usable_with_its_log_probabilities(
    make_client: Make, scripted: Any, answer: Any
) -> None:
    first = {"token": "No", "top_logprobs": [{"token": "No", "logprob": -0.1}]}
    endpoint = scripted(answer("No, since", finish_reason="length", logprobs={"content": [first]}))
    async with make_client(endpoint) as client:
        record = await client.send(VlmRequest("s", ("t",), "n", None, 16, top_logprobs=5))
    assert not isinstance(record, FaultCode)
    assert usable_text(record) == "No, since"


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
    async with make_client(scripted(httpx2.Response(400, json={"error": {}})), concurrency=5) as client:
        for _ in range(9):
            assert (await client.ask(question, parse)).fault is FaultCode.REQUEST_REFUSED
        with pytest.raises(EndpointError, match="10 requests in a row"):
            await client.ask(question, parse)


async def test_one_good_answer_between_faults_lets_the_run_go_on(
    make_client: Make, scripted: Any, question: VlmRequest, good: str
) -> None:
    bad = httpx2.Response(400, json={"error": {}})
    async with make_client(scripted(*[bad] * 9, good, bad), concurrency=5) as client:
        for _ in range(19):
            await client.send(question)
        with pytest.raises(EndpointError):
            await client.send(question)


async def test_as_many_faults_as_may_be_in_flight_twice_are_no_proof_yet(
    make_client: Make, scripted: Any, question: VlmRequest
) -> None:
    async with make_client(scripted(httpx2.Response(400, json={"error": {}})), concurrency=10) as client:
        for _ in range(19):
            await client.send(question)
        with pytest.raises(EndpointError, match="20 requests in a row, last: request_refused"):
            await client.send(question)


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


async def test_an_endpoint_that_is_down_stops_with_a_remedy(make_client: Make, question: VlmRequest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with make_client(base_url=f"http://127.0.0.1:{port}/v1") as client:
        with pytest.raises(EndpointError, match=r"did not answer.*Start it"):
            await client.ask(question, parse)
        assert client.budget.spent.n_requests == 0


@pytest.mark.parametrize(
    "begun", [b"", b"HTTP/1.1 200 OK\r\ncont", b'HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n{"id": "x", "choi']
)
async def test_a_connection_that_breaks_is_a_fault_of_its_request(
    make_client: Make, listen: Any, question: VlmRequest, begun: bytes
) -> None:
    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(begun)
        await writer.drain()
        # Zero seconds of lingering: the other side gets a reset.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    async with make_client(base_url=await listen(break_off)) as client:
        assert await client.send(question) is FaultCode.CONNECTION_LOST


async def test_a_timeout_is_a_fault_of_its_request(make_client: Make, scripted: Any, question: VlmRequest) -> None:
    async with make_client(scripted(httpx2.ReadTimeout("slow"))) as client:
        assert (await client.ask(question, parse)).fault is FaultCode.TIMED_OUT


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


async def test_a_full_disk_is_noticed_before_anything_is_sent(
    make_client: Make, scripted: Any, question: VlmRequest, good: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("annotation.vlm.journal.shutil.disk_usage", lambda _path: usage)
    endpoint = scripted(good)
    async with make_client(endpoint) as client:
        with pytest.raises(StorageError, match="64 MB of free space"):
            await client.send(question)
    assert endpoint.sent == []


async def test_the_price_of_an_answer_is_kept_with_it(
    make_client: Make, scripted: Any, question: VlmRequest, good: str
) -> None:
    budget = Budget()
    async with make_client(scripted(good), budget=budget, price=Price(1e-6, 4e-6, "test")) as client:
        record = await client.send(question, ["c" * 64])
    assert not isinstance(record, FaultCode)
    assert (record.cost_usd, record.cells) == (pytest.approx(180e-6), ("c" * 64,))
    assert record.cost_usd == pytest.approx(budget.spent.usd)
    async with make_client(scripted(good)) as client:
        unpriced = await client.send(question)
    assert not isinstance(unpriced, FaultCode)
    assert unpriced.cost_usd is None


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
    endpoint = scripted(httpx2.Response(500, headers={"retry-after-ms": "1"}, json={"error": {"message": key}}), good)
    async with make_client(endpoint, max_retries=1) as client:
        answer = await client.ask(question, parse)
        assert key not in repr(client) + repr(vars(client)) + repr(client.settings) + repr(answer)
    assert endpoint.sent[0].headers["authorization"] == f"Bearer {key}"
    assert key.encode() not in endpoint.sent[0].content
    assert "HTTP" in caplog.text
    assert key not in caplog.text
    segments = list((tmp_path / "journal").glob("*"))
    assert segments
    for segment in segments:
        assert key.encode() not in segment.read_bytes()


async def test_no_image_is_in_any_log(
    make_client: Make,
    scripted: Any,
    answer: Any,
    good: str,
    listen: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    pixels = b"\xff\xd8\xff" + bytes(range(256)) * 4
    request = VlmRequest("s", ("t", pixels), "n", {}, 50)
    body = json.dumps(answer(good)).encode()

    async def real(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}}}")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()

    async with make_client(base_url=await listen(real), timeout_s=5) as client:
        assert not isinstance(await client.send(request), FaultCode)
    broken = httpx2.Response(400, json={"error": {"message": "no"}})
    async with make_client(scripted(broken)) as client:
        await client.send(request)
    assert "httpx2" in caplog.text
    encoded = base64.b64encode(pixels).decode()
    for part in (encoded[40:80], encoded[-80:-40], repr(pixels[10:20])[2:-1]):
        assert part not in caplog.text
        for segment in (tmp_path / "journal").glob("*"):
            assert part not in segment.read_text()


async def test_the_environment_is_not_consulted(
    make_client: Make, scripted: Any, question: VlmRequest, good: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "WEBHOOK_SECRET"):
        monkeypatch.setenv(f"OPENAI_{name}", "from-environment")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere.test")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "x-more: from-environment")
    endpoint = scripted(good)
    async with make_client(endpoint) as client:
        await client.ask(question, parse)
        assert "from-environment" not in repr(vars(client.raw))
    assert endpoint.sent[0].url.host == "endpoint.test"
    assert "from-environment" not in str(endpoint.sent[0].headers.raw)


async def test_proxies_of_the_environment_are_not_used_unasked(
    make_client: Make, listen: Any, question: VlmRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_arrived = 0

    async def proxy(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal n_arrived
        n_arrived += 1

    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, (await listen(proxy)).removesuffix("/v1"))
    async with make_client(base_url="http://endpoint.invalid/v1") as client:
        with pytest.raises(EndpointError):
            await client.send(question)
    assert n_arrived == 0


async def test_without_a_key_a_placeholder_is_sent_that_is_none(
    scripted: Any, question: VlmRequest, good: str, tmp_path: Path
) -> None:
    endpoint = scripted(good)
    settings = VlmSettings(base_url="http://endpoint.test/v1", model="m", azure_api_version="2024-10-21")
    with Journal(tmp_path) as journal:
        async with VlmClient(settings, None, journal, transport=httpx2.MockTransport(endpoint)) as client:
            await client.send(question)
    assert endpoint.sent[0].headers["authorization"] == "Bearer no-key-set"
    assert "api-key" not in endpoint.sent[0].headers


async def test_an_azure_deployment_gets_its_own_header_and_query(
    make_client: Make, scripted: Any, question: VlmRequest, good: str, key: str
) -> None:
    endpoint, base_url = scripted(good), "https://me.openai.azure.com/openai/deployments/vision"
    async with make_client(endpoint, base_url=base_url, azure_api_version="2024-10-21") as client:
        await client.send(question)
    sent = endpoint.sent[0]
    assert str(sent.url) == f"{base_url}/chat/completions?api-version=2024-10-21"
    assert sent.headers["api-key"] == key


async def test_models_are_listed_and_faults_raised(make_client: Make, scripted: Any) -> None:
    listing = {"object": "list", "data": [{"id": "llava", "object": "model", "created": 0, "owned_by": "x"}]}
    async with make_client(scripted(listing)) as client:
        assert await client.model_names() == ["llava"]
    async with make_client(scripted(httpx2.Response(401, json={}))) as client:
        with pytest.raises(EndpointError):
            await client.model_names()


@pytest.mark.parametrize(
    "response",
    [
        httpx2.Response(404, json={}),
        httpx2.Response(405, json={}),
        httpx2.Response(429, json={}),
        httpx2.Response(500, json={}),
        httpx2.Response(200, text="<html>a proxy's page</html>", headers={"content-type": "text/html"}),
        httpx2.Response(200, json=[]),
        httpx2.Response(200, json={"data": "many"}),
        httpx2.Response(200, json={"models": []}),
    ],
)
async def test_an_endpoint_without_a_readable_list_of_models_does_not_tell(
    make_client: Make, scripted: Any, response: httpx2.Response
) -> None:
    async with make_client(scripted(response)) as client:
        assert await client.model_names() is None
