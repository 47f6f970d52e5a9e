"""The page's database of one run: opened or built in the background, kept in step with the run folder."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.errors import InputRefused, MedMicnError, StepFailed
from data_contracts.manifest import content_hash
from data_contracts.store import RunFolder
from data_contracts.tables import CONCEPTS, IMAGES, LABELS
from pipeline.review.build import build, hashes
from pipeline.review.experts import forget, part_names, take_parts
from pipeline.review.witnesses import read_rest

FORMAT = 1
"""Version of the database; another one is built again."""
MEMORY_LIMIT = "280MB"
N_THREADS = 2
PATIENCE_S = 3.0
"""A page waits so long for a database before it shows how far the reading is. Small runs never get there."""
_SETTLED_NS = 50_000_000
"""A folder that changed more recently may change again without a new time stamp."""


class NotReadyYet(Exception):
    """The database is being built; the page says how far it is."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress.what)
        self.progress = progress


@dataclass
class Progress:
    """How far the reading is."""

    what: str = "images"
    share: float = 0.0

    def tell(self, what: str, share: float) -> None:
        """Note a step."""
        self.what, self.share = what, share


@dataclass
class Index:
    """One open database, and the vocabulary of its columns."""

    run: RunFolder
    path: Path
    connection: duckdb.DuckDBPyConnection
    concept_ids: tuple[str, ...]
    write_lock: threading.RLock = field(default_factory=threading.RLock)
    memo: dict[object, Any] = field(default_factory=dict)
    """Answers about many images that hold until the next correction."""
    rest: float = 0.0
    """Share of the ledger and the alignment whose places and words are known."""

    def __post_init__(self) -> None:
        self.numbers = {concept_id: k for k, concept_id in enumerate(self.concept_ids)}
        found = self.connection.execute("SELECT id_hash FROM images ORDER BY position").fetchnumpy()["id_hash"]
        self._order = np.argsort(found, kind="stable").astype(np.int32)
        self._hashes = found[self._order]
        self._parts = {name for (name,) in self.connection.execute("SELECT name FROM expert_parts").fetchall()}
        self._read: set[str] = set()
        self._maps_stamp: object = None
        self._ledger_time_ns = 0
        self.n_images = len(found)
        self.labels: list[str] = self._distinct("label")
        self.splits: list[str] = self._distinct("split")

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A connection for one thread."""
        return _quiet(self.connection.cursor())

    def position(self, image_id: str) -> int:
        """Place of an image in the folder; raises `InputRefused` for an id that is not one of this run's."""
        number = hashes(pd.Series([image_id]))[0]
        first, last = (int(np.searchsorted(self._hashes, number, side=side)) for side in ("left", "right"))
        for place in self._order[first:last].tolist():
            found = self.cursor().execute("SELECT image_id FROM images WHERE position = ?", [place]).fetchall()
            if found == [(image_id,)]:
                return int(place)
        raise InputRefused(f"image {image_id[:16]!r}: no accepted image of this run has this id.")

    def has(self, image_id: str) -> bool:
        """Whether this run has an accepted image with this id."""
        try:
            self.position(image_id)
        except InputRefused:
            return False
        return True

    def catch_up(self) -> None:
        """Take in what anyone added to the ledger since."""
        try:
            changed_ns = self.run.judgements_dir.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if changed_ns == self._ledger_time_ns:
            return
        with self.write_lock:
            there = part_names(self.run)
            if self._parts - there:
                # Somebody took parts out of the folder: what they said no longer counts.
                forget(self.connection, self.numbers)
                self._parts = set()
                self.memo.clear()
            self.take_in([self.run.judgements_dir / name for name in sorted(there - self._parts)])
            self._ledger_time_ns = changed_ns if time.time_ns() - changed_ns > _SETTLED_NS else 0

    def take_in(self, parts: Sequence[Path], *, only_experts: bool = False) -> None:
        """Lay the experts' words of these ledger parts over the labels; `only_experts`: they hold nothing else."""
        with self.write_lock:
            if parts:
                take_parts(self.connection, parts, self.numbers)
                self._parts |= {path.name for path in parts}
                self.memo.clear()
            if only_experts:
                self.connection.execute("INSERT INTO read_parts SELECT unnest(?)", [[path.name for path in parts]])
                self._read |= {path.name for path in parts}

    @property
    def is_behind(self) -> bool:
        """Whether witnesses said something, or maps were made, since the last `read_rest`."""
        return bool(self._parts - self._read) or _stamp(self.run.alignment_dir) != self._maps_stamp

    def read_rest(self, *, stop: Callable[[], bool] = lambda: False) -> None:
        """Index places and words; corrections are taken in meanwhile."""
        self._read, self._maps_stamp = set(self._parts), _stamp(self.run.alignment_dir)
        for share in read_rest(self.cursor(), self.run):
            self.rest = share
            if stop():
                break

    def _distinct(self, column: str) -> list[str]:
        rows = self.connection.execute(
            f"SELECT DISTINCT {column} FROM images WHERE {column} IS NOT NULL ORDER BY {column}"
        ).fetchall()
        return [str(value) for (value,) in rows]


class Keeper:
    """Gives the database of the run as it is now; builds it in the background when the tables changed."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._index: Index | None = None
        self._stamp = ""
        self._building: threading.Thread | None = None
        self._failure: Exception | None = None
        self._vocabulary: tuple[object, Vocabulary] = (None, Vocabulary())
        self._stopped = False
        self.progress = Progress()

    def vocabulary(self) -> Vocabulary:
        """The kept concepts as they are now."""
        stamp = _stamp(self._run.table_path(CONCEPTS))
        if stamp != self._vocabulary[0]:
            self._vocabulary = (stamp, self._run.vocabulary() if stamp else Vocabulary())
        return self._vocabulary[1]

    def current(self) -> Index:
        """The database in step with the run folder.

        Raises:
            NotReadyYet: it is being built, and takes longer than a page should wait.
        """
        stamp = self._now()
        if stamp != self._stamp or self._index is None:
            self._begin(stamp)
            if self._building is not None:
                self._building.join(PATIENCE_S)
            if self._failure is not None:
                failure, self._failure, self._stamp = self._failure, None, ""
                raise failure
            if self._index is None:
                raise NotReadyYet(self.progress)
        self._index.catch_up()
        if self._index.is_behind:
            self._read_on(self._index)
        return self._index

    @property
    def is_ready(self) -> bool:
        """Whether there is a database to look at."""
        return self._index is not None

    def warm(self) -> None:
        """Begin to read before the first page is asked for."""
        with suppress(MedMicnError):
            self._begin(self._now())

    def stop(self) -> None:
        """Stop reading in the background; the database stays for the next time."""
        self._stopped = True
        if self._building is not None:
            self._building.join()
        if self._index is not None:
            self._index.connection.close()
            if str(os.getpid()) in self._index.path.name:
                self._index.path.unlink(missing_ok=True)

    def _now(self) -> str:
        stamps = [_stamp(self._run.table_path(contract)) for contract in (IMAGES, LABELS)]
        return content_hash({"format": FORMAT, "tables": stamps, "concepts": list(self.vocabulary().ids)})

    def _begin(self, stamp: str) -> None:
        with self._lock:
            if stamp == self._stamp or (self._building is not None and self._building.is_alive()):
                return
            self._stamp, self.progress = stamp, Progress()
            self._building = threading.Thread(target=self._build, args=(stamp,), name="review-index", daemon=True)
            self._building.start()

    def _read_on(self, index: Index) -> None:
        with self._lock:
            if self._building is None or not self._building.is_alive():
                self._building = threading.Thread(
                    target=index.read_rest, kwargs={"stop": lambda: self._stopped}, name="review-index", daemon=True
                )
                self._building.start()

    def _build(self, stamp: str) -> None:
        try:
            index = open_index(self._run, stamp, self.vocabulary().ids, self.progress)
            index.catch_up()
            self._index, old = index, self._index
            if old is not None and old.path != index.path:
                old.path.unlink(missing_ok=True)
            index.read_rest(stop=lambda: self._stopped)
        except MedMicnError as error:
            self._failure = error
        except (duckdb.Error, OSError) as error:
            self._failure = StepFailed(
                f"review: the page's own database could not be built in {self._run.cache_dir}: {error}",
                remedy="Free some space, or remove review-*.duckdb there, and reload.",
            )


def open_index(run: RunFolder, stamp: str, concept_ids: tuple[str, ...], progress: Progress) -> Index:
    """The database that fits `stamp`: the one an earlier server built, else a new one."""
    path = _folder(run) / f"review-{stamp[:16]}.duckdb"
    connection = _connect(path)
    if connection is None:
        # Another server has it open: this one works on its own copy.
        path = path.with_name(f"review-{stamp[:16]}-{os.getpid()}.duckdb")
        path.unlink(missing_ok=True)
        connection = _opened(path)
    if not _is_whole(connection, stamp):
        connection.close()
        path.unlink(missing_ok=True)
        connection = _opened(path)
        build(connection, run, concept_ids, progress.tell)
        meta = json.dumps({"stamp": stamp, "concepts": concept_ids})
        connection.execute("CREATE TABLE meta AS SELECT ? AS content", [meta])
        connection.execute("CHECKPOINT")
    _remove_unused(path)
    return Index(run, path, connection, concept_ids)


_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "memory_limit": MEMORY_LIMIT,
    "threads": N_THREADS,
    # Nothing is fetched from anywhere.
    "autoinstall_known_extensions": False,
}


def _folder(run: RunFolder) -> Path:
    try:
        run.cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run.cache_dir):
            return run.cache_dir
    except OSError:
        # A run that cannot be written to can still be looked at.
        return Path(tempfile.mkdtemp(prefix="medmicn-review-"))


def _opened(path: Path) -> duckdb.DuckDBPyConnection:
    return _quiet(duckdb.connect(path, config=_CONFIG))


def _quiet(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    """Without the bar that DuckDB draws on the terminal of a long query."""
    return connection.execute("SET enable_progress_bar = false")


def _connect(path: Path) -> duckdb.DuckDBPyConnection | None:
    """An open database, or None where another process holds it; one that cannot be read is removed."""
    try:
        return _opened(path)
    except duckdb.Error as error:
        if "lock" in str(error).lower():
            return None
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".wal").unlink(missing_ok=True)
        return _opened(path)


def _is_whole(connection: duckdb.DuckDBPyConnection, stamp: str) -> bool:
    """Whether the database was built to the end, for these tables."""
    try:
        content = connection.execute("SELECT content FROM meta").fetchall()[0][0]
    except duckdb.CatalogException:
        return False
    return bool(json.loads(content)["stamp"] == stamp)


def _remove_unused(mine: Path) -> None:
    """Remove databases of earlier tables that no process has open."""
    for path in mine.parent.glob("review-*.duckdb"):
        if path == mine:
            continue
        with suppress(OSError), path.open("rb+") as stream:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            path.with_name(path.name + ".wal").unlink(missing_ok=True)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size
