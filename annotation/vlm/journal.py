"""The journal: every answer of a vision-language model, as it came, found again by the content of its question.

A journal is a folder of append-only segments, one line of JSON a record. Each writer has a segment of its own,
so processes never write into each other's lines, and a killed writer can leave at most one torn line, its last.
Only the place of each record is kept in memory.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from annotation.vlm.schema import Usage
from data_contracts.errors import StorageError
from data_contracts.files import storage_error

_SYNC_EVERY_S = 0.5


@dataclass(frozen=True)
class Record:
    """One answer as it came."""

    key: str
    """Hash of all that decided the answer (hex sha256)."""
    prompt_sha256: str
    """Hash of the question without its images."""
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
    """Tokens billed for the question."""
    output_tokens: int
    """Tokens billed for the answer."""
    created_at: str
    """When it came, UTC, ISO 8601."""

    @property
    def usage(self) -> Usage:
        """Its tokens."""
        return Usage(self.input_tokens, self.output_tokens)

    @property
    def created(self) -> datetime:
        """When it came."""
        return datetime.fromisoformat(self.created_at)


def utc_now() -> str:
    """The present moment, UTC, ISO 8601, as records carry it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


class Journal:
    """The records of one folder. Safe for several threads; several processes may each hold one on one folder."""

    def __init__(self, folder: Path) -> None:
        """Index what is there; the folder itself is only made by the first record."""
        self.folder = folder
        self._n_broken = 0
        self._torn_ends: set[Path] = set()
        self._places: dict[bytes, tuple[Path, int, int]] = {}
        self._read_to: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._segment: Path | None = None
        self._descriptor: int | None = None
        self._synced_at_s = 0.0
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places

    def __iter__(self) -> Iterator[Record]:
        for place in list(self._places.values()):
            yield self._read(place)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def n_torn(self) -> int:
        """Lines that cannot be read: torn by a kill, or damaged."""
        return self._n_broken + len(self._torn_ends)

    def refresh(self) -> None:
        """Take in what other processes have added since."""
        with self._lock:
            for segment in sorted(self.folder.glob("*.jsonl")):
                if segment != self._segment:
                    self._index(segment)

    def get(self, key: str) -> Record | None:
        """The answer to the question with this key, or None."""
        place = self._places.get(bytes.fromhex(key))
        return None if place is None else self._read(place)

    def put(self, record: Record) -> None:
        """Append a record; it survives a kill of the process at once and a power cut within half a second.

        Raises `StorageError` when the disk does not take it; the segment is then as it was before.
        """
        line = json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n"
        with self._lock:
            segment, descriptor = self._open()
            offset = os.fstat(descriptor).st_size
            _append(segment, descriptor, offset, line)
            self._places[bytes.fromhex(record.key)] = (segment, offset, len(line))
            if time.monotonic() - self._synced_at_s > _SYNC_EVERY_S:
                self._sync(segment, descriptor)

    def close(self) -> None:
        """Put everything on the disk; a later record opens a new segment."""
        with self._lock:
            if self._descriptor is not None and self._segment is not None:
                self._sync(self._segment, self._descriptor)
                os.close(self._descriptor)
                self._read_to[self._segment] = self._segment.stat().st_size
            self._descriptor = self._segment = None

    def _index(self, segment: Path) -> None:
        offset = self._read_to.get(segment, 0)
        self._torn_ends.discard(segment)
        with segment.open("rb") as stream:
            stream.seek(offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    # Torn, or another process is writing this very line: the next refresh looks again.
                    self._torn_ends.add(segment)
                    break
                record = _parse(line)
                if record is None:
                    self._n_broken += 1
                else:
                    self._places[bytes.fromhex(record.key)] = (segment, offset, len(line))
                offset += len(line)
        self._read_to[segment] = offset

    def _read(self, place: tuple[Path, int, int]) -> Record:
        segment, offset, length = place
        with segment.open("rb") as stream:
            stream.seek(offset)
            record = _parse(stream.read(length))
        if record is None:
            raise StorageError(
                f"{segment}: a journal record changed while it was in use.",
                remedy="Nothing else may write into a journal; give the same command again.",
            )
        return record

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


def _append(segment: Path, descriptor: int, offset: int, line: bytes) -> None:
    """Write the whole line or nothing: what a full disk took of it is cut off again."""
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError as error:
        os.ftruncate(descriptor, offset)
        raise storage_error(segment, error) from error


def _parse(line: bytes) -> Record | None:
    try:
        content = json.loads(line)
        bytes.fromhex(content["key"])
        return Record(**{name: content[name] for name in Record.__dataclass_fields__})
    except (ValueError, KeyError, TypeError):
        return None
