"""Files and batches."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .completion import Manner
from .faults import Hit
from .names import CHAT, DAY_S, MAX_BATCH_LINES, JsonObject
from .question import Refused
from .wire import HttpRequest, Reply
from .witness import chance


@dataclass(frozen=True)
class StoredFile:
    """A file that was uploaded or made."""

    file_id: str
    data: bytes = field(repr=False)
    name: str
    purpose: str
    created_at: int

    def as_json(self) -> JsonObject:
        """The file as the protocol describes it."""
        return {
            "id": self.file_id,
            "object": "file",
            "bytes": len(self.data),
            "created_at": self.created_at,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


@dataclass
class Batch:
    """One batch and how far it is."""

    batch_id: str
    number: int
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: JsonObject | None
    created_at: int
    failed: Hit | None
    expired: Hit | None
    status: str = "validating"
    errors: list[JsonObject] = field(default_factory=list)
    times: dict[str, int] = field(default_factory=dict)
    """Status → when it was reached."""
    n_total: int = 0
    done: list[JsonObject] = field(default_factory=list)
    lost: list[JsonObject] = field(default_factory=list)
    output_file_id: str | None = None
    error_file_id: str | None = None
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def reach(self, status: str) -> None:
        """Set the status and note the time."""
        self.status = status
        self.times[status] = int(time.time())

    def as_json(self) -> JsonObject:
        """The batch as the protocol describes it."""
        moments = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        return {
            "id": self.batch_id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.created_at + DAY_S,
            **{f"{moment}_at": self.times.get(moment) for moment in moments},
            "request_counts": {"total": self.n_total, "completed": len(self.done), "failed": len(self.lost)},
            "metadata": self.metadata,
        }


AnswerLine: TypeAlias = Callable[[Mapping[str, Any], str], Reply]
"""Body and path of one line → the response."""


class BatchDesk:
    """Files and batches, worked off in the background."""

    def __init__(self, manner: Manner, answer_line: AnswerLine) -> None:
        """An empty desk whose lines are answered by `answer_line`."""
        self.files: dict[str, StoredFile] = {}
        self.batches: dict[str, Batch] = {}
        self._manner = manner
        self._answer_line = answer_line
        self._tasks: set[asyncio.Task[None]] = set()

    def store(self, data: bytes, name: str, purpose: str) -> StoredFile:
        """Keep a file."""
        file = StoredFile(f"file-{os.urandom(9).hex()}", data, name, purpose, int(time.time()))
        self.files[file.file_id] = file
        return file

    def upload(self, request: HttpRequest) -> StoredFile:
        """Keep the file of a multipart upload; raises `Refused`."""
        fields = _multipart(request)
        purpose = fields.get("purpose", ("", b""))[1].decode()
        if "file" not in fields or purpose != "batch":
            message = f"Expected a field file and purpose=batch, got {sorted(fields)} and {purpose!r}."
            raise Refused(400, message, "invalid_request_error")
        name, data = fields["file"]
        return self.store(data, name, purpose)

    def file(self, file_id: str) -> StoredFile:
        """A stored file; raises `Refused`."""
        if file_id not in self.files:
            raise Refused(404, f"No such File object: {file_id}", "invalid_request_error")
        return self.files[file_id]

    def batch(self, batch_id: str) -> Batch:
        """A batch; raises `Refused`."""
        if batch_id not in self.batches:
            raise Refused(404, f"No batch found with id '{batch_id}'.", "invalid_request_error")
        return self.batches[batch_id]

    def create(self, asked: Mapping[str, Any], failed: Hit | None, expired: Hit | None) -> Batch:
        """A new batch, which starts by itself; raises `Refused`."""
        file_id = str(asked.get("input_file_id"))
        if asked.get("endpoint") != CHAT or asked.get("completion_window") != "24h":
            message = f"Expected endpoint {CHAT} and completion_window 24h."
            raise Refused(400, message, "invalid_request_error")
        data = self.file(file_id).data
        batch = Batch(
            batch_id=f"batch_{os.urandom(9).hex()}",
            number=len(self.batches),
            endpoint=CHAT,
            input_file_id=file_id,
            completion_window="24h",
            metadata=asked.get("metadata"),
            created_at=int(time.time()),
            failed=failed,
            expired=expired,
        )
        self.batches[batch.batch_id] = batch
        task = asyncio.get_running_loop().create_task(self._work(batch, data))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return batch

    def cancel(self, batch_id: str) -> Batch:
        """A batch that stops, keeping what is done; raises `Refused`."""
        batch = self.batch(batch_id)
        if batch.status not in {"validating", "in_progress", "cancelling"}:
            raise Refused(409, f"Cannot cancel a batch with status '{batch.status}'.", "invalid_request_error")
        batch.reach("cancelling")
        batch.cancelled.set()
        return batch

    def page(self, limit: int, after: str | None) -> JsonObject:
        """The batches after a given one, newest first."""
        newest = list(reversed(self.batches))
        start = newest.index(after) + 1 if after in newest else 0
        ids = newest[start : start + limit]
        return {
            "object": "list",
            "data": [self.batches[i].as_json() for i in ids],
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
            "has_more": start + limit < len(newest),
        }

    async def _work(self, batch: Batch, data: bytes) -> None:
        seconds = self._manner.batch_seconds
        await _passed(batch.cancelled, seconds * 0.2)
        lines, batch.errors = _read_lines(data)
        if batch.failed is not None:
            batch.errors = [_line_error("simulated", "The batch failed as it was told to.", None)]
        if batch.errors:
            batch.reach("failed")
            return
        batch.n_total = len(lines)
        if not batch.cancelled.is_set():
            batch.reach("in_progress")
            n_done = len(lines) if batch.expired is None else int(batch.expired.options["done_share"] * len(lines))
            await self._answer_lines(batch, lines[:n_done], seconds * 0.8)
        self._finish(batch, lines)

    async def _answer_lines(self, batch: Batch, lines: Sequence[JsonObject], seconds: float) -> None:
        started = time.monotonic()
        for n, line in enumerate(lines, 1):
            row = self._row(batch, n, line)
            (batch.done if row["response"]["status_code"] == 200 else batch.lost).append(row)
            # Spread over the time; at least one turn of the loop, so that other requests are not held up.
            await _passed(batch.cancelled, started + seconds * n / len(lines) - time.monotonic())
            if batch.cancelled.is_set():
                return
        if not lines:
            await _passed(batch.cancelled, seconds)

    def _row(self, batch: Batch, n: int, line: JsonObject) -> JsonObject:
        """One line of the output or error file."""
        draw = chance(self._manner.seed, "batch-line", batch.number, n)
        if draw < self._manner.batch_failure_share:
            transient = chance("transient", draw) < 0.5
            status, kind = (500, "server_error") if transient else (400, "invalid_request_error")
            content = Refused(status, "This line failed as it was told to.", kind).body
        else:
            response = self._answer_line(line["body"], line["url"])
            status, content = response.status, json.loads(response.body)
        answered = {"status_code": status, "request_id": f"req_{os.urandom(9).hex()}", "body": content}
        row_id = f"batch_req_{os.urandom(9).hex()}"
        return {"id": row_id, "custom_id": line["custom_id"], "response": answered, "error": None}

    def _finish(self, batch: Batch, lines: Sequence[JsonObject]) -> None:
        """Write the files and set the last status."""
        end = "cancelled" if batch.cancelled.is_set() else "completed" if batch.expired is None else "expired"
        if end != "completed":
            known = {row["custom_id"] for row in (*batch.done, *batch.lost)}
            message = f"This request could not be executed: the batch is {end}."
            error = {"code": f"batch_{end}", "message": message}
            rest = [line["custom_id"] for line in lines if line["custom_id"] not in known]
            batch.lost += [
                {"id": f"batch_req_{os.urandom(9).hex()}", "custom_id": c, "response": None, "error": error}
                for c in rest
            ]
        # The order of the output is nobody's promise.
        batch.done.sort(key=lambda row: chance(self._manner.seed, row["custom_id"]))
        if batch.done:
            batch.output_file_id = self._store_rows(batch.done, f"{batch.batch_id}_output.jsonl")
        if batch.lost:
            batch.error_file_id = self._store_rows(batch.lost, f"{batch.batch_id}_error.jsonl")
        batch.reach("finalizing")
        batch.reach(end)

    def _store_rows(self, rows: Sequence[JsonObject], name: str) -> str:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        return self.store(data, name, "batch_output").file_id


async def _passed(event: asyncio.Event, seconds: float) -> None:
    """Wait for so long, or until the event."""
    try:
        await asyncio.wait_for(event.wait(), max(seconds, 0.0))
    except TimeoutError:
        await asyncio.sleep(0)


def _read_lines(data: bytes) -> tuple[list[JsonObject], list[JsonObject]]:
    """The requests of an input file, and what is wrong with them."""
    lines: list[JsonObject] = []
    errors: list[JsonObject] = []
    seen: set[str] = set()
    for number, text in enumerate(data.splitlines(), 1):
        if not text.strip():
            continue
        line, wrong = _read_line(text)
        if wrong is None and line["custom_id"] in seen:
            wrong = _line_error("duplicate_custom_id", f"The custom_id {line['custom_id']!r} came before.", number)
        if wrong is not None:
            errors.append({**wrong, "line": number})
            continue
        seen.add(line["custom_id"])
        lines.append(line)
    if not lines and not errors:
        errors.append(_line_error("empty_file", "The input file is empty.", None))
    if len(lines) > MAX_BATCH_LINES:
        errors.append(_line_error("too_many_tasks", f"Expected at most {MAX_BATCH_LINES} lines.", None))
    if len({line["body"].get("model") for line in lines}) > 1:
        errors.append(_line_error("mismatched_model", "All lines of a batch must name the same model.", None))
    return lines, errors


def _read_line(text: bytes) -> tuple[JsonObject, JsonObject | None]:
    try:
        line = json.loads(text)
        expected = {"custom_id": str, "method": str, "url": str, "body": dict}
        if not all(isinstance(line[key], kind) for key, kind in expected.items()):
            raise ValueError("a field has the wrong type")
    except (ValueError, KeyError, TypeError) as error:
        return {}, _line_error("invalid_json_line", f"The line is no request: {error!r}.", None)
    if line["method"] != "POST" or line["url"] != CHAT:
        return {}, _line_error("invalid_url", f"Expected POST {CHAT}, got {line['method']} {line['url']}.", None)
    return line, None


def _line_error(code: str, message: str, number: int | None) -> JsonObject:
    return {"code": code, "message": message, "param": None, "line": number}


def _multipart(request: HttpRequest) -> dict[str, tuple[str, bytes]]:
    """Field name → file name and content of a multipart form."""
    found = re.search(r"boundary=\"?([^\";]+)", request.headers.get("content-type", ""))
    fields: dict[str, tuple[str, bytes]] = {}
    for part in request.body.split(b"--" + found.group(1).encode())[1:-1] if found else ():
        head, _, content = part.partition(b"\r\n\r\n")
        words = head.decode("utf-8", "replace")
        name, filename = (re.search(rf"[; ]{key}=\"([^\"]*)\"", words) for key in ("name", "filename"))
        if name is not None:
            fields[name.group(1)] = (filename.group(1) if filename else "", content.removesuffix(b"\r\n"))
    return fields
