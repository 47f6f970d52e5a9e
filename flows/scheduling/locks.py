"""One at a time: per run folder and per source, by locks that end with their process, however it ends.

Prefect's own limits are kept in its database and may outlive a killed run by minutes; these do not.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from data_contracts.errors import ConfigurationError
from data_contracts.files import storage_error
from data_contracts.store import RunFolder

_SCHEDULER_LOCK = ".scheduler.lock"
_FOLDER = "medmicn-locks"


class Held(NamedTuple):
    """Who holds a lock."""

    pid: int
    since: str

    @property
    def words(self) -> str:
        """As part of a sentence."""
        return f"process {self.pid} since {self.since[:19]} UTC" if self.pid else "another process"


def source_lock_path(source: Path) -> Path:
    """The lock file of a source: one a machine and Prefect home, whatever the run folder."""
    from prefect.settings import PREFECT_HOME

    name = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:16]
    return Path(PREFECT_HOME.value()) / _FOLDER / f"{name}.lock"


@contextmanager
def alone(source: Path, run: RunFolder) -> Iterator[str]:
    """Hold source and run folder for one run; the value is empty, or a sentence that says why that is not possible."""
    with locked(source_lock_path(source)) as holder, ExitStack() as stack:
        if holder is not None:
            yield f"{source}: {holder.words} works on it; this run does nothing, the next one goes on."
            return
        try:
            stack.enter_context(run.lock())
        except ConfigurationError as error:
            yield f"{error.message} This run does nothing, the next one goes on."
            return
        yield ""


@contextmanager
def sole_scheduler(run: RunFolder) -> Iterator[None]:
    """Be the one scheduler of a run folder; raises `ConfigurationError` when another one serves it."""
    with locked(run.path / _SCHEDULER_LOCK) as holder:
        if holder is not None:
            raise ConfigurationError(
                f"{run.path}: another scheduler serves this run folder ({holder.words}); this one ends.",
                remedy=f"Let that one work, or end it first: kill {holder.pid}." if holder.pid else None,
            )
        yield


def scheduler_of(run: RunFolder) -> Held | None:
    """Who serves this run folder now, or None."""
    if not (run.path / _SCHEDULER_LOCK).is_file():
        return None
    with locked(run.path / _SCHEDULER_LOCK) as holder:
        return holder


@contextmanager
def locked(path: Path) -> Iterator[Held | None]:
    """Hold the lock file at `path`; the value is None, or who holds it already."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield _holder(handle)
            return
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps([os.getpid(), datetime.now(UTC).isoformat()]).encode(), 0)
        yield None
    finally:
        os.close(handle)


def _holder(handle: int) -> Held:
    try:
        pid, since = json.loads(os.pread(handle, 200, 0))
        return Held(int(pid), str(since))
    except (ValueError, TypeError):
        return Held(0, "")
