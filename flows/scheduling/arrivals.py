"""Which files have wholly arrived. Two looks at the folder, some seconds apart, and no clock but the monotonic one.

A file that is being copied changes its size or its time between the looks. What the wall clock says does not matter: it
may jump, and files may come with times of the future.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.paths import table_path, walk

_TABLES = frozenset({".csv", ".tsv", ".xlsx"})
_SHOWN = 3


class Seen(NamedTuple):
    """A file as one look finds it."""

    size_bytes: int
    changed_ns: int
    inode: int


@dataclass(frozen=True)
class Arrivals:
    """What two looks found."""

    n_settled: int
    held: frozenset[str]
    """Files that changed, came or went between the looks, as `paths.table_path` writes them."""

    @property
    def tables(self) -> list[str]:
        """Tables among them: what they say of other files cannot be trusted yet."""
        return sorted(name for name in self.held if Path(name).suffix.lower() in _TABLES)

    @property
    def sentence(self) -> str:
        """What is left for the next run; empty where nothing is."""
        if not self.held:
            return ""
        shown = ", ".join(repr(name) for name in sorted(self.held)[:_SHOWN])
        more = f" and {len(self.held) - _SHOWN} more" if len(self.held) > _SHOWN else ""
        return f"{len(self.held)} file(s) are still being written and wait for the next run: {shown}{more}."


def look(source: Path, exclude: tuple[Path, ...] = ()) -> dict[str, Seen]:
    """Size, time and inode of every file under `source`, by its path in tables."""
    found = {}
    for relative in walk(source, exclude=exclude).files:
        try:
            status = (source / relative).stat()
        except OSError:
            continue
        found[table_path(relative)] = Seen(status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def arrivals(
    source: Path, settle_s: float, exclude: tuple[Path, ...] = (), *, sleep: Callable[[float], None] = time.sleep
) -> Arrivals:
    """What lies in `source` and no longer changes, judged by two looks at least `settle_s` apart."""
    began_s = time.monotonic()
    first = look(source, exclude)
    if (rest_s := settle_s - (time.monotonic() - began_s)) > 0:
        sleep(rest_s)
    second = look(source, exclude)
    held = frozenset(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    return Arrivals(len(second.keys() - held), held)
