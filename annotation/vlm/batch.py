"""Requests through OpenAI's Batch API, at half the price: they go up as files, their answers come within a day.

Whatever is submitted is on the disk before it leaves (`annotation.vlm.batch_files`), under a name of our own that the
batch carries as metadata. So whenever this process ends, a later one finds each batch again, in the same journal:
nothing is paid for twice. What concerns one request is counted by its code; what concerns the endpoint is raised.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from typing import TypeVar

from annotation.vlm.batch_answers import QUEUE_FULL, Intake, Interrupted
from annotation.vlm.batch_calls import CHAT_URL, SUBMISSION_KEY, BatchCalls, NotBegun, RemoteBatch
from annotation.vlm.batch_files import BatchFolder, Entry, Outcome, PendingCells, RequestFile, Submission
from annotation.vlm.client import VlmClient
from annotation.vlm.estimate import BATCH_PRICE, most_usage
from annotation.vlm.gate import usd
from annotation.vlm.journal import utc_now
from annotation.vlm.schema import Usage, VlmRequest
from data_contracts.errors import BudgetReached

__all__ = ["MAX_BYTES", "MAX_REQUESTS", "SUBMISSION_KEY", "Asked", "Batches", "Collected", "Submitted"]

T = TypeVar("T")
Asked = tuple[VlmRequest, Sequence[str]]
"""A request and the cells that it answers."""

MAX_REQUESTS = 50_000
"""Requests of one batch, as OpenAI allows."""
MAX_BYTES = 190_000_000
"""Bytes of one file of requests; OpenAI allows 200 MB."""

_TOKEN_LIMIT = re.compile(r"[Ll]imit:?\s*([\d,]{3,20})")
_LIMIT_LASTS = timedelta(days=7)
_LIMIT_SHARE = 0.9
"""Our count of tokens is near the endpoint's, not equal."""
_KEY_BYTES = 16


@dataclass
class Collected:
    """What one look at all batches under way has brought."""

    n_ended: int = 0
    """Batches that have ended, and whose answers are in the journal now."""
    n_answers: int = 0
    """Answers among them, usable or not."""
    usage: Usage = field(default_factory=Usage)
    """Tokens billed for these."""
    billed_usd: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    """Code → requests that ended without an answer; they are open again."""
    odd_lines: Counter[str] = field(default_factory=Counter)
    """`garbage`, `unknown`, `duplicated` → lines of answer files that were left out."""
    n_pending: int = 0
    """Batches still under way."""
    n_requests_pending: int = 0
    """Requests in them."""
    n_done_pending: int = 0
    """Those of them that the endpoint has worked off."""


@dataclass
class Submitted:
    """What was sent now."""

    n_batches: int = 0
    n_requests: int = 0
    reached: BudgetReached | None = None
    """The cap into which the rest does not fit."""
    is_queue_full: bool = False
    """Whether the rest was not sent because the endpoint queues no more at once."""

    @property
    def is_partial(self) -> bool:
        """Whether something was left out."""
        return self.reached is not None or self.is_queue_full


class _End(Enum):
    """Why no further request goes into a file."""

    OF_REQUESTS = auto()
    FILE_FULL = auto()
    QUEUE_FULL = auto()
    CAP = auto()


class Batches:
    """The batches of one client and its journal, those of earlier processes included.

    One of these serves one command, which sends each request at most once: what failed is for the next command. Its
    methods are to be called one at a time.
    """

    def __init__(self, client: VlmClient, *, max_requests: int = MAX_REQUESTS, max_bytes: int = MAX_BYTES) -> None:
        """Find what is under way; raises `StorageError` where its files are damaged."""
        self._client = client
        self._calls = BatchCalls(client)
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._folder = BatchFolder(client.journal.folder)
        self._folder.sweep()
        self._pending = {s.submission_id: s for s in self._folder.under_way(client.settings)}
        self._earlier = {_short(key) for s in self._pending.values() for key in self._folder.index(s)}
        self._sent: set[bytes] = set()
        self._in_vain: set[bytes] = set()
        self._token_limit = _token_limit(self._folder.ended(client.settings))
        self._reserved: set[str] = set()
        self._reached: BudgetReached | None = None
        self._reserve_what_is_under_way()

    @property
    def n_pending(self) -> int:
        """Batches under way."""
        return len(self._pending)

    @property
    def n_requests_pending(self) -> int:
        """Requests under way."""
        return sum(s.n_requests for s in self._pending.values())

    def was_sent(self, request: VlmRequest) -> bool:
        """Whether a batch under way holds this request, or one that was sent by this object."""
        key = _short(self._client.key_of(request))
        return key in self._earlier or key in self._sent

    def was_in_vain(self, request: VlmRequest) -> bool:
        """Whether it was tried, and has ended without an answer since this object was made."""
        return _short(self._client.key_of(request)) in self._in_vain

    def pending_cells(self) -> PendingCells:
        """What the batches under way will answer."""
        return self._folder.cells(list(self._pending.values()))

    def release(self) -> None:
        """Give back what is still reserved for batches under way, at the end of a command."""
        for submission in self._pending.values():
            self._release(submission)

    # ---- sending ------------------------------------------------------------------------------------

    async def submit(self, requests: Iterable[Asked]) -> Submitted:
        """Send all of `requests` that are new, in as many batches as it takes, as far as caps and queue allow.

        They are drawn and written down on another thread, one file at a time. Raises `EndpointError`, `Deferred` and
        `StorageError`; what was sent until then is found again.
        """
        result = Submitted(reached=self._reached if self._pending.keys() - self._reserved else None)
        source = _Source(requests)
        end = _End.FILE_FULL
        while end is _End.FILE_FULL and result.reached is None:
            submission, end, result.reached = await _on_thread(lambda stop: self._written(source, stop))
            if submission is not None:
                await self._send(submission)
                result.n_batches += 1
                result.n_requests += submission.n_requests
        result.is_queue_full = end is _End.QUEUE_FULL
        return result

    def _written(self, source: _Source, stop: threading.Event) -> tuple[Submission | None, _End, BudgetReached | None]:
        """The next batch, on the disk and reserved, or None; why it ends, and the cap if that is why."""
        self._client.journal.require_room()
        file = RequestFile(self._folder.folder)
        try:
            end, reached = self._fill(file, source, stop)
            if not file.n_requests:
                file.remove()
                return None, end, reached
            file.close()
            submission = self._submission(file)
            self._folder.save(submission)
        except BaseException:
            file.remove()
            self._client.budget.release_many(file.n_requests, self._usd(file.most))
            raise
        self._pending[submission.submission_id] = submission
        self._reserved.add(submission.submission_id)
        return submission, end, reached

    def _fill(self, file: RequestFile, source: _Source, stop: threading.Event) -> tuple[_End, BudgetReached | None]:
        client = self._client
        for request, cells in source:
            if stop.is_set():
                raise Interrupted
            key = client.key_of(request)
            if _short(key) in self._earlier or _short(key) in self._sent or _short(key) in self._in_vain:
                continue
            line = _line(key, client.arguments(request))
            most = most_usage(request, client.settings, client.image_tokens)
            end = self._end_before(file, len(line), most)
            reached = self._reserve_one(most) if end is None else None
            if end is not None or reached is not None:
                source.put_back((request, cells))
                return end or _End.CAP, reached
            file.add(line, Entry(key, request.prompt_sha256, tuple(cells), most))
            self._sent.add(_short(key))
        return _End.OF_REQUESTS, None

    def _end_before(self, file: RequestFile, n_bytes: int, most: Usage) -> _End | None:
        """Why a request of this size is not for this file; None where it is."""
        if self._token_limit is not None and (file.n_requests or self._pending):
            n_queued = sum(s.most_input_tokens for s in self._pending.values()) + file.most.input_tokens
            if n_queued + most.input_tokens > self._token_limit:
                return _End.QUEUE_FULL
        is_full = file.n_requests >= self._max_requests or file.n_bytes + n_bytes > self._max_bytes
        return _End.FILE_FULL if is_full and file.n_requests else None

    def _reserve_one(self, most: Usage) -> BudgetReached | None:
        """The cap into which one more request does not fit; None where it is reserved now."""
        try:
            self._client.budget.reserve_many(1, self._usd(most))
        except BudgetReached as reached:
            return reached
        return None

    def _submission(self, file: RequestFile) -> Submission:
        return Submission(
            submission_id=file.submission_id,
            base_url=self._client.settings.base_url,
            model=self._client.settings.model,
            created_at=utc_now(),
            n_requests=file.n_requests,
            most_usd=self._usd(file.most),
            most_input_tokens=file.most.input_tokens,
            prompts=file.prompts,
        )

    async def _send(self, submission: Submission) -> None:
        requests = self._folder.requests_path(submission)
        try:
            file_id = await self._calls.upload(requests, f"{submission.submission_id}.jsonl")
        except BaseException:
            # Never asked for, so nothing is owed for it: it is written down again when it is wanted again.
            self._forget(submission)
            raise
        submission = self._keep(submission, input_file_id=file_id)
        requests.unlink(missing_ok=True)
        try:
            batch = await self._calls.begin(submission, lambda: self._keep(submission, asked_at=utc_now()))
        except NotBegun:
            self._forget(submission)
            await self._calls.remove(file_id)
            raise
        self._keep(submission, batch_id=batch.id)

    # ---- collecting ---------------------------------------------------------------------------------

    async def collect(self) -> Collected:
        """Look at each batch under way once, and put the answers of those that have ended into the journal.

        Raises `EndpointError`, `Deferred` and `StorageError`; what was collected until then is kept.
        """
        found = Collected()
        for submission in list(self._pending.values()):
            await self._look_at(submission, found)
        found.n_pending, found.n_requests_pending = self.n_pending, self.n_requests_pending
        return found

    async def _look_at(self, submission: Submission, found: Collected) -> None:
        if submission.batch_id is None:
            adopted = await self._adopted(submission)
            if adopted is None:
                self._forget(submission)
                await self._remove_pixels(submission)
                return
            submission = adopted
        batch = await self._calls.look(submission.batch_id or "")
        if batch.has_ended:
            await self._take_in(submission, batch, found)
        else:
            found.n_done_pending += batch.n_done

    async def _adopted(self, submission: Submission) -> Submission | None:
        """The submission with the batch that a killed process began for it; None where it began none."""
        batch = None if submission.asked_at is None else await self._calls.find(submission)
        return None if batch is None else self._keep(submission, batch_id=batch.id)

    async def _take_in(self, submission: Submission, batch: RemoteBatch, found: Collected) -> None:
        self._client.journal.require_room()
        intake = Intake(self._client, batch.id, self._folder.index(submission))
        path = self._folder.answers_path(submission)
        for file_id in batch.answer_files:
            await self._calls.download(file_id, path)
            await _on_thread(lambda stop: intake.read(path, stop))
            path.unlink(missing_ok=True)
        intake.end(batch.status, [fault.code for fault in batch.faults])
        # Puts it on the disk: only then may the state go that leads to these answers.
        self._client.journal.close()
        self._settle(submission, intake)
        self._finish(submission, batch, intake)
        found.n_ended += 1
        found.n_answers += intake.n_answers
        found.usage += intake.usage
        found.billed_usd += intake.billed_usd
        found.failures += intake.failures
        found.odd_lines += intake.odd_lines
        await self._remove_pixels(submission)

    def _settle(self, submission: Submission, intake: Intake) -> None:
        """Replace the reservation by what was billed."""
        budget, n_tried = self._client.budget, intake.n_answers + len(intake.in_vain)
        if submission.submission_id in self._reserved:
            self._reserved.discard(submission.submission_id)
            budget.release_many(submission.n_requests - n_tried, 0.0)
            budget.settle_many(n_tried, submission.most_usd, intake.billed_usd)
        else:
            budget.settle_many(0, 0.0, intake.billed_usd)
        if intake.lost_usd:
            budget.settle_many(0, 0.0, intake.lost_usd, is_lost=True)

    def _finish(self, submission: Submission, batch: RemoteBatch, intake: Intake) -> None:
        limit = _limit_told(submission, batch) if QUEUE_FULL in intake.failures else None
        self._token_limit = limit or self._token_limit
        self._earlier -= {_short(key) for key in intake.index}
        self._in_vain |= {_short(key) for key in intake.in_vain}
        del self._pending[submission.submission_id]
        outcome = Outcome(
            status=batch.status,
            ended_at=utc_now(),
            n_answers=intake.n_answers,
            billed_usd=intake.billed_usd,
            failures=dict(intake.failures),
            odd_lines=dict(intake.odd_lines),
            token_limit=limit,
        )
        self._folder.finish(submission, outcome)

    # ---- what is under way --------------------------------------------------------------------------

    def _reserve_what_is_under_way(self) -> None:
        """Batches of earlier commands count against the caps until they end: looking again is no second helping."""
        for submission in self._pending.values():
            try:
                self._client.budget.reserve_many(submission.n_requests, submission.most_usd)
                self._reserved.add(submission.submission_id)
            except BudgetReached as reached:
                self._reached = reached

    def _keep(self, submission: Submission, **changes: str) -> Submission:
        """The present state of a submission with these changes, on the disk."""
        changed = self._pending[submission.submission_id].model_copy(update=changes)
        self._folder.save(changed)
        self._pending[submission.submission_id] = changed
        return changed

    def _forget(self, submission: Submission) -> None:
        """Drop a submission that never became a batch: its requests are open again."""
        keys = {_short(key) for key in self._folder.index(submission)}
        self._earlier -= keys
        self._sent -= keys
        self._release(submission)
        del self._pending[submission.submission_id]
        self._folder.discard(submission)

    def _release(self, submission: Submission) -> None:
        if submission.submission_id in self._reserved:
            self._reserved.discard(submission.submission_id)
            self._client.budget.release_many(submission.n_requests, submission.most_usd)

    async def _remove_pixels(self, submission: Submission) -> None:
        """Delete the uploaded requests: the endpoint has no more use for them."""
        if submission.input_file_id is not None:
            await self._calls.remove(submission.input_file_id)

    def _usd(self, usage: Usage) -> float:
        return BATCH_PRICE * usd(usage, self._client.price)


class _Source:
    """Requests in their order, into which the last one can be put back."""

    def __init__(self, requests: Iterable[Asked]) -> None:
        self._requests = iter(requests)
        self._held: list[Asked] = []

    def __iter__(self) -> Iterator[Asked]:
        # Not `yield from`: whoever leaves this loop early would close the requests behind it.
        while (asked := self._held.pop() if self._held else next(self._requests, None)) is not None:
            yield asked

    def put_back(self, asked: Asked) -> None:
        """Let it come again next, to whoever iterates next."""
        self._held.append(asked)


async def _on_thread(work: Callable[[threading.Event], T]) -> T:
    """What `work` gives, done on a thread; its event is set when nobody waits for it any more."""
    stop = threading.Event()
    try:
        return await asyncio.to_thread(work, stop)
    finally:
        stop.set()


def _line(key: str, body: object) -> bytes:
    asked = {"custom_id": key, "method": "POST", "url": CHAT_URL, "body": body}
    return json.dumps(asked, ensure_ascii=False).encode() + b"\n"


def _limit_told(submission: Submission, batch: RemoteBatch) -> int:
    """Tokens that the endpoint says it queues; half of what it refused where it does not say."""
    told = (_TOKEN_LIMIT.search(fault.message or "") for fault in batch.faults)
    limits = [int(match[1].replace(",", "")) for match in told if match]
    return int(_LIMIT_SHARE * min(limits)) if limits else submission.most_input_tokens // 2


def _token_limit(ended: Sequence[Submission]) -> int | None:
    """The endpoint's last word on how many tokens it queues, as long as that is likely to hold."""
    outcomes = sorted((s.outcome for s in ended if s.outcome is not None), key=lambda o: o.ended_at)
    told = [o for o in outcomes if o.token_limit is not None]
    recent = [o for o in told if datetime.now(UTC) - datetime.fromisoformat(o.ended_at) < _LIMIT_LASTS]
    return recent[-1].token_limit if recent else None


def _short(key: str) -> bytes:
    return bytes.fromhex(key)[:_KEY_BYTES]
