"""Judging through the Batch API: collect what has ended, send what is open, wait as long as allowed, go on another day.

A run may be given up and taken up again at any moment. What is under way is known from the files beside the journal;
what is open is known from the ledger, the journal and those files, image by image. Only images without an answer on
its way enter the ledger, so that no judgement rests on a part of its answers.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from annotation.judge import Asking, SentImage
from annotation.vlm.batch import Asked, Batches, Collected, Submitted
from annotation.vlm.batch_files import BatchFolder, PendingCells
from annotation.vlm.client import VlmClient
from annotation.vlm.questions import Question
from data_contracts.errors import BudgetReached, Deferred, ImageRejected, StoppedResumable
from data_contracts.ports import PixelReader
from flows.chain import Context, ShardRunner, ShardWork
from flows.judging import OpenWork, WitnessPlan
from flows.steps.images import image_reader
from flows.vlm import VlmSession, endpoint_name

T = TypeVar("T")
R = TypeVar("R")

_FIRST_PAUSE_S = 5.0
_MOST_PAUSE_S = 60.0
_LONGER = 1.5
_THREADS = 4
_COME_BACK_S = 3600.0
"""When it is worth looking again, where nobody knows when batches end."""


@dataclass(frozen=True)
class _Group:
    """Images with the same open questions."""

    questions: tuple[Question, ...]
    plain: bool
    image_ids: list[str]

    def of(self, image_ids: list[str]) -> _Group:
        """The same for some of its images."""
        return _Group(self.questions, self.plain, image_ids)


@dataclass
class _Account:
    """What one command has collected, over all models."""

    n_requests: int = 0
    n_tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    odd_lines: Counter[str] = field(default_factory=Counter)

    def add(self, found: Collected) -> None:
        """Add what one look has brought."""
        self.n_requests += found.n_answers + found.failures.total()
        self.n_tokens += found.usage.input_tokens + found.usage.output_tokens
        self.failures += found.failures
        self.odd_lines += found.odd_lines

    def as_outcome(self) -> dict[str, Any]:
        """The account beside those of shards."""
        return {
            "failures": {},
            "n_from_journal": 0,
            "n_requests": self.n_requests,
            "n_tokens": self.n_tokens,
            "warnings": self.warnings(),
        }

    def warnings(self) -> list[str]:
        """For people."""
        failed = [f"{n} requests of batches ended without an answer: {c}" for c, n in sorted(self.failures.items())]
        return failed + [f"{n} lines of answer files were left out: {c}" for c, n in sorted(self.odd_lines.items())]


class JudgingInBatches:
    """The judging of one command that goes through batches: some of the models, perhaps none."""

    def __init__(self, context: Context, session: VlmSession, works: Sequence[OpenWork]) -> None:
        """Collect what has ended and send what is open; raises what `Batches` raises, and `Deferred`.

        A model whose judging no longer goes through batches is asked nothing as long as some are under way: it would
        be paid twice.
        """
        self._context = context
        self._account = _Account()
        self._witnesses: dict[int, _Witness] = {}
        for number, work in enumerate(works):
            under_way = BatchFolder(context.run.journal_dir).under_way(work.plan.settings)
            if under_way or (work.plan.settings.batch and work.n_images):
                self._witnesses[number] = _Witness(context, session, number, work, self._account)
        for witness in self._witnesses.values():
            witness.collect()
            witness.require_no_pending_unless_batched()
            witness.send_open()

    def holds(self, witness: int) -> bool:
        """Whether this model's judging goes through batches."""
        return witness in self._witnesses and self._witnesses[witness].is_batched

    def finish(self, shards: ShardRunner, judge_shard: ShardWork, bar: str) -> list[dict[str, Any]]:
        """Wait as long as allowed, then judge from the journal what has all its answers; the outcomes of shards.

        Raises `Deferred` when batches are still under way, and `BudgetReached` when a cap left something out.
        """
        try:
            self._wait()
            size = self._context.settings.flow.shard_size
            todo = [s for number, w in self._witnesses.items() if w.is_batched for s in w.shards(number, size)]
            with self._context.console.bar(bar, sum(len(shard["image_ids"]) for shard in todo)):
                outcomes = shards(self._context, judge_shard, list(todo)) if todo else []
            self._raise_if_unfinished()
        finally:
            for witness in self._witnesses.values():
                witness.batches.release()
        return [*outcomes, self._account.as_outcome()] if self._witnesses else outcomes

    def _wait(self) -> None:
        waits_s = [w.plan.settings.batch_wait_s for w in self._witnesses.values()]
        until_s = time.monotonic() + max(waits_s, default=0.0)
        pause_s = _FIRST_PAUSE_S
        while (under_way := self._under_way()) and (left_s := until_s - time.monotonic()) > 0:
            for witness in under_way:
                self._context.console.say(f"  {witness.progress()}")
            time.sleep(min(pause_s, left_s))
            has_ended = [witness.collect() for witness in under_way]
            pause_s = _FIRST_PAUSE_S if any(has_ended) else min(_MOST_PAUSE_S, pause_s * _LONGER)
            for witness in under_way:
                witness.send_more()
        for witness in self._witnesses.values():
            witness.catch_up()

    def _under_way(self) -> list[_Witness]:
        return [w for w in self._witnesses.values() if w.is_batched and w.batches.n_pending and w.n_unsettled]

    def _raise_if_unfinished(self) -> None:
        unfinished = [w for w in self._witnesses.values() if w.is_batched and w.n_unsettled]
        if not unfinished:
            return
        for warning in self._account.warnings():
            self._context.console.warn(warning)
        reached = next((w.sent.reached for w in unfinished if w.sent.reached is not None), None)
        raise _unfinished(unfinished, reached)


class _Witness:
    """One model: its batches, and how far each image is."""

    def __init__(self, context: Context, session: VlmSession, number: int, work: OpenWork, account: _Account) -> None:
        self.plan: WitnessPlan = work.plan
        self.batches = Batches(session.client(number))
        self.sent = Submitted()
        """What the last look at open images has sent."""
        self.is_batched = work.plan.settings.batch
        self._context = context
        self._session = session
        self._number = number
        self._account = account
        self._read = session.kept("reader", lambda: image_reader(context))
        self._unsettled = [_Group(questions, plain, ids) for questions, plain, ids in work.patterns()]
        self._settled: list[_Group] = []
        self._last = Collected()
        self._is_behind = False
        """Whether something was collected since the images were last looked at."""

    @property
    def n_unsettled(self) -> int:
        """Images of which an answer is under way, or still to be asked for."""
        return sum(len(group.image_ids) for group in self._unsettled)

    def collect(self) -> bool:
        """Whether a batch has ended; its answers are in the journal then."""
        found = self._session.call(lambda _: self.batches.collect(), self._number)
        self._last = found
        self._account.add(found)
        if found.n_ended:
            self._is_behind = True
            self._say(f"{found.n_ended} batches have ended: {found.n_answers} answers")
        return bool(found.n_ended)

    def require_no_pending_unless_batched(self) -> None:
        """Raise `Deferred` for batches of a model whose judging no longer goes through them."""
        if not self.is_batched and self.batches.n_pending:
            self.batches.release()
            raise Deferred(
                f"{self.batches.n_pending} batches with {self.batches.n_requests_pending} requests are still under "
                f"way at {endpoint_name(self.plan.settings)}, and vlm.batch is off: nothing is asked twice.",
                retry_after_s=_COME_BACK_S,
                remedy="Wait until they have ended, or cancel them at the provider; then give the same command again.",
            )

    def send_open(self) -> None:
        """Send what is open and not under way; images with all their answers are settled."""
        if not self.is_batched:
            return
        look = _Look(self._session.client(self._number), self.plan, self.batches, self._read)
        with self._context.console.bar("preparing batches", self.n_unsettled) as advance:
            requests = look.requests(self._unsettled, advance)
            self.sent = self._session.call(lambda _: self.batches.submit(requests), self._number)
            requests.close()
        self._settled += [g for group in self._unsettled if (g := group.of(look.settled_of(group))).image_ids]
        self._unsettled = [g for group in self._unsettled if (g := group.of(look.unsettled_of(group))).image_ids]
        self._is_behind = False
        if self.sent.n_batches:
            self._say(f"{self.sent.n_requests} requests sent in {self.sent.n_batches} batches")

    def send_more(self) -> None:
        """Send what was held back once there is room, and what the answers of the last batch have left open."""
        if self._is_behind and (self.sent.is_partial or not self.batches.n_pending):
            self.send_open()

    def catch_up(self) -> None:
        """Look at the images once more, if anything was collected since."""
        if self._is_behind:
            self.send_open()

    def progress(self) -> str:
        """How far its batches are."""
        done, n_requests = self._last.n_done_pending, self.batches.n_requests_pending
        return f"{self._name}: {self.batches.n_pending} batches under way, {done} of {n_requests} requests worked off"

    def shards(self, number: int, size: int) -> Iterator[dict[str, Any]]:
        """The settled images in shards, to be judged from the journal alone."""
        for group in self._settled:
            shared = {"witness": number, "plain": group.plain, "questions": [q.question_id for q in group.questions]}
            for i in range(0, len(group.image_ids), size):
                yield shared | {"image_ids": group.image_ids[i : i + size], "journal_only": True}

    @property
    def _name(self) -> str:
        return endpoint_name(self.plan.settings)

    def _say(self, text: str) -> None:
        self._context.console.say(f"  {self._name}: {text}")


class _Open(NamedTuple):
    """What is to be asked of one image."""

    requests: list[Asked]
    is_settled: bool
    """Whether nothing is under way either: all that will be said of it now has been said."""


class _Look:
    """One look at images: what is to be sent of each, and whether it is settled."""

    def __init__(self, client: VlmClient, plan: WitnessPlan, batches: Batches, read: PixelReader) -> None:
        self._client = client
        self._plan = plan
        self._batches = batches
        self._read = read
        self._settled: dict[int, set[str]] = {}

    @cached_property
    def _pending(self) -> PendingCells:
        return self._batches.pending_cells()

    def requests(self, groups: Sequence[_Group], advance: Callable[[int], None]) -> Generator[Asked]:
        """What is to be sent, image by image; these are read on threads, a few ahead."""
        # Indexed before the threads ask for it.
        _ = self._pending
        for group in groups:
            settled = self._settled.setdefault(id(group), set())
            asking = Asking(self._client, self._plan.framing(plain=group.plain), group.questions)
            for image_id, found in _ahead(lambda i, a=asking: self._find(i, a), group.image_ids):
                yield from found.requests
                if found.is_settled:
                    settled.add(image_id)
                advance(1)

    def settled_of(self, group: _Group) -> list[str]:
        """Its images that are settled."""
        settled = self._settled.get(id(group), set())
        return [i for i in group.image_ids if i in settled]

    def unsettled_of(self, group: _Group) -> list[str]:
        """Its images that are not, or that nobody has looked at."""
        settled = self._settled.get(id(group), set())
        return [i for i in group.image_ids if i not in settled]

    def _find(self, image_id: str, asking: Asking) -> _Open:
        try:
            image = SentImage.of(self._read(image_id), self._client.settings)
        except ImageRejected:
            # Judging will say so.
            return _Open([], is_settled=True)
        missing = list(asking.missing(image))
        asked = [(request, cells) for request, cells in missing if not self._pending.all_of(cells)]
        is_under_way = len(asked) < len(missing)
        if any(self._pending.any_of(cells) for _, cells in asked):
            # A part of it is on its way, in the company of other questions: what a question changed since.
            is_under_way = True
            rest = [q for q in asking.questions if not self._is_pending(q, image, asking)]
            asked = list(self._asking(asking, rest).missing(image)) if rest else []
        wanted = [(request, cells) for request, cells in asked if not self._batches.was_in_vain(request)]
        new: list[Asked] = [(request, cells) for request, cells in wanted if not self._batches.was_sent(request)]
        return _Open(new, is_settled=not is_under_way and not wanted)

    def _is_pending(self, question: Question, image: SentImage, asking: Asking) -> bool:
        alone = self._asking(asking, [question])
        return any(self._pending.any_of(cells) for _, cells in alone.missing(image))

    def _asking(self, asking: Asking, questions: Sequence[Question]) -> Asking:
        return Asking(self._client, asking.framing, questions)


def _ahead(work: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[T, R]]:
    """Each item and what `work` makes of it, in order, done on threads and a few items ahead."""
    pool = ThreadPoolExecutor(_THREADS, "medmicn-batch")
    under_way: deque[tuple[T, Any]] = deque()
    try:
        for item in items:
            under_way.append((item, pool.submit(work, item)))
            if len(under_way) > 2 * _THREADS:
                first, future = under_way.popleft()
                yield first, future.result()
        for item, future in under_way:
            yield item, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _unfinished(witnesses: Sequence[_Witness], reached: BudgetReached | None) -> StoppedResumable:
    """What is said at the end of a command that left something for the next one."""
    n_batches = sum(w.batches.n_pending for w in witnesses)
    n_requests = sum(w.batches.n_requests_pending for w in witnesses)
    n_images = sum(w.n_unsettled for w in witnesses)
    if n_batches:
        also = f" {reached.message}" if reached is not None else ""
        return Deferred(
            f"{n_batches} batches with {n_requests} requests are under way; each ends within 24 hours of being sent. "
            f"{n_images} images wait for an answer, all others are judged.{also}",
            retry_after_s=_COME_BACK_S,
            remedy="Give the same command again then: it collects the answers, and sends what is still open.",
        )
    if reached is not None:
        return reached
    return Deferred(
        f"{n_images} images wait for an answer: the endpoint let the batch of their requests expire, or had no room "
        "for it in its queue. Every answer so far is kept.",
        retry_after_s=_COME_BACK_S,
        remedy="Give the same command again: it sends them once more.",
    )
