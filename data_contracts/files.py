"""Atomic writes: a file is either absent, or whole and on the disk."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from data_contracts.errors import StorageError

_REMEDY = {
    errno.ENOSPC: "The disk is full: free some space and give the same command again.",
    errno.EDQUOT: "Your quota is used up: free some space and give the same command again.",
    errno.EROFS: "The file system is read-only: choose another place with --run.",
    errno.EACCES: "Permission was denied: choose another place with --run, or change the permissions.",
    errno.EPERM: "Permission was denied: choose another place with --run, or change the permissions.",
}


def storage_error(path: Path, error: OSError) -> StorageError:
    """The `StorageError` that tells a person what to do about `error` at `path`."""
    remedy = _REMEDY.get(error.errno or 0, "Check the disk and give the same command again.")
    return StorageError(
        f"{path}: could not be written ({error.strerror or error}); what was there before is whole.", remedy=remedy
    )


def write_with(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, put it on the disk, then rename it into place.

    Raises `StorageError` when the disk does not take it; `path` is then as it was before.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        _sync(temporary)
        # mkstemp makes private files; give what other files here have.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    write_with(path, lambda temporary: _fill(temporary, data))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically."""
    write_bytes(path, text.encode())


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
