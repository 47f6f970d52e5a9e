"""A scripted endpoint behind the real client, and simple drawn images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr

from annotation.vlm.budget import Budget
from annotation.vlm.client import VlmClient
from annotation.vlm.journal import Journal
from annotation.vlm.schema import VlmRequest, judgement_schema
from annotation.vlm.settings import VlmSettings

Handler = Callable[[httpx2.Request], httpx2.Response]
KEY = "sk-very-secret-4711"


def completion(content: str | None, **changes: Any) -> dict[str, Any]:
    """A chat completion as OpenAI sends it."""
    message = {"role": "assistant", "content": content, "refusal": changes.pop("refusal", None)}
    choice = {"index": 0, "finish_reason": changes.pop("finish_reason", "stop"), "message": message, "logprobs": None}
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


@pytest.fixture
def make_client(tmp_path: Path) -> Callable[..., VlmClient]:
    """A client of a scripted endpoint; keyword arguments are settings."""

    def make(
        handler: Handler, journal: Journal | None = None, budget: Budget | None = None, **changes: Any
    ) -> VlmClient:
        settings = VlmSettings(**({"base_url": "http://endpoint.test/v1", "model": "m", "max_retries": 0} | changes))
        return VlmClient(
            settings,
            SecretStr(KEY),
            journal or Journal(tmp_path / "journal"),
            budget,
            transport=httpx2.MockTransport(handler),
        )

    return make


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
def question() -> VlmRequest:
    """A small question about two concepts."""
    return VlmRequest("system", ("text", b"\x89PNG image"), "judgements", judgement_schema(["a", "b"]), 200)


@pytest.fixture
def good() -> str:
    """A valid answer to `question`."""
    verdict = {"state": "present", "probability": 0.9, "evidence": "seen"}
    return json.dumps({"a": verdict, "b": verdict | {"state": "absent", "probability": 0.1}})
