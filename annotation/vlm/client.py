"""The one client for vision-language models: any OpenAI-compatible endpoint, or the embedded one in process.

The journal is asked first, then the budget, then the endpoint. Retries are the openai client's own; nothing is
stacked on top. What concerns the endpoint as a whole (down, wrong key, wrong model, come back later) is raised at
once; what concerns one request becomes a `FaultCode`.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import httpx2
import openai
from pydantic import BaseModel, SecretStr

from annotation.vlm.budget import Budget, Pace, most_usage, reserved
from annotation.vlm.embedded import create_app
from annotation.vlm.journal import Journal, Record, utc_now
from annotation.vlm.schema import AnswerFault, FaultCode, Usage, VlmRequest
from annotation.vlm.settings import VlmSettings
from data_contracts.errors import Deferred, EndpointError

T = TypeVar("T")

MAX_WAIT_S = 120.0
"""Above this `Retry-After` the openai client gives up at once; the work is then deferred."""

_MOST_FAULTS_IN_A_ROW = 10
_ASKED_ONCE_MORE = {FaultCode.INVALID_JSON, FaultCode.WRONG_SCHEMA, FaultCode.CUT_OFF, FaultCode.EMPTY_ANSWER}
_NO_KEY = "no-key-set"
_NO_ORGANISATION: Any = {"OpenAI-Organization": openai.omit, "OpenAI-Project": openai.omit}


@dataclass(frozen=True)
class VlmAnswer(Generic[T]):
    """What came of one question: a value or a fault, and what it took."""

    value: T | None
    fault: FaultCode | None
    record: Record | None
    """The last answer as it came; None when the endpoint never answered."""
    n_requests: int
    """Requests sent for it now: 0 when the journal knew all."""
    usage: Usage
    """Tokens billed for it now."""

    @property
    def from_journal(self) -> bool:
        """Whether nothing had to be sent."""
        return self.n_requests == 0


class VlmClient:
    """Asks questions within the budget, through the journal. Use as `async with`."""

    def __init__(
        self,
        settings: VlmSettings,
        api_key: SecretStr | None,
        journal: Journal,
        budget: Budget | None = None,
        *,
        pace: Pace | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """A client; budget and pace may be shared between clients, `transport` replaces the network (tests)."""
        self.settings = settings
        self.journal = journal
        self.budget = budget or Budget(settings)
        self._pace = pace or Pace(settings)
        self._breaker = _Breaker()
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._parameters = _parameters(settings)
        self._http = _http_client(settings, transport)
        self._openai = openai.AsyncOpenAI(
            # Explicit values, so that the openai package does not look for them in the environment.
            api_key=api_key.get_secret_value() if api_key else _NO_KEY,
            organization="",
            project="",
            webhook_secret="",
            default_headers=_NO_ORGANISATION,
            base_url="http://embedded/v1" if settings.is_embedded else settings.base_url,
            timeout=settings.timeout_s,
            max_retries=settings.max_retries,
            http_client=self._http,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._openai.close()

    async def ask(self, request: VlmRequest, parse: Callable[[str], T]) -> VlmAnswer[T]:
        """The parsed answer, asked for at most twice; a second answer is journalled beside the first.

        Raises `EndpointError`, `Deferred`, `BudgetReached` and `StorageError`; every other failure is a fault.
        """
        n_requests, usage = 0, Usage()
        for attempt in (0, 1):
            # A second question for an answer that was cut off needs more room.
            question = replace(request, max_output_tokens=request.max_output_tokens * (1 + attempt))
            key = question.sha256(self._parameters)
            record = self.journal.get(key)
            if record is None:
                n_requests += 1
                sent = await self._send(question, key)
                if isinstance(sent, FaultCode):
                    return VlmAnswer(None, sent, None, n_requests, usage)
                record, usage = sent, usage + sent.usage
            try:
                return VlmAnswer(parse(_usable_text(record)), None, record, n_requests, usage)
            except AnswerFault as fault:
                code = fault.code
            if code not in _ASKED_ONCE_MORE:
                break
        return VlmAnswer(None, code, record, n_requests, usage)

    async def model_names(self) -> list[str]:
        """Models the endpoint offers; raises `EndpointError`."""
        page = await self._guarded(self._openai.models.list())
        return [] if isinstance(page, FaultCode) else [model.id for model in page.data]

    async def _send(self, request: VlmRequest, key: str) -> Record | FaultCode:
        async with self._slots:
            most = most_usage(request, self.settings)
            async with reserved(self.budget, most) as billed:
                await self._pace.wait(most)
                completion = await self._guarded(self._complete(request))
                if isinstance(completion, FaultCode):
                    self._breaker.failed(completion, self.settings)
                    return completion
                record = _record(completion, key, request, self.settings)
                billed.append(record.usage)
        self._breaker.answered()
        self.journal.put(record)
        return record

    async def _complete(self, request: VlmRequest) -> _Completion:
        """The endpoint's answer; `ValueError` when a success status brings no completion."""
        # The raw response: the openai package would build its objects from any JSON without a look.
        response = await self._openai.chat.completions.with_raw_response.create(**self._arguments(request))
        return _Completion.model_validate_json(response.content)

    def _arguments(self, request: VlmRequest) -> dict[str, Any]:
        settings = self.settings
        optional = {"temperature": settings.temperature, "seed": settings.seed}
        return {
            "model": settings.model,
            "messages": [
                {"role": "system", "content": request.system},
                {"role": "user", "content": [_content(part) for part in request.parts]},
            ],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": request.schema_name, "strict": True, "schema": dict(request.schema)},
            },
            settings.output_limit_field: request.max_output_tokens,
            **{name: value for name, value in optional.items() if value is not None},
        }

    async def _guarded(self, call: Awaitable[T]) -> T | FaultCode:
        """The result of a call; faults of one request as codes, faults of the endpoint raised."""
        where, model = self.settings.base_url, self.settings.model
        try:
            return await call
        except openai.APITimeoutError:
            return FaultCode.TIMED_OUT
        except openai.APIConnectionError as error:
            raise _endpoint_error(where, "did not answer", "Start it, or correct base_url.") from error
        except openai.RateLimitError as error:
            raise _told_to_wait(where, error) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            remedy = "Put a valid key into the environment variable that api_key_env names."
            raise _endpoint_error(where, f"refused the key (HTTP {error.status_code})", remedy) from error
        except openai.NotFoundError as error:
            remedy = "Correct base_url (it usually ends in /v1) or the model name."
            raise _endpoint_error(where, f"does not know the model {model!r} (HTTP 404)", remedy) from error
        except openai.APIStatusError as error:
            return FaultCode.SERVER_ERROR if error.status_code >= 500 else FaultCode.REQUEST_REFUSED
        except (openai.APIError, ValueError):
            # A success status around something that is no completion: a proxy's page, a half-sent body.
            return FaultCode.SERVER_ERROR


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message = _Message()
    finish_reason: str | None = None


class _Tokens(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(BaseModel):
    """What is read of a chat completion; servers differ in all else."""

    id: str | None = None
    choices: list[_Choice]
    usage: _Tokens | None = None


class _Breaker:
    """Notices that the endpoint fails every request, whatever the image."""

    def __init__(self) -> None:
        self._n_in_a_row = 0
        self._lock = threading.Lock()

    def answered(self) -> None:
        with self._lock:
            self._n_in_a_row = 0

    def failed(self, code: FaultCode, settings: VlmSettings) -> None:
        with self._lock:
            self._n_in_a_row += 1
            n_in_a_row = self._n_in_a_row
        if n_in_a_row >= _MOST_FAULTS_IN_A_ROW:
            remedy = "Try one request by hand with the same base_url and model, then give the same command again."
            raise _endpoint_error(settings.base_url, f"failed {n_in_a_row} requests in a row, last: {code}", remedy)


def _parameters(settings: VlmSettings) -> Mapping[str, Any]:
    """What decides an answer besides the question: the model and how it samples."""
    return {"model": settings.model, "temperature": settings.temperature, "seed": settings.seed}


def _http_client(settings: VlmSettings, transport: httpx2.AsyncBaseTransport | None) -> httpx2.AsyncClient | None:
    if transport is None and settings.is_embedded:
        transport = httpx2.ASGITransport(create_app())
    return None if transport is None else httpx2.AsyncClient(transport=transport, timeout=settings.timeout_s)


def _content(part: str | bytes) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    mime = "image/png" if part.startswith(b"\x89PNG") else "image/jpeg"
    return {"type": "image_url", "image_url": {"url": f"data:{mime};base64,{base64.b64encode(part).decode()}"}}


def _record(completion: _Completion, key: str, request: VlmRequest, settings: VlmSettings) -> Record:
    choice = completion.choices[0] if completion.choices else _Choice()
    return Record(
        key=key,
        prompt_sha256=request.prompt_sha256,
        model=settings.model,
        text=choice.message.content,
        refusal=choice.message.refusal,
        finish_reason=choice.finish_reason,
        request_id=completion.id,
        input_tokens=completion.usage.prompt_tokens if completion.usage else 0,
        output_tokens=completion.usage.completion_tokens if completion.usage else 0,
        created_at=utc_now(),
    )


def _usable_text(record: Record) -> str:
    """The raw text of an answer that is whole; raises `AnswerFault` otherwise."""
    if record.refusal or record.finish_reason == "content_filter":
        raise AnswerFault(FaultCode.REFUSED)
    if record.finish_reason == "length":
        raise AnswerFault(FaultCode.CUT_OFF)
    if not record.text:
        raise AnswerFault(FaultCode.EMPTY_ANSWER)
    return record.text


def _endpoint_error(where: str, what: str, remedy: str) -> EndpointError:
    return EndpointError(f"The vision-language endpoint {where!r} {what}; every answer so far is kept.", remedy=remedy)


def _told_to_wait(where: str, error: openai.RateLimitError) -> Deferred | EndpointError:
    if error.code == "insufficient_quota":
        return _endpoint_error(where, "says that the quota of this key is used up", "Raise the quota, then go on.")
    wait_s = _retry_after_s(error.response.headers.get("retry-after"))
    return Deferred(
        f"The vision-language endpoint {where!r} asks to come back in {wait_s:.0f} s; every answer so far is kept.",
        retry_after_s=wait_s,
        remedy="Give the same command again then, or lower concurrency and requests_per_minute.",
    )


def _retry_after_s(header: str | None) -> float:
    """Seconds that a `Retry-After` header asks for, in either of its forms; a minute when it says nothing usable."""
    try:
        return max(0.0, float(header or 60.0))
    except ValueError:
        date = email.utils.parsedate_tz(header or "")
        return 60.0 if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
