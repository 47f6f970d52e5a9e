"""Blind judgements: every concept of the vocabulary in every image, one request an image."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from annotation.prompts import judging_request
from annotation.vlm.client import VlmAnswer, VlmClient
from annotation.vlm.schema import Usage, Verdict, VlmRequest, parse_judgements
from data_contracts.concepts import Vocabulary
from data_contracts.errors import ImageRejected
from data_contracts.pixels import encode
from data_contracts.ports import Advance, PixelReader, ignore_progress
from data_contracts.tables import JUDGEMENTS, State, Witness

Rows = list[dict[str, Any]]


@dataclass
class Judged:
    """What came of judging some images."""

    judgements: pd.DataFrame
    """Rows of the ledger: one per image and concept; images that could not be read have none."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """(image id, reason code) of every image without a usable answer."""
    n_from_journal: int = 0
    """Images for which nothing had to be sent."""
    n_requests: int = 0
    """Requests that were sent."""
    usage: Usage = field(default_factory=Usage)
    """Tokens billed now."""


async def judge(
    image_ids: Iterable[str],
    vocabulary: Vocabulary,
    read: PixelReader,
    client: VlmClient,
    modality: str,
    *,
    advance: Advance = ignore_progress,
    on_answer: Callable[[pd.DataFrame], None] | None = None,
) -> Judged:
    """Judgements of all images, in the order of `image_ids`.

    Only `concurrency` images are in memory at once. The question never holds a label, a class or a file name. An
    unusable answer leaves its image `not_assessed`, with the reason as evidence. `on_answer` gets each image's rows
    as they come. Raises what `VlmClient.ask` raises; what was answered until then is in the journal.
    """
    shown = tuple(image_ids)
    task = _Task(vocabulary, read, client, modality, advance, on_answer)
    await task.run(enumerate(shown))
    frames = [rows for _, rows in sorted(task.rows.items())]
    return Judged(_frame(frames), sorted(task.failures), task.n_from_journal, task.n_requests, task.usage)


@dataclass
class _Task:
    vocabulary: Vocabulary
    read: PixelReader
    client: VlmClient
    modality: str
    advance: Advance
    on_answer: Callable[[pd.DataFrame], None] | None
    rows: dict[int, Rows] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    n_from_journal: int = 0
    n_requests: int = 0
    usage: Usage = field(default_factory=Usage)

    async def run(self, numbered: Iterator[tuple[int, str]]) -> None:
        """Judge everything with as many workers as requests may be in flight; the first error stops all of them."""
        n_workers = self.client.settings.concurrency
        workers = [asyncio.create_task(self._work(numbered)) for _ in range(n_workers)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, numbered: Iterator[tuple[int, str]]) -> None:
        for number, image_id in numbered:
            await self._judge_one(number, image_id)
            self.advance(1)

    async def _judge_one(self, number: int, image_id: str) -> None:
        try:
            request = await asyncio.to_thread(self._request, image_id)
        except ImageRejected as error:
            self.failures.append((image_id, error.reason.value))
            return
        answer = await self.client.ask(request, lambda text: parse_judgements(text, self.vocabulary.ids))
        self.n_requests += answer.n_requests
        self.n_from_journal += answer.from_journal
        self.usage += answer.usage
        if answer.fault is not None:
            self.failures.append((image_id, answer.fault.value))
        self.rows[number] = _rows(image_id, self.vocabulary, request, answer, self.client.settings.model)
        if self.on_answer is not None:
            self.on_answer(_frame([self.rows[number]]))

    def _request(self, image_id: str) -> VlmRequest:
        settings = self.client.settings
        image = encode(self.read(image_id), settings.side_px, settings.image_format)
        return judging_request(image, self.vocabulary, self.modality, settings.max_output_tokens)


def _rows(
    image_id: str,
    vocabulary: Vocabulary,
    request: VlmRequest,
    answer: VlmAnswer[dict[str, Verdict]],
    model: str,
) -> Rows:
    nothing = Verdict(State.NOT_ASSESSED, evidence=answer.fault.value if answer.fault else None)
    record = answer.record
    return [
        {
            "image_id": image_id,
            "concept_id": concept_id,
            "witness": Witness.VLM.value,
            "witness_model": model,
            "prompt_sha256": request.prompt_sha256,
            "state": verdict.state.value,
            "probability": verdict.probability,
            "evidence": verdict.evidence,
            "request_id": record.request_id if record else None,
            "created_at": record.created if record else pd.Timestamp.now("UTC"),
            "supersedes": None,
        }
        for concept_id in vocabulary.ids
        for verdict in [(answer.value or {}).get(concept_id, nothing)]
    ]


def _frame(images: Sequence[Rows]) -> pd.DataFrame:
    if not images:
        return JUDGEMENTS.empty()
    frame = pd.DataFrame([row for rows in images for row in rows], columns=JUDGEMENTS.column_names)
    frame["created_at"] = pd.to_datetime(frame["created_at"], utc=True)
    frame["probability"] = frame["probability"].astype("float64")
    return frame
