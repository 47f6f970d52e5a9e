"""The one client for vision-language models: any OpenAI-compatible endpoint, or a model in this process.

Retries are the openai client's own; nothing is stacked on top. Caps, rates and limits hold for every single attempt
(`annotation.vlm.gate`). What concerns the endpoint as a whole (down, wrong key, wrong model, come back later) is
raised; what concerns one request becomes a `FaultCode`. Every answer is journalled before anybody sees it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import httpx2
import openai
from pydantic import BaseModel, SecretStr

from annotation.vlm.budget import Budget
from annotation.vlm.estimate import most_usage
from annotation.vlm.gate import ATTEMPT, SECONDS, Attempt, Gate, Stopped, counted_usage, usd
from annotation.vlm.journal import Journal, Record, utc_now
from annotation.vlm.pace import Pace
from annotation.vlm.prices import Price
from annotation.vlm.schema import AnswerFault, FaultCode, Usage, VlmRequest
from annotation.vlm.settings import VlmSettings
from annotation.vlm.transports import transport_for
from data_contracts.errors import EndpointError, MedMicnError

T = TypeVar("T")

_MOST_FAULTS_IN_A_ROW = 10
_ASKED_ONCE_MORE = {FaultCode.INVALID_JSON, FaultCode.WRONG_SCHEMA, FaultCode.CUT_OFF, FaultCode.EMPTY_ANSWER}
_IN_PROCESS_TIMEOUT_S = 86_400.0
_OUT_OF_MEMORY = 507
_MOST_PAUSE_OF_OPENAI_S = 10.0
"""The openai client rests up to eight seconds before it repeats a request."""
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
    """Asks questions within the budget, and journals every answer. Use as `async with`."""

    def __init__(
        self,
        settings: VlmSettings,
        api_key: SecretStr | None,
        journal: Journal,
        *,
        budget: Budget | None = None,
        pace: Pace | None = None,
        price: Price | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """A client; budget and pace may be shared between clients, `transport` replaces the usual one."""
        self.settings = settings
        self.journal = journal
        self.price = price
        self.image_tokens: int | None = None
        """Tokens of one image as the probe counted them; None: as the provider's formula says."""
        self.budget = budget or Budget(max_requests=settings.max_requests, max_cost_usd=settings.max_cost_usd)
        self._breaker = _Breaker()
        self._slots = asyncio.Semaphore(settings.concurrency)
        # In this process a request waits for the others before it, as long as they take.
        timeout_s = settings.timeout_s if settings.is_remote else _IN_PROCESS_TIMEOUT_S
        self._attempts: dict[asyncio.Task[Any], Attempt] = {}
        self._gate = Gate(
            transport or transport_for(settings),
            budget=self.budget,
            pace=pace or pace_of(settings),
            price=price,
            timeout_s=timeout_s,
            only_host=settings.host or None,
        )
        headers = _headers(settings, api_key)
        self._openai = openai.AsyncOpenAI(
            # Explicit values, so that the openai package does not look for them in the environment.
            api_key=api_key.get_secret_value() if api_key else _NO_KEY,
            admin_api_key="",
            organization="",
            project="",
            webhook_secret="",
            default_headers=headers,
            default_query={"api-version": settings.azure_api_version} if settings.azure_api_version else None,
            base_url=settings.base_url if settings.is_remote else "http://in-process/v1",
            timeout=timeout_s,
            max_retries=settings.max_retries,
            http_client=httpx2.AsyncClient(transport=self._gate, timeout=timeout_s),
        )
        # No argument keeps the package from adding what the environment calls OPENAI_CUSTOM_HEADERS.
        self._openai._custom_headers = headers

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._openai.close()

    @property
    def raw(self) -> openai.AsyncOpenAI:
        """The openai client below, with the same gate, for files and batches."""
        return self._openai

    async def ask(self, request: VlmRequest, parse: Callable[[str], T]) -> VlmAnswer[T]:
        """The parsed answer, from the journal where it knows it, asked for at most twice.

        A second answer is journalled beside the first. Raises what `send` raises.
        """
        n_requests, usage = 0, Usage()
        for attempt in (0, 1):
            question = with_more_room(request, attempt)
            record = self.journal.get(self.key_of(question))
            if record is None:
                n_requests += 1
                sent = await self.send(question)
                if isinstance(sent, FaultCode):
                    return VlmAnswer(None, sent, None, n_requests, usage)
                record, usage = sent, usage + sent.usage
            try:
                return VlmAnswer(parse(usable_text(record)), None, record, n_requests, usage)
            except AnswerFault as fault:
                code = fault.code
            if not is_asked_once_more(code):
                break
        return VlmAnswer(None, code, record, n_requests, usage)

    async def send(self, request: VlmRequest, cells: Sequence[str] = ()) -> Record | FaultCode:
        """The answer to one request, journalled under its key and its `cells`; the journal is not looked up.

        An endpoint that is too busy is waited for, as long as the pace allows. Raises `EndpointError`, `Deferred`,
        `BudgetReached` and `StorageError`; every other failure is a fault.
        """
        # A slot is held while the endpoint works, not while the request is written or the answer noted down.
        attempt = Attempt(most_usage(request, self.settings, self.image_tokens))
        body = json.dumps(self.arguments(request), ensure_ascii=False).encode()
        with self._under_way(attempt):
            async with self._slots:
                self.journal.require_room()
                completion = await self._complete_when_free(body, attempt)
            if isinstance(completion, FaultCode):
                self._breaker.failed(completion, self.settings)
                return completion
            record = self.record_of(completion, request, cells, attempt.most)
            self.journal.put(record)
        self._breaker.answered()
        return record

    @contextmanager
    def _under_way(self, attempt: Attempt) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._attempts[task] = attempt
        try:
            yield
        finally:
            del self._attempts[task]

    def key_of(self, request: VlmRequest) -> str:
        """The journal's key of a request to this endpoint."""
        return request.sha256(self.settings.parameters)

    def record_of(self, completion: Completion, request: VlmRequest, cells: Sequence[str], most: Usage) -> Record:
        """A journal record of an answer; tokens that the endpoint does not tell are counted as the most they may be."""
        choice = completion.choices[0] if completion.choices else Choice()
        counted = completion.counted
        usage = counted or most
        return Record(
            key=self.key_of(request),
            cells=tuple(cells),
            prompt_sha256=request.prompt_sha256,
            model=self.settings.model,
            text=choice.message.content,
            refusal=choice.message.refusal,
            finish_reason=choice.finish_reason,
            request_id=completion.id,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            created_at=utc_now(),
            seconds=round(completion.seconds, 3),
            cost_usd=None if self.price is None else usd(usage, self.price),
            top_logprobs=first_token(choice.logprobs),
            is_counted=counted is not None,
        )

    async def model_names(self) -> list[str] | None:
        """Models the endpoint offers; None where it does not tell. Raises `EndpointError`."""
        try:
            response = await self._guarded(self._openai.get("/models", cast_to=httpx2.Response))
            if isinstance(response, FaultCode):
                return None
            return [model.id for model in _ModelList.model_validate_json(response.content).data]
        except (openai.NotFoundError, openai.RateLimitError, ValueError):
            return None

    def arguments(self, request: VlmRequest) -> dict[str, Any]:
        """The body of a chat-completions request."""
        settings = self.settings
        schema = {"name": request.schema_name, "strict": True, "schema": request.schema}
        optional: dict[str, Any] = {
            "response_format": None if request.schema is None else {"type": "json_schema", "json_schema": schema},
            "temperature": settings.temperature,
            "seed": None if settings.seed is None else settings.seed + request.sample,
            "logprobs": True if request.top_logprobs else None,
            "top_logprobs": request.top_logprobs or None,
        }
        return {
            "model": settings.model,
            "messages": [
                {"role": "system", "content": request.system},
                {"role": "user", "content": [_content(part) for part in request.parts]},
            ],
            settings.output_limit_field: request.max_output_tokens,
            **{name: value for name, value in optional.items() if value is not None},
        }

    @property
    def is_stopping(self) -> bool:
        """Whether nothing is sent any more."""
        return self._gate.closed_by is not None

    async def finish_sent(self, reason: MedMicnError) -> None:
        """Send nothing more, and return when every request that has left is answered and journalled, or lost.

        It is paid for, so it is waited for; whoever asks from now on meets `reason`.
        """
        self._gate.closed_by = self._gate.closed_by or reason
        sent = [task for task, attempt in self._attempts.items() if attempt.has_left]
        if sent:
            await asyncio.wait(sent, timeout=self.settings.timeout_s + _MOST_PAUSE_OF_OPENAI_S)

    async def _complete_when_free(self, body: bytes, attempt: Attempt) -> Completion | FaultCode:
        token = ATTEMPT.set(attempt)
        try:
            while True:
                try:
                    return await self._guarded(self._complete(body))
                except openai.RateLimitError as error:
                    if _is_quota(error):
                        what = "says that the quota of this key is used up"
                        raise _endpoint_error(self.settings, what, "Raise the quota, then go on.") from error
                    # The gate has told the pace, which now holds this request back, or defers it.
        except openai.NotFoundError as error:
            what = f"does not know the model {self.settings.model!r} (HTTP 404)"
            remedy = "Correct vlm.base_url (it usually ends in /v1) or vlm.model."
            raise _endpoint_error(self.settings, what, remedy) from error
        finally:
            ATTEMPT.reset(token)

    async def _complete(self, body: bytes) -> Completion:
        """The endpoint's answer; `ValueError` when a success status brings no completion."""
        # As plain bytes: the typed method would walk through every character of the images again.
        response = await self._openai.post("/chat/completions", cast_to=httpx2.Response, content=body)
        completion = Completion.model_validate_json(response.content)
        completion.seconds = float(response.extensions.get(SECONDS, 0.0))
        return completion

    async def _guarded(self, call: Awaitable[T]) -> T | FaultCode:
        """The result of a call; faults of one request as codes, faults of the endpoint raised."""
        try:
            return await call
        except Stopped as stopped:
            raise stopped.reason from stopped
        except openai.APITimeoutError:
            return FaultCode.TIMED_OUT
        except openai.APIConnectionError as error:
            if not isinstance(error.__cause__, httpx2.ConnectError):
                return FaultCode.CONNECTION_LOST
            remedy = "Start it, or correct vlm.base_url."
            raise _endpoint_error(self.settings, "did not answer", remedy) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            remedy = "Put a valid key into the environment variable that vlm.api_key_env names."
            raise _endpoint_error(self.settings, f"refused the key (HTTP {error.status_code})", remedy) from error
        except (openai.RateLimitError, openai.NotFoundError):
            raise
        except openai.APIStatusError as error:
            if error.status_code == _OUT_OF_MEMORY and not self.settings.is_remote:
                raise EndpointError(f"{self.settings.model!r} in this process: {error.message}") from error
            return FaultCode.SERVER_ERROR if error.status_code >= 500 else FaultCode.REQUEST_REFUSED
        except (openai.APIError, ValueError):
            # A success status around something that is no completion: a proxy's page, a half-sent body.
            return FaultCode.SERVER_ERROR


class Message(BaseModel):
    """The message of a completion."""

    content: str | None = None
    refusal: str | None = None


class Choice(BaseModel):
    """One of the answers of a completion; only one is ever asked for."""

    message: Message = Message()
    finish_reason: str | None = None
    logprobs: Any = None


class Completion(BaseModel):
    """What is read of a chat completion; servers differ in all else."""

    id: str | None = None
    choices: list[Choice]
    usage: Any = None
    seconds: float = 0.0

    @property
    def counted(self) -> Usage | None:
        """Tokens as the endpoint counted them; None where it does not say."""
        return counted_usage(self.usage)


class _Model(BaseModel):
    id: str


class _ModelList(BaseModel):
    data: list[_Model]


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
        if n_in_a_row >= max(_MOST_FAULTS_IN_A_ROW, 2 * settings.concurrency):
            remedy = "Try one request by hand with the same base_url and model, then give the same command again."
            raise _endpoint_error(settings, f"failed {n_in_a_row} requests in a row, last: {code}", remedy)


def pace_of(settings: VlmSettings) -> Pace:
    """A pace with the configured rates."""
    return Pace(
        requests_per_minute=settings.requests_per_minute,
        tokens_per_minute=settings.tokens_per_minute,
        max_wait_s=settings.max_wait_s,
    )


def with_more_room(request: VlmRequest, attempt: int) -> VlmRequest:
    """The request as it is asked the `attempt`-th time: one that was cut off needs a longer answer."""
    return replace(request, max_output_tokens=request.max_output_tokens * (1 + attempt))


def is_asked_once_more(code: FaultCode) -> bool:
    """Whether a second answer to the same question may be better."""
    return code in _ASKED_ONCE_MORE


def usable_text(record: Record) -> str:
    """The raw text of an answer that is whole; raises `AnswerFault` otherwise."""
    if record.refusal or record.finish_reason == "content_filter":
        raise AnswerFault(FaultCode.REFUSED)
    if record.finish_reason == "length" and not record.top_logprobs:
        raise AnswerFault(FaultCode.CUT_OFF)
    if not record.text:
        raise AnswerFault(FaultCode.EMPTY_ANSWER)
    return record.text


def first_token(logprobs: Any) -> tuple[tuple[str, float], ...]:
    """Candidates for the first token with their log-probabilities, as far as they can be read."""
    try:
        rows = logprobs["content"][0]["top_logprobs"]
        return tuple((str(row["token"]), float(row["logprob"])) for row in rows)
    except (KeyError, IndexError, TypeError, ValueError):
        return ()


def _headers(settings: VlmSettings, api_key: SecretStr | None) -> dict[str, Any]:
    if settings.azure_api_version is None or api_key is None:
        return dict(_NO_ORGANISATION)
    return {**_NO_ORGANISATION, "api-key": api_key.get_secret_value()}


def _content(part: str | bytes) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    mime = "image/png" if part.startswith(b"\x89PNG") else "image/jpeg"
    return {"type": "image_url", "image_url": {"url": f"data:{mime};base64,{base64.b64encode(part).decode()}"}}


def _endpoint_error(settings: VlmSettings, what: str, remedy: str) -> EndpointError:
    where = settings.base_url if settings.is_remote else f"{settings.model} in this process"
    return EndpointError(f"The vision-language endpoint {where!r} {what}; every answer so far is kept.", remedy=remedy)


def _is_quota(error: openai.RateLimitError) -> bool:
    return "insufficient_quota" in (error.code, error.type)
