"""The calls of the Batch API: a file up, a batch begun, looked at and found again, a file down.

All of them go through the gate of a `VlmClient`. What fails here concerns the endpoint as a whole, and is raised.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
import openai
from pydantic import BaseModel, ValidationError

from annotation.vlm.batch_files import Submission
from annotation.vlm.client import VlmClient
from annotation.vlm.gate import TRANSFER, Stopped, Transfer, retry_after_s
from annotation.vlm.settings import VlmSettings
from data_contracts.errors import Deferred, EndpointError
from data_contracts.files import storage_error

T = TypeVar("T", bound=BaseModel)

CHAT_URL = "/v1/chat/completions"
"""Where the requests of a batch go, as the batch and each of its lines name it."""
SUBMISSION_KEY = "medmicn_submission"
"""The metadata of a batch under which our own name of it stands."""
CODE = re.compile(r"[A-Za-z][\w.-]{0,63}")
"""What is shown of an error: words of a server go no further than a name would."""

_ENDED = {"completed", "failed", "expired", "cancelled"}
_TRANSFER_S = 3600.0
"""Most seconds for one file up or down."""
_MOST_ANSWERS_BYTES = 4 * 2**30
_SETTLE_S = 10.0
"""A batch that was asked for may take so long to appear in the endpoint's list."""
_LOOK_AGAIN_S = 2.0
_CLOCKS_DIFFER = timedelta(days=1)
_PATIENCE_S = 60.0
_PAGE = 100


class BatchFault(BaseModel):
    """Why a whole batch failed."""

    code: str | None = None
    message: str | None = None


class _Faults(BaseModel):
    data: list[BatchFault] | None = None


class _Counts(BaseModel):
    completed: int = 0
    failed: int = 0


class RemoteBatch(BaseModel):
    """A batch as the endpoint describes it."""

    id: str
    status: str
    created_at: float = 0.0
    input_file_id: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    metadata: dict[str, Any] | None = None
    errors: _Faults | None = None
    request_counts: _Counts | None = None

    @property
    def has_ended(self) -> bool:
        """Whether no more will come of it than there is."""
        return self.status in _ENDED

    @property
    def n_done(self) -> int:
        """Requests that were worked off."""
        counts = self.request_counts or _Counts()
        return counts.completed + counts.failed

    @property
    def answer_files(self) -> list[str]:
        """Names of the files with answers and errors; some servers name one that does not exist by an empty text."""
        return [file_id for file_id in (self.output_file_id, self.error_file_id) if file_id]

    @property
    def faults(self) -> list[BatchFault]:
        """Why it failed as a whole."""
        return (self.errors.data if self.errors else None) or []


class NotBegun(EndpointError):
    """The endpoint refused to begin a batch: it is certain that there is none."""


class BatchCalls:
    """What a client's endpoint can be asked about batches."""

    def __init__(self, client: VlmClient) -> None:
        self._openai = client.raw
        self._settings = client.settings

    async def upload(self, path: Path, name: str) -> str:
        """The endpoint's name of a file of requests; read from the disk piece by piece."""
        # The openai client's own `files.create` does not look at what comes back.
        with self._told("took no file"), _transfer(), path.open("rb") as stream:
            response = await self._openai.post(
                "/files",
                body={"purpose": "batch"},
                files={"file": (name, stream, "application/jsonl")},
                options={"headers": {"Content-Type": "multipart/form-data"}, "timeout": _TRANSFER_S},
                cast_to=httpx2.Response,
            )
            return _File.model_validate_json(response.content).id

    async def begin(self, submission: Submission, keep_asking: Callable[[], Submission]) -> RemoteBatch:
        """The batch that answers this submission, begun now; `keep_asking` notes that it is asked for.

        The openai client must not repeat this by itself: a request whose answer was lost may have begun a batch. So
        the batch is looked for before it is asked for again. Raises `NotBegun` where it was refused.
        """
        for attempt in range(self._settings.max_retries + 1):
            submission = keep_asking()
            is_last = attempt == self._settings.max_retries
            try:
                return await self._create(submission)
            except openai.RateLimitError as error:
                if is_last or is_quota(error):
                    with self._told("began no batch"):
                        raise
                await asyncio.sleep(min(_PATIENCE_S, retry_after_s(error.response.headers)))
            except (openai.APIConnectionError, openai.InternalServerError, ValidationError):
                found = await self.find(submission)
                if found is not None:
                    return found
                if is_last:
                    with self._told("began no batch"):
                        raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def find(self, submission: Submission) -> RemoteBatch | None:
        """The batch that carries our name of it; None once it is certain that there is none."""
        asked_at = datetime.fromisoformat(submission.asked_at or submission.created_at)
        while True:
            with self._told("did not list its batches"):
                found = await self._listed(submission)
            if found is not None or (datetime.now(UTC) - asked_at).total_seconds() >= _SETTLE_S:
                return found
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def look(self, batch_id: str) -> RemoteBatch:
        """How far a batch is."""
        with self._told(f"did not tell about the batch {batch_id}"):
            return await self._get(RemoteBatch, f"/batches/{quote(batch_id, safe='')}")

    async def download(self, file_id: str, path: Path) -> None:
        """Save a file of the endpoint; one that breaks off is begun again. Raises `StorageError` for a full disk."""
        for attempt in range(self._settings.max_retries + 1):
            try:
                with self._told(f"did not give the file {file_id}"), _transfer(is_download=True):
                    async with asyncio.timeout(_TRANSFER_S):
                        await self._save(file_id, path)
                return
            except (httpx2.HTTPError, TimeoutError) as error:
                if attempt == self._settings.max_retries:
                    raise endpoint_error(self._settings, f"broke off in the middle of the file {file_id}") from error

    async def remove(self, file_id: str) -> None:
        """Delete an uploaded file, and its pixels with it; an endpoint that does not want to is left alone."""
        try:
            await self._openai.delete(f"/files/{quote(file_id, safe='')}", cast_to=httpx2.Response)
        except openai.OpenAIError:
            return

    async def _create(self, submission: Submission) -> RemoteBatch:
        body = {
            "input_file_id": submission.input_file_id,
            "endpoint": CHAT_URL,
            "completion_window": "24h",
            "metadata": {SUBMISSION_KEY: submission.submission_id},
        }
        try:
            response = await self._openai.post(
                "/batches",
                body=body,
                options={"max_retries": 0, "idempotency_key": submission.submission_id},
                cast_to=httpx2.Response,
            )
        except (openai.RateLimitError, openai.InternalServerError):
            raise
        except openai.APIStatusError as error:
            refused = _refusal(self._settings, "began no batch", error)
            raise NotBegun(refused.message, remedy=refused.remedy) from error
        return RemoteBatch.model_validate_json(response.content)

    async def _listed(self, submission: Submission) -> RemoteBatch | None:
        oldest = (datetime.fromisoformat(submission.created_at) - _CLOCKS_DIFFER).timestamp()
        after: dict[str, Any] = {}
        while True:
            page = await self._get(_Page, "/batches", {"limit": _PAGE, **after})
            for batch in page.data:
                named = (batch.metadata or {}).get(SUBMISSION_KEY)
                if submission.submission_id == named or submission.input_file_id == batch.input_file_id:
                    return batch
            # The newest come first.
            if not page.has_more or not page.data or page.data[-1].created_at < oldest:
                return None
            after = {"after": page.data[-1].id}

    async def _get(self, kind: type[T], path: str, params: dict[str, Any] | None = None) -> T:
        response = await self._openai.get(path, options={"params": params or {}}, cast_to=httpx2.Response)
        return kind.model_validate_json(response.content)

    async def _save(self, file_id: str, path: Path) -> None:
        async with self._openai.files.with_streaming_response.content(file_id) as response:
            with _writing(path) as write:
                async for piece in response.iter_bytes():
                    write(piece)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Errors of the openai client as errors of this project; `what` the endpoint did."""
        try:
            yield
        except Stopped as stopped:
            raise stopped.reason from stopped
        except openai.RateLimitError as error:
            raise _too_many(self._settings, error) from error
        except openai.APIStatusError as error:
            raise _refusal(self._settings, what, error) from error
        except openai.APIConnectionError as error:
            raise endpoint_error(self._settings, f"{what}: no answer came") from error
        except (openai.APIError, ValidationError) as error:
            raise endpoint_error(self._settings, f"{what}: what came is no answer of a Batch API") from error


class _File(BaseModel):
    id: str


class _Page(BaseModel):
    data: list[RemoteBatch]
    has_more: bool = False


def endpoint_error(settings: VlmSettings, what: str, remedy: str | None = None) -> EndpointError:
    """An error of the endpoint: what it did, and that nothing is lost."""
    where = f"The vision-language endpoint {settings.base_url!r}"
    return EndpointError(
        f"{where} {what}; no batch is lost, and every answer so far is kept.",
        remedy=remedy or "Give the same command again to go on.",
    )


def is_quota(error: openai.RateLimitError) -> bool:
    """Whether a "too many" means that the money is used up."""
    return "insufficient_quota" in (error.code, error.type)


def _too_many(settings: VlmSettings, error: openai.RateLimitError) -> EndpointError | Deferred:
    if is_quota(error):
        return endpoint_error(settings, "says that the quota of this key is used up", "Raise the quota, then go on.")
    wait_s = retry_after_s(error.response.headers)
    return Deferred(
        f"The vision-language endpoint {settings.base_url!r} is too busy and asks to come back in {wait_s:.0f} s; no "
        "batch is lost, and every answer so far is kept.",
        retry_after_s=wait_s,
        remedy="Give the same command again then.",
    )


def _refusal(settings: VlmSettings, what: str, error: openai.APIStatusError) -> EndpointError:
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        remedy = "Put a valid key into the environment variable that vlm.api_key_env names."
        return endpoint_error(settings, f"refused the key (HTTP {error.status_code})", remedy)
    if isinstance(error, openai.NotFoundError):
        remedy = "Use the key, project and address of the time it was sent; without a Batch API: vlm.batch = false."
        return endpoint_error(settings, f"{what} (HTTP 404)", remedy)
    code = f", {error.code}" if error.code and CODE.fullmatch(error.code) else ""
    return endpoint_error(settings, f"{what} (HTTP {error.status_code}{code})")


@contextmanager
def _transfer(*, is_download: bool = False) -> Iterator[None]:
    """Within it, the gate lets a file pass."""
    token = TRANSFER.set(Transfer(_TRANSFER_S, is_download))
    try:
        yield
    finally:
        TRANSFER.reset(token)


@contextmanager
def _writing(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Appends to a fresh file, up to the most that answers may have; raises `StorageError`."""
    n_bytes = 0

    def write(piece: bytes) -> None:
        nonlocal n_bytes
        n_bytes += len(piece)
        if n_bytes > _MOST_ANSWERS_BYTES:
            raise httpx2.RemoteProtocolError(f"expected a file of at most {_MOST_ANSWERS_BYTES} bytes, got more")
        try:
            stream.write(piece)
        except OSError as error:
            raise storage_error(path, error) from error

    try:
        stream = path.open("wb")
    except OSError as error:
        raise storage_error(path, error) from error
    with stream:
        yield write
