"""The gate: every attempt at a request, first or repeated, passes here on its way to the network.

The openai client repeats requests by itself, below everything this project sees of it. So caps, rates, the total time
of an attempt, the size of an answer and the ban on other hosts are kept here, in the transport, once an attempt.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import time
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import httpx2
import openai

from annotation.vlm.budget import Budget
from annotation.vlm.pace import Pace
from annotation.vlm.prices import Price
from annotation.vlm.schema import Usage
from data_contracts.errors import ConfigurationError, MedMicnError

SECONDS = "seconds"
"""The extension of an answer that holds how long its last attempt took, without any waiting before it."""

MAX_ANSWER_BYTES = 16 * 2**20
_PATIENCE_S = 60.0
"""How long a "too many" without a usable `Retry-After` holds everybody back, at most."""
_FIRST_PATIENCE_S = 1.0


@dataclass
class Attempt:
    """The request that is on its way: what each attempt at it may cost, and whether it has left yet."""

    most: Usage
    has_left: bool = False


ATTEMPT: ContextVar[Attempt | None] = ContextVar("attempt", default=None)
"""Set around a call of the openai client; requests outside of one (a list of models) cost nothing."""


@dataclass(frozen=True)
class Transfer:
    """A file that is on its way: it is larger than an answer, and takes longer."""

    timeout_s: float
    """Seconds until an upload counts as lost, or a download must have begun."""
    is_download: bool = False
    """Whether the answer is the file: it is handed on unread, and its reader limits time and size."""


TRANSFER: ContextVar[Transfer | None] = ContextVar("transfer", default=None)
"""Set around a call of the openai client that moves a file."""


class Stopped(openai.OpenAIError):
    """Carries an error of this project through the openai client, which hands its own errors on unrepeated."""

    def __init__(self, reason: MedMicnError) -> None:
        super().__init__(reason.message)
        self.reason = reason


class Gate(httpx2.AsyncBaseTransport):
    """A transport around another one, with the caps, rates and limits of one endpoint."""

    def __init__(
        self,
        inner: httpx2.AsyncBaseTransport,
        *,
        budget: Budget,
        pace: Pace,
        price: Price | None,
        timeout_s: float,
        only_host: str | None = None,
    ) -> None:
        """A gate before `inner`; `only_host`: the one host that requests may go to."""
        self._inner = inner
        self._budget = budget
        self._pace = pace
        self._price = price
        self._timeout_s = timeout_s
        self._only_host = only_host
        self.closed_by: MedMicnError | None = None
        """Why nothing leaves any more; None as long as the gate is open."""
        self._dearer = 1.0
        """How much dearer than foreseen an answer has been: what is set aside for the next ones grows with it."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """The whole answer; raises what the inner transport raises, and `Stopped`."""
        if self._only_host is not None and request.url.host != self._only_host:
            # Answers are data: a redirect must not lead images elsewhere.
            found = f"expected requests to {self._only_host!r} only, got one to {request.url.host!r}"
            raise Stopped(ConfigurationError(f"{found}; it was not sent.", remedy="Correct vlm.base_url."))
        attempt = ATTEMPT.get()
        return await (self._send(request) if attempt is None else self._send_within_caps(request, attempt))

    async def aclose(self) -> None:
        """Close the inner transport."""
        await self._inner.aclose()

    def _require_open(self) -> None:
        if self.closed_by is not None:
            raise Stopped(self.closed_by)

    async def _send_within_caps(self, request: httpx2.Request, attempt: Attempt) -> httpx2.Response:
        self._require_open()
        most = attempt.most
        foreseen_usd = usd(most, self._price)
        most_usd = foreseen_usd * self._dearer
        try:
            await self._budget.reserve(most_usd)
        except MedMicnError as error:
            raise Stopped(error) from error
        # Until the request has left, leaving this block gives the reservation back.
        settled = False
        try:
            try:
                left_at_s = await self._pace.wait(most.input_tokens + most.output_tokens)
            except MedMicnError as error:
                raise Stopped(error) from error
            self._require_open()
            attempt.has_left = True
            try:
                response = await self._send(request)
            except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout):
                raise
            except BaseException:
                # The request may have arrived and been answered: it counts as if it had been.
                self._budget.settle(most_usd, most_usd, is_lost=True)
                settled = True
                raise
            billed_usd = usd(_billed(response, most), self._price)
            self._budget.settle(most_usd, billed_usd)
            settled = True
            if billed_usd > most_usd:
                self._dearer = billed_usd / foreseen_usd
        finally:
            if not settled:
                self._budget.release(most_usd)
        self._tell_pace(response, left_at_s)
        return response

    async def _send(self, request: httpx2.Request) -> httpx2.Response:
        """The answer with its whole body, within the time and the size that an answer may have."""
        transfer = TRANSFER.get()
        timeout_s = self._timeout_s if transfer is None else transfer.timeout_s
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._inner.handle_async_request(request)
                if transfer is not None and transfer.is_download and response.is_success:
                    return response
                try:
                    body = await _read(response)
                finally:
                    await response.aclose()
        except TimeoutError as error:
            # A body that trickles in byte by byte never meets the client's own timeouts.
            raise httpx2.ReadTimeout(f"no whole answer within {timeout_s:g} s", request=request) from error
        # The body is decoded by now, so these no longer describe it.
        headers = [(k, v) for k, v in response.headers.multi_items() if k.lower() not in _OF_THE_BODY]
        answer = httpx2.Response(response.status_code, headers=headers, content=body, request=request)
        answer.extensions[SECONDS] = time.monotonic() - started_s
        return answer

    def _tell_pace(self, response: httpx2.Response, left_at_s: float) -> None:
        if response.status_code == httpx2.codes.TOO_MANY_REQUESTS:
            # The openai client would repeat it by a clock of its own; who waits for whom is decided by the pace alone.
            response.headers["x-should-retry"] = "false"
            if not is_out_of_quota(response):
                self._pace.told_to_wait(retry_after_s(response.headers, self._pace.gap_s), left_at_s)
        elif response.status_code < 500:
            self._pace.answered()


_OF_THE_BODY = {"content-encoding", "content-length", "transfer-encoding"}


def usd(usage: Usage, price: Price | None) -> float:
    """Price of these tokens; 0 where no price is known."""
    if price is None:
        return 0.0
    return usage.input_tokens * price.input_usd_per_token + usage.output_tokens * price.output_usd_per_token


def counted_usage(usage: Any) -> Usage | None:
    """Tokens in the `usage` of a completion; None where they are not told."""
    n_input, n_output = _field(usage, "prompt_tokens"), _field(usage, "completion_tokens")
    is_told = isinstance(n_input, int) and isinstance(n_output, int) and n_input >= 0 and n_output >= 0
    return Usage(n_input, n_output) if is_told and n_input + n_output > 0 else None


def retry_after_s(headers: httpx2.Headers, gap_s: float = 0.0) -> float:
    """Seconds that an answer asks to wait for; a guess from the present gap where it says nothing usable."""
    header = headers.get("retry-after", "")
    with suppress(ValueError, OverflowError):
        return _seconds(float(headers.get("retry-after-ms", "")) / 1000)
    with suppress(ValueError, OverflowError):
        return _seconds(float(header))
    with suppress(ValueError, OverflowError):
        date = email.utils.parsedate_tz(header)
        if date is not None:
            return _seconds(email.utils.mktime_tz(date) - time.time())
    return min(_PATIENCE_S, max(_FIRST_PATIENCE_S, 4 * gap_s))


def is_out_of_quota(response: httpx2.Response) -> bool:
    """Whether a "too many" means that the money is used up, so that waiting does not help."""
    error = _field(_json(response), "error")
    return "insufficient_quota" in (_field(error, "code"), _field(error, "type"))


def _seconds(value: float) -> float:
    """A wait that can be waited; raises `ValueError` for any other."""
    if not math.isfinite(value):
        raise ValueError(f"expected a number of seconds, got {value}")
    return max(0.0, value)


def _billed(response: httpx2.Response, most: Usage) -> Usage:
    """Tokens that an answer was billed for: as it says, as many as possible where it does not say, none if refused."""
    if not response.is_success:
        return Usage()
    return counted_usage(_field(_json(response), "usage")) or most


async def _read(response: httpx2.Response) -> bytes:
    pieces: list[bytes] = []
    n_bytes = 0
    async for piece in response.aiter_bytes():
        pieces.append(piece)
        n_bytes += len(piece)
        if n_bytes > MAX_ANSWER_BYTES:
            raise httpx2.RemoteProtocolError(f"expected an answer of at most {MAX_ANSWER_BYTES} bytes, got more")
    return b"".join(pieces)


def _json(response: httpx2.Response) -> Any:
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError):
        return None


def _field(content: Any, name: str) -> Any:
    return content.get(name) if isinstance(content, dict) else None
