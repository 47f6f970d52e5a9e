"""The journal: every answer of a vision-language model, as it came, found again by the content of its question.

A journal is a folder of append-only segments, one line of JSON a record, each with a checksum. Each writer has a
segment of its own, so processes never write into each other's lines, and a killed writer can leave at most one torn
line, its last. A record is found by its request and by every cell (image and question) that it answers. Only the
places of records are kept in memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
import uuid
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from annotation.vlm.schema import Usage
from data_contracts.errors import StorageError
from data_contracts.files import storage_error

MIN_FREE_BYTES = 64 * 2**20
"""With less room on the disk nothing more is sent: an answer that cannot be kept must not be paid for."""

_SYNC_EVERY_S = 0.5
_SETTLE_AT = 50_000
_LARGEST_64_BIT_PRIME = 2**64 - 59
_CHECK = re.compile(rb', "crc32": "([0-9a-f]{8})"\}\n\Z')
_NAMES = re.compile(rb'\{"key": "([0-9a-f]{64})", "cells": \[([0-9a-f", ]*)\], ')


@dataclass(frozen=True)
class Record:
    """One answer as it came."""

    key: str
    """Hash of the whole request: words, images, schema, model and parameters (hex sha256)."""
    cells: tuple[str, ...] = field(repr=False)
    """Hashes of what it answers, one per question of one image (hex sha256); empty for other requests."""
    prompt_sha256: str
    """Hash of the request without its images."""
    model: str
    """Model name as asked for."""
    text: str | None
    """The answer's raw text."""
    refusal: str | None
    """The endpoint's refusal, if it refused."""
    finish_reason: str | None
    """Why the answer ended (`stop`, `length`, …)."""
    request_id: str | None
    """The endpoint's name of the answer."""
    input_tokens: int
    """Tokens billed for the question; as many as it may have had where the endpoint does not say."""
    output_tokens: int
    """Tokens billed for the answer."""
    created_at: str
    """When it came, UTC, ISO 8601."""
    seconds: float = 0.0
    """Time from sending to the whole answer; 0 for batches."""
    cost_usd: float | None = None
    """Price at the rates known then; None where none were known."""
    top_logprobs: tuple[tuple[str, float], ...] = ()
    """Candidates for the first token, where they were asked for."""
    batch_id: str | None = None
    """The batch it came in, if it did."""
    is_counted: bool = True
    """Whether the endpoint told the tokens; else they are the most that it may have had."""

    @property
    def usage(self) -> Usage:
        """Its tokens."""
        return Usage(self.input_tokens, self.output_tokens)

    @property
    def created(self) -> datetime:
        """When it came."""
        return datetime.fromisoformat(self.created_at)


@dataclass(frozen=True)
class Damage:
    """A line that cannot be read."""

    segment: str
    line: int
    """Number of the line, from 1."""
    is_torn_end: bool
    """Whether it is the unfinished last line of its segment, as a kill leaves it."""


def utc_now() -> str:
    """The present moment, UTC, ISO 8601, as records carry it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


class Journal:
    """The records of one folder. Safe for several threads; several processes may each hold one on one folder."""

    def __init__(self, folder: Path) -> None:
        """Index what is there; the folder itself is only made by the first record."""
        self.folder = folder
        self._index = _Index()
        self._read_to: dict[Path, tuple[int, int]] = {}
        self._broken: list[Damage] = []
        self._torn_ends: dict[Path, Damage] = {}
        self._lock = threading.RLock()
        self._segment: Path | None = None
        self._descriptor: int | None = None
        self._synced_at_s = 0.0
        self._room_seen_at_s = 0.0
        self.refresh()

    def __len__(self) -> int:
        """Number of different requests that have an answer."""
        with self._lock:
            return len(self._index.by_request)

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def __iter__(self) -> Iterator[Record]:
        """The standing record of every request, in the order in which they were written."""
        with self._lock:
            numbers = self._index.by_request.numbers()
        for number in numbers:
            yield self._read(*self._index.place(number))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def n_cells(self) -> int:
        """Number of different cells that have an answer."""
        with self._lock:
            return len(self._index.by_cell)

    @property
    def n_lines(self) -> int:
        """Number of readable records, those that later ones replaced included."""
        return len(self._index.offsets)

    @property
    def damage(self) -> list[Damage]:
        """Lines that cannot be read: torn by a kill, or damaged."""
        return [*self._broken, *self._torn_ends.values()]

    @property
    def n_torn(self) -> int:
        """How many lines cannot be read."""
        return len(self._broken) + len(self._torn_ends)

    def refresh(self) -> None:
        """Take in what other processes have added since."""
        with self._lock:
            for segment in sorted(self.folder.glob("*.jsonl")):
                if segment != self._segment:
                    self._take_in(segment)

    def get(self, key: str) -> Record | None:
        """The answer to the request with this key, or None."""
        with self._lock:
            number = self._index.by_request.get(_short(key))
        record = None if number is None else self._read(*self._index.place(number))
        return record if record is not None and record.key == key else None

    def find(self, cells: Iterable[str]) -> dict[str, Record]:
        """The last answer that decides each of these cells, where there is one; each record is read once."""
        with self._lock:
            numbers = {cell: self._index.by_cell.get(_short(cell)) for cell in cells}
        known = {cell: number for cell, number in numbers.items() if number is not None}
        records = {number: self._read(*self._index.place(number)) for number in set(known.values())}
        return {cell: records[number] for cell, number in known.items() if cell in records[number].cells}

    def lines(self) -> Iterator[Record]:
        """Every readable record in the order of writing, replaced ones included: what was paid for."""
        for number in range(self.n_lines):
            yield self._read(*self._index.place(number))

    def require_room(self) -> None:
        """Raise `StorageError` where the disk is so full that an answer might not find room; looks once a second."""
        now_s = time.monotonic()
        if now_s - self._room_seen_at_s < 1.0:
            return
        there = next((p for p in (self.folder, *self.folder.parents) if p.exists()), Path())
        if shutil.disk_usage(there).free < MIN_FREE_BYTES:
            raise StorageError(
                f"{self.folder}: expected at least {MIN_FREE_BYTES // 2**20} MB of free space for answers, found less; "
                "nothing more was sent, and every answer so far is kept.",
                remedy="Free some space, then give the same command again.",
            )
        self._room_seen_at_s = now_s

    def put(self, record: Record) -> None:
        """Append a record; it survives a kill of the process at once and a power cut within half a second.

        Raises `StorageError` when the disk does not take it; the segment is then as it was before.
        """
        line = _line(record)
        with self._lock:
            segment, descriptor = self._open()
            offset = os.fstat(descriptor).st_size
            _append(segment, descriptor, offset, line)
            self._index.add(segment, offset, len(line), record.key, record.cells)
            if time.monotonic() - self._synced_at_s > _SYNC_EVERY_S:
                self._sync(segment, descriptor)

    def close(self) -> None:
        """Put everything on the disk; a later record opens a new segment."""
        with self._lock:
            if self._descriptor is not None and self._segment is not None:
                self._sync(self._segment, self._descriptor)
                os.close(self._descriptor)
                with self._segment.open("rb") as stream:
                    n_lines = sum(1 for _ in stream)
                    self._read_to[self._segment] = (stream.tell(), n_lines)
            self._descriptor = self._segment = None

    def _take_in(self, segment: Path) -> None:
        offset, n_lines = self._read_to.get(segment, (0, 0))
        self._torn_ends.pop(segment, None)
        if segment.stat().st_size == offset:
            return
        with segment.open("rb") as stream:
            stream.seek(offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    # Torn, or another process is writing this very line: the next refresh looks again.
                    self._torn_ends[segment] = Damage(segment.name, n_lines + 1, is_torn_end=True)
                    break
                n_lines += 1
                names = _names_in(line)
                if names is None:
                    self._broken.append(Damage(segment.name, n_lines, is_torn_end=False))
                else:
                    self._index.add(segment, offset, len(line), *names)
                offset += len(line)
        self._read_to[segment] = (offset, n_lines)

    def _read(self, segment: Path, offset: int, length: int) -> Record:
        with segment.open("rb") as stream:
            stream.seek(offset)
            line = stream.read(length)
        if _names_in(line) is None:
            raise StorageError(
                f"{segment}: a journal record changed while it was in use.",
                remedy="Nothing else may write into a journal; give the same command again.",
            )
        content = json.loads(line)
        del content["crc32"]
        content["cells"] = tuple(content["cells"])
        content["top_logprobs"] = tuple((token, logprob) for token, logprob in content["top_logprobs"])
        return Record(**content)

    def _open(self) -> tuple[Path, int]:
        if self._descriptor is None or self._segment is None:
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
            segment = self.folder / f"segment-{stamp}-{uuid.uuid4().hex[:8]}.jsonl"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(segment, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            except OSError as error:
                raise storage_error(segment, error) from error
            self._segment = segment
        return self._segment, self._descriptor

    def _sync(self, segment: Path, descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise storage_error(segment, error) from error
        self._synced_at_s = time.monotonic()


class _Index:
    """Where each record lies, by its request and by its cells; numbers in arrays, since there may be millions."""

    def __init__(self) -> None:
        self.by_request = _Numbers()
        self.by_cell = _Numbers()
        self.offsets = array("q")
        self._lengths = array("q")
        self._segment_numbers = array("l")
        self._segments: list[Path] = []

    def add(self, segment: Path, offset: int, length: int, key: str, cells: Sequence[str]) -> None:
        if not self._segments or self._segments[-1] != segment:
            self._segments.append(segment)
        number = len(self.offsets)
        self.offsets.append(offset)
        self._lengths.append(length)
        self._segment_numbers.append(len(self._segments) - 1)
        self.by_request.add(_short(key), number)
        for cell in cells:
            self.by_cell.add(_short(cell), number)

    def place(self, number: int) -> tuple[Path, int, int]:
        return self._segments[self._segment_numbers[number]], self.offsets[number], self._lengths[number]


class _Numbers:
    """Key → the last number added for it. Twelve bytes an entry once it has settled; new ones wait in a dict."""

    def __init__(self) -> None:
        self._new: dict[int, int] = {}
        self._keys = np.zeros(0, np.uint64)
        self._values = np.zeros(0, np.uint32)

    def __len__(self) -> int:
        self._settle()
        return len(self._keys)

    def add(self, key: int, number: int) -> None:
        self._new[key] = number
        if len(self._new) >= max(_SETTLE_AT, len(self._keys) // 16):
            self._settle()

    def get(self, key: int) -> int | None:
        if key in self._new:
            return self._new[key]
        place = int(np.searchsorted(self._keys, np.uint64(key)))
        is_there = place < len(self._keys) and int(self._keys[place]) == key
        return int(self._values[place]) if is_there else None

    def numbers(self) -> list[int]:
        """Every number that stands, in order."""
        self._settle()
        return sorted(self._values.tolist())

    def _settle(self) -> None:
        if not self._new:
            return
        keys = np.concatenate([self._keys, np.fromiter(self._new, np.uint64, len(self._new))])
        values = np.concatenate([self._values, np.fromiter(self._new.values(), np.uint32, len(self._new))])
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], values[order]
        # Of equal keys the one added last stands: the sort is stable, so it comes last.
        is_last = np.append(keys[1:] != keys[:-1], True)[: len(keys)]
        self._keys, self._values = keys[is_last], values[is_last]
        self._new.clear()


def _short(key: str) -> int:
    """A key folded to 64 bits. Whoever looks up compares the whole key with what the record says."""
    return int(key, 16) % _LARGEST_64_BIT_PRIME


def _line(record: Record) -> bytes:
    """The record as one line of JSON whose last field is the checksum of all before it."""
    body = json.dumps(asdict(record), ensure_ascii=False).encode()[:-1]
    return body + f', "crc32": "{zlib.crc32(body):08x}"'.encode() + b"}\n"


def _names_in(line: bytes) -> tuple[str, list[str]] | None:
    """Key and cells of a line that is whole; None for any other. The JSON itself is not parsed: this must be fast."""
    check, names = _CHECK.search(line[-24:]), _NAMES.match(line)
    if check is None or names is None or int(check[1], 16) != zlib.crc32(line[: -len(check[0])]):
        return None
    cells = names[2].decode()
    return names[1].decode(), cells[1:-1].split('", "') if cells else []


def _append(segment: Path, descriptor: int, offset: int, line: bytes) -> None:
    """Write the whole line or nothing: what a full disk took of it is cut off again."""
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError as error:
        os.ftruncate(descriptor, offset)
        raise storage_error(segment, error) from error
