"""The answers of one batch, line by line into the journal. Whatever a line holds, it does no harm."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
from pydantic import BaseModel, ValidationError

from annotation.vlm.batch_calls import CODE
from annotation.vlm.batch_files import Entry, Index
from annotation.vlm.client import Completion, VlmClient
from annotation.vlm.estimate import BATCH_PRICE
from annotation.vlm.gate import usd
from annotation.vlm.journal import Record
from annotation.vlm.schema import Usage, VlmRequest

QUEUE_FULL = "token_limit_exceeded"
"""Code of a batch that was refused because too many tokens are queued already."""

_UNTRIED = {"batch_expired", "batch_cancelled", QUEUE_FULL}
"""Codes of requests that the endpoint never began."""
_NO_COMPLETION = "no_completion"
_NO_LINE = "no_line"
_NO_REQUEST = VlmRequest("", (), "", None, 0)
"""Stands for a request that is known by its key alone: its pixels are gone."""


class Interrupted(Exception):
    """Work on a thread is no longer wanted."""


class Intake:
    """The answers of one batch on their way into the journal, and the account of its requests."""

    def __init__(self, client: VlmClient, batch_id: str, index: Index) -> None:
        """An intake of nothing yet; `index` says where answers belong."""
        self.index = index
        self.n_answers = 0
        self.usage = Usage()
        """Tokens billed for the answers."""
        self.billed_usd = 0.0
        self.lost_usd = 0.0
        """Highest price of requests that may have been billed, and whose answer cannot be read."""
        self.failures: Counter[str] = Counter()
        """Code → requests without an answer."""
        self.odd_lines: Counter[str] = Counter()
        """`garbage`, `unknown`, `duplicated` → lines that were left out."""
        self.in_vain: set[str] = set()
        """Requests that the endpoint tried, or refused, and did not answer."""
        self._client = client
        self._batch_id = batch_id
        self._open = set(index)

    def read(self, path: Path, stop: threading.Event) -> None:
        """Take in a file of answers or errors; raises `Interrupted` when told to stop, and `StorageError`."""
        with path.open("rb") as stream:
            for line in stream:
                if stop.is_set():
                    raise Interrupted
                if line.strip():
                    self._read_line(line)

    def end(self, status: str, codes: Sequence[str | None]) -> None:
        """Account for the requests of which no line spoke: the batch ended with this status and these codes."""
        told = [code for code in codes if code and CODE.fullmatch(code)] if status == "failed" else []
        code = _NO_LINE if status == "completed" else told[0] if told else f"batch_{status}"
        for custom_id in sorted(self._open):
            self._failed(custom_id, code)
        self._open.clear()

    def _read_line(self, text: bytes) -> None:
        try:
            line = _Line.model_validate_json(text)
        except ValidationError:
            self.odd_lines["garbage"] += 1
            return
        if line.custom_id not in self._open:
            self.odd_lines["duplicated" if line.custom_id in self.index else "unknown"] += 1
            return
        self._open.discard(line.custom_id)
        completion = line.completion()
        if completion is None:
            self._failed(line.custom_id, line.code())
        else:
            self._answered(completion, self.index[line.custom_id])

    def _answered(self, completion: Completion, entry: Entry) -> None:
        record = self._record(completion, entry)
        known = self._client.journal.get(entry.custom_id)
        # It is known already where a process ended between journal and state: one answer stands there once.
        if known is None or known.batch_id != self._batch_id:
            self._client.journal.put(record)
        self.n_answers += 1
        self.usage += record.usage
        self.billed_usd += record.cost_usd or 0.0

    def _record(self, completion: Completion, entry: Entry) -> Record:
        made = self._client.record_of(completion, _NO_REQUEST, entry.cells, entry.most)
        return replace(
            made,
            key=entry.custom_id,
            prompt_sha256=entry.prompt_sha256,
            seconds=0.0,
            cost_usd=None if made.cost_usd is None else BATCH_PRICE * made.cost_usd,
            batch_id=self._batch_id,
        )

    def _failed(self, custom_id: str, code: str) -> None:
        self.failures[code] += 1
        if code not in _UNTRIED:
            self.in_vain.add(custom_id)
        if code in {_NO_COMPLETION, _NO_LINE}:
            self.lost_usd += BATCH_PRICE * usd(self.index[custom_id].most, self._client.price)


class _Response(BaseModel):
    status_code: int | None = None
    body: Any = None


class _Line(BaseModel):
    """One line of an output or error file, as far as it is read."""

    custom_id: str
    response: _Response | None = None
    error: Any = None

    def completion(self) -> Completion | None:
        """The completion in it; None where there is none."""
        if self.response is None or self.response.status_code != httpx2.codes.OK:
            return None
        try:
            return Completion.model_validate(self.response.body)
        except ValidationError:
            return None

    def code(self) -> str:
        """Why there is no completion, as a short name."""
        response = self.response or _Response()
        if response.status_code == httpx2.codes.OK:
            return _NO_COMPLETION
        in_body = response.body.get("error") if isinstance(response.body, dict) else None
        for told in (self.error, in_body):
            for name in (told.get("code"), told.get("type")) if isinstance(told, dict) else ():
                if isinstance(name, str) and CODE.fullmatch(name):
                    return name
        return "no_reason" if response.status_code is None else f"http_{response.status_code}"
