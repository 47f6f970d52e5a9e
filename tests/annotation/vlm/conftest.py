"""A scripted endpoint behind the real client, real sockets that misbehave, and a clock that is turned by hand."""

from __future__ import annotations

import asyncio
import heapq
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr

from annotation.vlm.client import VlmClient
from annotation.vlm.journal import Journal
from annotation.vlm.questions import Question
from annotation.vlm.schema import VlmRequest, judgement_schema
from annotation.vlm.settings import VlmSettings
from data_contracts.concepts import Concept

Handler = Callable[[httpx2.Request], Any]
Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
KEY = "sk-very-secret-4711"


def completion(content: str | None, **changes: Any) -> dict[str, Any]:
    """A chat completion as OpenAI sends it."""
    message = {"role": "assistant", "content": content, "refusal": changes.pop("refusal", None)}
    choice = {
        "index": 0,
        "finish_reason": changes.pop("finish_reason", "stop"),
        "message": message,
        "logprobs": changes.pop("logprobs", None),
    }
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    } | changes


class Scripted:
    """An endpoint that answers with the given responses in turn, the last one for ever, and keeps what it was sent."""

    def __init__(self, *responses: httpx2.Response | dict[str, Any] | str | Exception) -> None:
        self.responses = list(responses)
        self.sent: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.sent.append(request)
        response = self.responses[min(len(self.sent), len(self.responses)) - 1]
        if isinstance(response, Exception):
            raise response
        if isinstance(response, str):
            response = completion(response)
        if isinstance(response, dict):
            return httpx2.Response(200, json=response)
        # A response object can be read once only; hand out copies.
        return httpx2.Response(response.status_code, headers=response.headers, content=response.content)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.content) for request in self.sent]


class Clock:
    """Time for a pace that passes only when everybody sleeps, so that hours take no time."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._sleeping: list[tuple[float, int, asyncio.Event]] = []
        self._n_slept = 0

    def monotonic(self) -> float:
        return self.now_s

    async def skip(self, seconds: float) -> None:
        """Sleep of one who is alone: the time is over at once."""
        self.now_s += seconds

    async def sleep(self, seconds: float) -> None:
        """Sleep beside others, woken in the order of time by `run`."""
        woken = asyncio.Event()
        self._n_slept += 1
        heapq.heappush(self._sleeping, (self.now_s + seconds, self._n_slept, woken))
        await woken.wait()

    async def run(self, *work: Awaitable[Any]) -> list[Any]:
        """What came of all of them, errors included, once time has gone on as far as they need."""
        everything = asyncio.gather(*work, return_exceptions=True)
        for _ in range(5000):
            for _ in range(20):
                await asyncio.sleep(0)
            if everything.done():
                return await everything
            if self._sleeping:
                self.now_s, _, woken = heapq.heappop(self._sleeping)
                woken.set()
        everything.cancel()
        raise AssertionError(f"expected an end, and {len(self._sleeping)} still sleep")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all paces, for several that sleep beside each other."""
    turned = Clock()
    monkeypatch.setattr("annotation.vlm.pace.time", turned)
    monkeypatch.setattr("annotation.vlm.pace.asyncio", SimpleNamespace(sleep=turned.sleep))
    return turned


@pytest.fixture
def skipping_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all paces, for one request after the other."""
    turned = Clock()
    monkeypatch.setattr("annotation.vlm.pace.time", turned)
    monkeypatch.setattr("annotation.vlm.pace.asyncio", SimpleNamespace(sleep=turned.skip))
    return turned


@pytest.fixture
def make_client(tmp_path: Path) -> Iterator[Callable[..., VlmClient]]:
    """A client of a scripted endpoint or, without one, of `base_url`; other keyword arguments are settings."""
    journals: list[Journal] = []

    def make(handler: Handler | None = None, journal: Journal | None = None, **changes: Any) -> VlmClient:
        shared = {name: changes.pop(name) for name in ("budget", "pace", "price") if name in changes}
        settings = VlmSettings(**({"base_url": "http://endpoint.test/v1", "model": "m", "max_retries": 0} | changes))
        if journal is None:
            journals.append(Journal(tmp_path / "journal"))
        transport = None if handler is None else httpx2.MockTransport(handler)
        return VlmClient(settings, SecretStr(KEY), journal or journals[-1], transport=transport, **shared)

    yield make
    for opened in journals:
        opened.close()


@pytest.fixture
async def listen() -> AsyncIterator[Callable[[Connected], Awaitable[str]]]:
    """Real sockets of this machine that do whatever they are told with every connection; gives their addresses."""
    servers: list[asyncio.Server] = []
    connections: set[asyncio.Task[None]] = set()

    async def start(connected: Connected) -> str:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connections.add(task)
            try:
                await connected(reader, writer)
            except (OSError, asyncio.CancelledError):
                pass
            finally:
                writer.close()

        servers.append(await asyncio.start_server(handle, "127.0.0.1", 0))
        return f"http://127.0.0.1:{servers[-1].sockets[0].getsockname()[1]}/v1"

    yield start
    for task in connections:
        task.cancel()
    await asyncio.gather(*connections, return_exceptions=True)
    for server in servers:
        server.close()
        await server.wait_closed()


@pytest.fixture
def scripted() -> type[Scripted]:
    return Scripted


@pytest.fixture
def answer() -> Callable[..., dict[str, Any]]:
    return completion


@pytest.fixture
def key() -> str:
    return KEY


@pytest.fixture
def questions() -> tuple[Question, ...]:
    """Two single concepts."""
    return tuple(Question(i, (Concept(i, f"concept {i}"),)) for i in ("a", "b"))


@pytest.fixture
def question(questions: tuple[Question, ...]) -> VlmRequest:
    """A small request about two concepts."""
    return VlmRequest("system", ("text", b"\x89PNG image"), "judgements", judgement_schema(questions), 200)


@pytest.fixture
def good() -> str:
    """A valid answer to `question`."""
    verdict = {"state": "present", "probability": 0.9, "evidence": "seen"}
    return json.dumps({"a": verdict, "b": verdict | {"state": "absent", "probability": 0.1}})
