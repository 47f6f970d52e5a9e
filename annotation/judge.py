"""Blind judgements: every question about every image, one request an image as far as they fit into one."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pandas as pd

from annotation.prompts import Framing, asked_sha256, judging_request, yes_no_request
from annotation.vlm.client import VlmClient, is_asked_once_more, usable_text, with_more_room
from annotation.vlm.journal import Record
from annotation.vlm.questions import Question, in_chunks
from annotation.vlm.schema import (
    UNDECIDED,
    AnswerFault,
    FaultCode,
    Usage,
    Verdict,
    VlmRequest,
    parse_judgements,
    sha256_of,
    verdict_of_yes_no,
)
from annotation.vlm.settings import JPEG_QUALITY, VlmSettings
from data_contracts.errors import ImageRejected, MedMicnError
from data_contracts.pixels import encode, shrink
from data_contracts.ports import Advance, PixelReader, Pixels, ignore_progress
from data_contracts.tables import JUDGEMENTS, ProbabilitySource, State, Witness

Rows = list[dict[str, Any]]

_NOTING_DOWN_S = 1.0
_VALUE = {State.PRESENT: 1.0, State.ABSENT: 0.0, State.UNCERTAIN: 0.5}


@dataclass
class Judged:
    """What came of judging some images."""

    judgements: pd.DataFrame
    """Rows of the ledger: one per image and concept; images that could not be read have none."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """(image id, reason code) of every image with a question that has no usable answer."""
    n_from_journal: int = 0
    """Images for which nothing had to be sent."""
    n_requests: int = 0
    """Requests that were sent."""
    usage: Usage = field(default_factory=Usage)
    """Tokens billed now."""


async def judge(
    image_ids: Iterable[str],
    questions: Sequence[Question],
    read: PixelReader,
    client: VlmClient,
    framing: Framing,
    *,
    advance: Advance = ignore_progress,
    journal_only: bool = False,
    keep: Callable[[pd.DataFrame], object] | None = None,
) -> Judged:
    """Judgements of all images, in the order of `image_ids`.

    Only `concurrency` images are in memory at once. The question never holds a label, a class or a file name. What
    the journal knows is not asked again; a question whose answer is unusable is asked once more, alone with others
    of its kind, and then left `not_assessed` with the reason as evidence. With `journal_only` nothing is sent. Raises
    what `VlmClient.send` raises, after what was sent has been answered and journalled; `keep` then gets the rows of
    the images that were judged until there.
    """
    task = _Task(questions, read, client, framing, advance, journal_only)
    try:
        await task.run(enumerate(image_ids))
    except MedMicnError:
        if keep is not None:
            keep(task.frame())
        raise
    return Judged(task.frame(), sorted(task.failures), task.n_from_journal, task.n_requests, task.usage)


@dataclass(frozen=True)
class SentImage:
    """An image as it leaves: its pixels at the configured size, encoded only when something is asked."""

    pixels: Pixels
    settings: VlmSettings

    @classmethod
    def of(cls, pixels: Pixels, settings: VlmSettings) -> SentImage:
        """The image at the size that is sent."""
        return cls(shrink(pixels, settings.side_px), settings)

    @cached_property
    def sha256(self) -> str:
        """Hash of the pixels; the same image encoded by another version of a library is still the same."""
        digest = hashlib.sha256(str(self.pixels.shape).encode())
        digest.update(self.pixels.tobytes())
        return digest.hexdigest()

    def encode(self) -> None:
        """Make `encoded` now: it takes a while."""
        _ = self.encoded

    @cached_property
    def encoded(self) -> bytes:
        """Fresh bytes without any metadata."""
        return encode(self.pixels, self.settings.side_px, self.settings.encoding, jpeg_quality=JPEG_QUALITY)


@dataclass(frozen=True, eq=False)
class _Ask:
    """The smallest thing with an answer of its own: one question, or one concept of it (log-probabilities)."""

    question: Question
    concept_ids: tuple[str, ...]
    sample: int

    def cell(self, image: SentImage, asked: str, attempt: int) -> str:
        """The journal's name of the answer."""
        return sha256_of([image.sha256, asked, self.concept_ids, self.sample, attempt])


@dataclass
class _Found:
    """What is known about one `_Ask`."""

    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    record: Record | None = None
    fault: FaultCode | None = None

    @property
    def code(self) -> FaultCode | None:
        """Why there is no usable verdict; None where there is one."""
        if self.fault is not None:
            return self.fault
        lacks = any(v.state is State.NOT_ASSESSED for v in self.verdicts.values()) or not self.verdicts
        return FaultCode.WRONG_SCHEMA if lacks else None


class Asking:
    """Asks one endpoint a fixed set of questions about one image after the other."""

    def __init__(self, client: VlmClient, framing: Framing, questions: Sequence[Question]) -> None:
        self.client = client
        self.framing = framing
        self.questions = tuple(questions)
        settings = client.settings
        self.asked = {q.question_id: asked_sha256(q, framing, settings.judging_parameters) for q in questions}
        # One answer is the same answer however many are asked for.
        self._of_one_answer = {q.question_id: asked_sha256(q, framing, settings.parameters) for q in questions}
        self._by_logprobs = client.settings.probability == "logprobs"
        self._asks = tuple(self._all_asks())

    async def answer(
        self, image: SentImage, *, journal_only: bool
    ) -> tuple[dict[_Ask, _Found], list[Record | FaultCode]]:
        """What is known of every ask afterwards, and what came of each request that had to be sent."""
        found: dict[_Ask, _Found] = {}
        sent: list[Record | FaultCode] = []
        open_asks = self._asks
        for attempt in (0, 1):
            known = self._known(image, open_asks, attempt)
            found |= known
            for group in self._in_requests([a for a in open_asks if a not in known]):
                if journal_only:
                    found |= {ask: _Found(fault=FaultCode.NOT_ANSWERED) for ask in group}
                    continue
                cells = [self._cell(ask, image, attempt) for ask in group]
                await asyncio.to_thread(image.encode)
                record = await self.client.send(self._request(image, group, attempt), cells)
                sent.append(record)
                if isinstance(record, Record):
                    found |= self._read(record, group)
                else:
                    found |= {ask: _Found(fault=record) for ask in group}
            # A fault without a record was no answer at all: the openai client has repeated it as often as it may.
            open_asks = tuple(
                a for a in open_asks if found[a].record and (code := found[a].code) and is_asked_once_more(code)
            )
        return found, sent

    def missing(self, image: SentImage) -> Iterator[tuple[VlmRequest, list[str]]]:
        """The requests that would be sent now, with their cells."""
        open_asks = self._asks
        for attempt in (0, 1):
            known = self._known(image, open_asks, attempt)
            for group in self._in_requests([a for a in open_asks if a not in known]):
                cells = [self._cell(ask, image, attempt) for ask in group]
                yield self._request(image, group, attempt), cells
            open_asks = tuple(a for a, f in known.items() if (code := f.code) and is_asked_once_more(code))

    def verdicts(self, found: Mapping[_Ask, _Found]) -> dict[str, tuple[Verdict, _Found]]:
        """Concept id → its verdict and where it came from."""
        result: dict[str, tuple[Verdict, _Found]] = {}
        for question in self.questions:
            mine = {ask: f for ask, f in found.items() if ask.question is question}
            for concept_id in question.concept_ids:
                answers = [(f.verdicts[concept_id], f) for ask, f in mine.items() if concept_id in f.verdicts]
                lacking = next((f for ask, f in mine.items() if concept_id in ask.concept_ids and f.code), None)
                result[concept_id] = _agreed(answers, lacking, self.client.settings)
            is_one_answer = not self._by_logprobs and self.client.settings.samples == 1
            if question.attribute is not None and not is_one_answer:
                result |= _as_exclusive({c: result[c] for c in question.concept_ids})
        return result

    def _all_asks(self) -> Iterator[_Ask]:
        for question in self.questions:
            if self._by_logprobs:
                yield from (_Ask(question, (concept_id,), 0) for concept_id in question.concept_ids)
            else:
                yield from (_Ask(question, question.concept_ids, k) for k in range(self.client.settings.samples))

    def _cell(self, ask: _Ask, image: SentImage, attempt: int) -> str:
        return ask.cell(image, self._of_one_answer[ask.question.question_id], attempt)

    def _known(self, image: SentImage, asks: Sequence[_Ask], attempt: int) -> dict[_Ask, _Found]:
        cells = {ask: self._cell(ask, image, attempt) for ask in asks}
        records = self.client.journal.find(cells.values())
        groups: dict[str, list[_Ask]] = {}
        for ask, cell in cells.items():
            if cell in records:
                groups.setdefault(records[cell].key, []).append(ask)
        by_key = {record.key: record for record in records.values()}
        return {a: f for key, group in groups.items() for a, f in self._read(by_key[key], group).items()}

    def _in_requests(self, asks: Sequence[_Ask]) -> Iterator[tuple[_Ask, ...]]:
        """Asks that go into one request: all questions of one sample up to the limit; one word is one request."""
        if self._by_logprobs:
            yield from ((ask,) for ask in asks)
            return
        for sample in sorted({ask.sample for ask in asks}):
            mine = {a.question.question_id: a for a in asks if a.sample == sample}
            questions = [a.question for a in mine.values()]
            for chunk in in_chunks(questions, self.client.settings.concepts_per_request):
                yield tuple(mine[q.question_id] for q in chunk)

    def _request(self, image: SentImage, group: Sequence[_Ask], attempt: int) -> VlmRequest:
        if self._by_logprobs:
            (ask,) = group
            concept = next(c for c in ask.question.concepts if c.concept_id == ask.concept_ids[0])
            return yes_no_request(image.encoded, concept, self.framing)
        limit = self.client.settings.max_output_tokens
        request = judging_request(image.encoded, [a.question for a in group], self.framing, limit)
        return replace(with_more_room(request, attempt), sample=group[0].sample)

    def _read(self, record: Record, group: Sequence[_Ask]) -> dict[_Ask, _Found]:
        try:
            if self._by_logprobs:
                (ask,) = group
                usable_text(record)
                verdict = verdict_of_yes_no(record.top_logprobs)
                return {ask: _Found({ask.concept_ids[0]: verdict}, record)}
            verdicts = parse_judgements(usable_text(record), [a.question for a in group])
        except AnswerFault as fault:
            return {ask: _Found(record=record, fault=fault.code) for ask in group}
        return {a: _Found({c: verdicts[c] for c in a.concept_ids}, record) for a in group}


@dataclass
class _Task:
    questions: Sequence[Question]
    read: PixelReader
    client: VlmClient
    framing: Framing
    advance: Advance
    journal_only: bool
    rows: dict[int, Rows] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    n_from_journal: int = 0
    n_requests: int = 0
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        self._asking = Asking(self.client, self.framing, self.questions)

    async def run(self, numbered: Iterator[tuple[int, str]]) -> None:
        """Judge everything with as many workers as requests may be in flight; the first error stops all of them."""
        n_workers = self.client.settings.concurrency
        workers = [asyncio.create_task(self._work(numbered)) for _ in range(n_workers)]
        try:
            await asyncio.gather(*workers)
        except MedMicnError as error:
            await self.client.finish_sent(error)
            # One more turn for each of them to note down what came.
            await asyncio.wait(workers, timeout=_NOTING_DOWN_S)
            raise
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    def frame(self) -> pd.DataFrame:
        """The ledger's rows so far, images in order."""
        return _frame([rows for _, rows in sorted(self.rows.items())])

    async def _work(self, numbered: Iterator[tuple[int, str]]) -> None:
        for number, image_id in numbered:
            await self._judge_one(number, image_id)
            self.advance(1)

    async def _judge_one(self, number: int, image_id: str) -> None:
        try:
            image = await asyncio.to_thread(self._prepared, image_id)
        except ImageRejected as error:
            self.failures.append((image_id, error.reason.value))
            return
        found, sent = await self._asking.answer(image, journal_only=self.journal_only)
        self.n_requests += len(sent)
        self.n_from_journal += not sent
        self.usage = sum((answer.usage for answer in sent if isinstance(answer, Record)), self.usage)
        verdicts = self._asking.verdicts(found)
        codes = [v.evidence for v, _ in verdicts.values() if v.state is State.NOT_ASSESSED]
        if codes:
            self.failures.append((image_id, str(codes[0])))
        self.rows[number] = self._ledger_rows(image_id, verdicts)

    def _prepared(self, image_id: str) -> SentImage:
        image = SentImage.of(self.read(image_id), self.client.settings)
        # Hashed here, on a thread, and not while others wait on the event loop.
        _ = image.sha256
        return image

    def _ledger_rows(self, image_id: str, verdicts: Mapping[str, tuple[Verdict, _Found]]) -> Rows:
        asked = {c: self._asking.asked[q.question_id] for q in self.questions for c in q.concept_ids}
        return [
            {
                "image_id": image_id,
                "concept_id": concept_id,
                "witness": Witness.VLM.value,
                "witness_model": self.client.settings.model,
                "prompt_sha256": asked[concept_id],
                "state": verdict.state.value,
                "probability": verdict.probability,
                "evidence": verdict.evidence,
                "request_id": found.record.request_id if found.record else None,
                "created_at": found.record.created if found.record else pd.Timestamp.now("UTC"),
                "supersedes": None,
                "probability_source": verdict.source.value if verdict.source else None,
            }
            for concept_id, (verdict, found) in verdicts.items()
            # What is still on its way in a batch is no judgement yet.
            if found.fault is not FaultCode.NOT_ANSWERED
        ]


def _agreed(
    answers: Sequence[tuple[Verdict, _Found]], lacking: _Found | None, settings: VlmSettings
) -> tuple[Verdict, _Found]:
    """One verdict of one or several answers to the same question."""
    usable = [(v, f) for v, f in answers if v.state is not State.NOT_ASSESSED]
    if not usable:
        nothing = lacking or _Found(fault=FaultCode.WRONG_SCHEMA)
        return Verdict(State.NOT_ASSESSED, evidence=(nothing.code or FaultCode.WRONG_SCHEMA).value), nothing
    verdict, found = usable[0]
    if settings.samples > 1:
        share = sum(_VALUE[v.state] for v, _ in usable) / len(usable)
        state = State.PRESENT if share > 0.5 else State.ABSENT if share < 0.5 else State.UNCERTAIN
        verdict, found = next(((v, f) for v, f in usable if v.state is state), usable[0])
        return Verdict(state, share, verdict.evidence, ProbabilitySource.SAMPLES), found
    if settings.is_embedded and verdict.source is ProbabilitySource.STATED:
        verdict = replace(verdict, source=ProbabilitySource.MEASURED)
    return verdict, found


def _as_exclusive(verdicts: Mapping[str, tuple[Verdict, _Found]]) -> dict[str, tuple[Verdict, _Found]]:
    """Verdicts on values that exclude each other: together at most 1, and at most one of them present."""
    total = sum(v.probability or 0.0 for v, _ in verdicts.values())
    if total <= 1:
        return dict(verdicts)
    best = max(verdicts, key=lambda c: verdicts[c][0].probability or 0.0)
    return {c: (_beside(v, total, is_best=c == best), f) for c, (v, f) in verdicts.items()}


def _beside(verdict: Verdict, total: float, *, is_best: bool) -> Verdict:
    """The verdict with its part of the whole; its state is what that part says."""
    if verdict.probability is None:
        return verdict
    part = verdict.probability / total
    low, high = UNDECIDED
    state = State.PRESENT if is_best and part > high else State.ABSENT if part < low else State.UNCERTAIN
    return replace(verdict, probability=part, state=state)


def _frame(images: Sequence[Rows]) -> pd.DataFrame:
    if not images:
        return JUDGEMENTS.empty()
    frame = pd.DataFrame([row for rows in images for row in rows], columns=JUDGEMENTS.column_names)
    frame["created_at"] = pd.to_datetime(frame["created_at"], utc=True)
    frame["probability"] = frame["probability"].astype("float64")
    return frame
