r"""Names of files as text, and the walk that finds them.

File systems hold bytes, tables hold Unicode. `table_path` writes a relative path with `/` so that every
name has exactly one spelling that Arrow, CSV and JSON can carry, and `os_path` reads it back:

- a backslash is doubled: `a\b.png` → `a\\b.png`;
- a byte that is not UTF-8 becomes `\xNN`: `caf<E9>.png` → `caf\xe9.png`.

All other characters (spaces, quotes, `%`, newlines) stand as they are.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED = re.compile(r"\\(?:x([0-9a-f]{2})|u(d[89a-f][0-9a-f]{2})|(\\))")
_IGNORED_NAMES = frozenset({"thumbs.db", "desktop.ini", "__macosx", "dicomdir", "lost+found"})


def table_path(relative: str) -> str:
    """A relative path of the file system, as `os.fsdecode` gives it, as table text (see the module)."""
    return _SURROGATE.sub(_escape, relative.replace(os.sep, "/").replace("\\", "\\\\"))


def os_path(text: str) -> str:
    """The file system's path of what `table_path` wrote."""
    return _ESCAPED.sub(_unescape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    # 0xDC80–0xDCFF is how `os.fsdecode` holds a byte; other surrogates only occur on Windows.
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def _unescape(match: re.Match[str]) -> str:
    byte, unit, _backslash = match.groups()
    if byte is not None:
        return chr(0xDC00 + int(byte, 16))
    return chr(int(unit, 16)) if unit is not None else "\\"


def is_hidden(name: str) -> bool:
    """True for names that file managers and operating systems leave behind, and for dot files."""
    return name.startswith(".") or name.lower() in _IGNORED_NAMES


@dataclass
class Walk:
    """What lies under a folder: every file once, in a fixed order, and what was passed over."""

    files: list[str] = field(default_factory=list)
    """Relative paths with `/`, as `os.fsdecode` gives them, sorted by bytes."""
    warnings: list[str] = field(default_factory=list)


def walk(root: Path, *, exclude: Collection[Path] = ()) -> Walk:
    """All files under `root` but hidden ones and those below `exclude`; links are followed, loops are cut.

    Each real folder is read once: folders before links to folders, so that a link never hides the folder
    that it points to. Dangling links and devices are listed too: the reader says what is wrong with them.
    """
    found = Walk()
    seen = {os.path.realpath(path) for path in exclude}
    pending, links = [("", root)], list[tuple[str, Path]]()
    while pending or links:
        prefix, folder = pending.pop() if pending else links.pop(0)
        real = os.path.realpath(folder)
        if real in seen:
            if folder.is_symlink():
                found.warnings.append(f"{table_path(prefix)}: links to a folder that is read already; passed over.")
            continue
        seen.add(real)
        for name, path, kind in _children(folder, prefix, found.warnings):
            target = {"folder": pending, "link": links}.get(kind)
            if target is None:
                found.files.append(name)
            else:
                target.append((name, path))
        links.sort()
    found.files.sort(key=os.fsencode)
    return found


def _children(folder: Path, prefix: str, warnings: list[str]) -> Iterator[tuple[str, Path, str]]:
    try:
        with os.scandir(folder) as entries:
            listed = sorted((e for e in entries if not is_hidden(e.name)), key=lambda e: os.fsencode(e.name))
    except OSError as error:
        warnings.append(f"{table_path(prefix) or '.'}: folder could not be read ({error.strerror}); passed over.")
        return
    for entry in listed:
        name = f"{prefix}/{entry.name}" if prefix else entry.name
        yield name, Path(entry.path), _kind(entry)


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "link" if entry.is_symlink() else "folder"
    except OSError:  # a link to itself
        return "file"
    return "file"


def is_regular_file(path: Path) -> bool:
    """True if opening `path` gives the bytes of a file; never blocks, whatever the name."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return False
