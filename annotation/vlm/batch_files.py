"""Batches under way, as files beside the journal: what was asked in each, and how far it is.

    batches/ID.json          its state, written before anything is sent and after every step
    batches/ID.index         one line a request: where an answer belongs
    batches/ID.jsonl         the requests themselves, with pixels; gone once they are uploaded
    batches/ID.answers       answers on their way into the journal
    batches/done/ID.json     what came of it

A state is either absent or whole, and the rest of a batch's files are worth nothing without it.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from annotation.vlm.schema import Usage
from annotation.vlm.settings import VlmSettings
from data_contracts.errors import StorageError
from data_contracts.files import storage_error, write_text

_FOLDER = "batches"
_DONE = "done"
_OURS = (".index", ".jsonl", ".answers")
_CELL_DIGITS = 16
"""Hex digits of a cell that are enough to know it again among those under way."""


class Outcome(BaseModel):
    """What came of a batch that has ended."""

    model_config = ConfigDict(frozen=True)

    status: str
    """The endpoint's last word on it (`completed`, `expired`, …)."""
    ended_at: str
    """When its answers were in the journal, UTC, ISO 8601."""
    n_answers: int
    billed_usd: float
    failures: Mapping[str, int] = {}
    """Code → requests without an answer."""
    odd_lines: Mapping[str, int] = {}
    """Kind → lines that belong to no request, or came twice, or cannot be read."""
    token_limit: int | None = None
    """Input tokens that the endpoint queues at once, where it refused the batch for their number."""


class Submission(BaseModel):
    """One batch as its state file keeps it."""

    model_config = ConfigDict(frozen=True)

    submission_id: str
    """Our own name of it, which the batch carries as metadata."""
    base_url: str
    model: str
    created_at: str
    """When its requests were written down, UTC, ISO 8601."""
    n_requests: int
    most_usd: float
    """The highest price that its answers may have."""
    most_input_tokens: int
    prompts: tuple[str, ...]
    """Different `prompt_sha256` of its requests; the index refers to them by number."""
    input_file_id: str | None = None
    """The endpoint's name of the uploaded requests; None: not uploaded yet."""
    asked_at: str | None = None
    """When the endpoint was last asked to begin; None: never, so that nothing can be owed for it."""
    batch_id: str | None = None
    """The endpoint's name of the batch; None: not known to have begun."""
    outcome: Outcome | None = None

    def is_of(self, settings: VlmSettings) -> bool:
        """Whether it was sent to this endpoint and model."""
        return (self.base_url, self.model) == (settings.base_url, settings.model)


class Entry(NamedTuple):
    """Where the answer to one request belongs."""

    custom_id: str
    """The journal's key of the request, which is its name in the batch."""
    prompt_sha256: str
    cells: tuple[str, ...]
    most: Usage
    """Tokens it may be billed for at most."""


class Index:
    """The entries of one batch, read from the disk when an answer asks for them."""

    def __init__(self, path: Path, prompts: Sequence[str]) -> None:
        """The index in `path`; raises `StorageError` where it is missing or damaged."""
        self._path = path
        self._prompts = prompts
        self._offsets: dict[str, int] = {}
        offset = 0
        for line in _lines(path):
            self._offsets[_parsed(line, path)[0]] = offset
            offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[str]:
        """Names of its requests."""
        return iter(self._offsets)

    def __contains__(self, custom_id: str) -> bool:
        return custom_id in self._offsets

    def __getitem__(self, custom_id: str) -> Entry:
        with self._path.open("rb") as stream:
            stream.seek(self._offsets[custom_id])
            return self._entry(stream.readline())

    def _entry(self, line: bytes) -> Entry:
        name, prompt, (n_input, n_output), cells = _parsed(line, self._path)
        return Entry(name, self._prompts[prompt], tuple(cells), Usage(n_input, n_output))


class PendingCells:
    """Cells (image and question) whose answer is on its way; eight bytes each, since there may be millions."""

    def __init__(self, cells: Iterator[str]) -> None:
        self._sorted = np.unique(np.fromiter(map(_number, cells), np.uint64))

    def __len__(self) -> int:
        return len(self._sorted)

    def any_of(self, cells: Sequence[str]) -> bool:
        """Whether an answer to any of these is on its way."""
        return bool(self._among(cells).any())

    def all_of(self, cells: Sequence[str]) -> bool:
        """Whether answers to all of these are on their way."""
        return bool(len(cells)) and bool(self._among(cells).all())

    def _among(self, cells: Sequence[str]) -> npt.NDArray[np.bool_]:
        wanted = np.fromiter(map(_number, cells), np.uint64)
        if not len(self._sorted):
            return np.zeros(len(wanted), bool)
        places = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        return self._sorted[places] == wanted


class RequestFile:
    """The requests of one batch while they are written down, and their index."""

    def __init__(self, folder: Path) -> None:
        """New empty files under a new name; raises `StorageError`."""
        self.submission_id = uuid.uuid4().hex
        self.n_requests = 0
        self.n_bytes = 0
        self.most = Usage()
        """Tokens of all its requests together, at most."""
        self._prompts: dict[str, int] = {}
        self._paths = [folder / f"{self.submission_id}{suffix}" for suffix in (".jsonl", ".index")]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Pixels of patients: nobody else on this machine needs to read them.
            self._requests, self._index = (os.fdopen(_private(path), "wb") for path in self._paths)
        except OSError as error:
            raise storage_error(folder, error) from error

    @property
    def prompts(self) -> tuple[str, ...]:
        """Different prompts of its requests."""
        return tuple(self._prompts)

    def add(self, line: bytes, entry: Entry) -> None:
        """Append one request; raises `StorageError`."""
        prompt = self._prompts.setdefault(entry.prompt_sha256, len(self._prompts))
        most = entry.most
        place = [entry.custom_id, prompt, [most.input_tokens, most.output_tokens], list(entry.cells)]
        try:
            self._requests.write(line)
            self._index.write(json.dumps(place, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            raise storage_error(self._paths[0], error) from error
        self.n_requests += 1
        self.n_bytes += len(line)
        self.most += most

    def close(self) -> None:
        """Put both files on the disk; raises `StorageError`."""
        try:
            for stream in (self._requests, self._index):
                stream.flush()
                os.fsync(stream.fileno())
                stream.close()
        except OSError as error:
            raise storage_error(self._paths[0], error) from error

    def remove(self) -> None:
        """Undo it all."""
        for stream in (self._requests, self._index):
            _close_quietly(stream)
        for path in self._paths:
            path.unlink(missing_ok=True)


class BatchFolder:
    """The files of all batches beside one journal."""

    def __init__(self, journal_folder: Path) -> None:
        self.folder = journal_folder / _FOLDER

    def requests_path(self, submission: Submission) -> Path:
        """Where its requests lie until they are uploaded."""
        return self._path(submission, ".jsonl")

    def answers_path(self, submission: Submission) -> Path:
        """Where its answers lie until they are in the journal."""
        return self._path(submission, ".answers")

    def under_way(self, settings: VlmSettings) -> list[Submission]:
        """What is under way at this endpoint and model, oldest first; raises `StorageError` for a damaged state."""
        found = [self._read(path) for path in self.folder.glob("*.json") if not self._done_path(path.stem).is_file()]
        return sorted((s for s in found if s.is_of(settings)), key=lambda s: s.created_at)

    def ended(self, settings: VlmSettings) -> list[Submission]:
        """What has ended at this endpoint and model, oldest first."""
        found = [self._read(path) for path in (self.folder / _DONE).glob("*.json")]
        return sorted((s for s in found if s.is_of(settings)), key=lambda s: s.created_at)

    def save(self, submission: Submission) -> None:
        """Put its state on the disk."""
        write_text(self._path(submission, ".json"), submission.model_dump_json(indent=1) + "\n")

    def index(self, submission: Submission) -> Index:
        """Where its answers belong; raises `StorageError`."""
        return Index(self._path(submission, ".index"), submission.prompts)

    def cells(self, submissions: Sequence[Submission]) -> PendingCells:
        """All cells that these batches answer."""
        paths = (self._path(submission, ".index") for submission in submissions)
        return PendingCells(cell for path in paths for line in _lines(path) for cell in _parsed(line, path)[3])

    def finish(self, submission: Submission, outcome: Outcome) -> None:
        """Keep what came of it, and remove all else."""
        done = submission.model_copy(update={"outcome": outcome})
        write_text(self._done_path(submission.submission_id), done.model_dump_json(indent=1) + "\n")
        self.discard(submission)

    def discard(self, submission: Submission) -> None:
        """Remove all files of a batch that is not under way."""
        for suffix in (".json", *_OURS):
            self._path(submission, suffix).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what kills have left: pixels of requests that never got a state, files of batches that have ended."""
        for path in self.folder.glob("*.json"):
            if self._done_path(path.stem).is_file():
                path.unlink(missing_ok=True)
        for path in (p for p in self.folder.glob("*") if p.suffix in _OURS):
            if not path.with_suffix(".json").is_file():
                path.unlink(missing_ok=True)

    def _path(self, submission: Submission, suffix: str) -> Path:
        return self.folder / f"{submission.submission_id}{suffix}"

    def _done_path(self, submission_id: str) -> Path:
        return self.folder / _DONE / f"{submission_id}.json"

    def _read(self, path: Path) -> Submission:
        try:
            return Submission.model_validate_json(path.read_bytes())
        except (ValidationError, OSError) as error:
            raise _damaged(path) from error


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            yield from stream
    except OSError as error:
        raise _damaged(path) from error


def _parsed(line: bytes, path: Path) -> list[Any]:
    try:
        name, prompt, most, cells = json.loads(line)
    except (ValueError, TypeError) as error:
        raise _damaged(path) from error
    return [name, prompt, most, cells]


def _damaged(path: Path) -> StorageError:
    return StorageError(
        f"{path}: expected a file of a batch under way, found it missing or damaged; nothing was sent.",
        remedy=f"Restore it, or delete {path.with_suffix('.json').name} to give up the answers of this batch.",
    )


def _number(cell: str) -> int:
    return int(cell[:_CELL_DIGITS], 16)


def _private(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def _close_quietly(stream: BinaryIO) -> None:
    with suppress(OSError):
        stream.close()
