"""The layout "a CSV that lists files": `path,label[,split][,patient_id][,concept columns…]`.

Which column is which is read from the header (see `ROLES`); a column whose every value is a concept state
is a concept; others are ignored, with a warning. Rows are matched to files by path, else by file name, else
by file name without extension.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data_contracts.errors import RejectReason, SourceRefused
from data_contracts.tables import State
from pipeline.csv_table import ROLES, Row, Table, concept_columns, read_table, states
from pipeline.layouts import SPLIT_WORDS, Entry, Files, SourceListing, folder_labels
from pipeline.paths import is_hidden, is_regular_file, os_path, table_path
from pipeline.wording import some

_DRIVE = re.compile("[A-Za-z]:/")

PREFERRED = "labels.csv"
ANSWER_SHEETS = frozenset({"truth.csv"})
"""Known truths of synthetic images: for scoring only, never read as given labels."""


def find(files: Files, text: str) -> tuple[str | None, RejectReason | None, str | None]:
    """The file that a CSV cell names: (its path, None, None), else (None, reason, detail)."""
    # A file of exactly this name is meant, even where the name looks like a path to somewhere else (`A:\\x80`).
    exact = next((spelling for spelling in (text, os_path(text)) if spelling in files.known), None)
    if exact is not None:
        return exact, None, None
    name, problem = _inside(files.root, text)
    if problem is not None:
        return None, RejectReason.OUTSIDE_SOURCE, problem
    spellings = dict.fromkeys(
        (
            name,
            os_path(name),
            name.replace("\\", "/").lstrip("/"),
            unicodedata.normalize("NFC", name),
            unicodedata.normalize("NFD", name),
        )
    )
    for path in (p for spelling in spellings for p in (spelling, f"images/{spelling}")):
        if path in files.known:
            return path, None, None
    fits = files.by_name.get(name) or files.by_stem.get(name) or []
    if len(fits) > 1:
        shown = some([table_path(path) for path in fits])
        return None, RejectReason.MISSING_FILE, f"the name fits {len(fits)} files: {shown}; give the whole path"
    if fits:
        return fits[0], None, None
    # Files that the walk passes over (hidden, odd extension) are read when a CSV asks for them.
    there = next((s for s in spellings if s and is_regular_file(files.root / s)), None)
    return (there, None, None) if there else (None, RejectReason.MISSING_FILE, "the file does not exist")


def listed(files: Files) -> SourceListing | None:
    """The listing of a SOURCE with a CSV that lists files, or None if there is no such CSV."""
    table, warnings = _choose(files.root)
    if table is None:
        return None
    roles = {role: table.column(role) for role in ROLES}
    concepts, ignored = concept_columns(table, roles.values())
    if ignored:
        warnings.append(
            f"{table.path.name}: column(s) neither known nor holding concept states were ignored: {some(ignored)}."
        )
    entries = _entries(files, table, roles, concepts, warnings)
    return SourceListing("csv", files.root, entries, concepts, warnings, [table.path])


def merged(entries: Sequence[Entry], warnings: list[str], where: str) -> list[Entry]:
    """Each path once, sorted: equal rows are one; rows that contradict each other are rejected."""
    by_path: dict[str, list[Entry]] = {}
    for entry in entries:
        by_path.setdefault(entry.path, []).append(entry)
    repeated = [path for path, same in by_path.items() if len(same) > 1]
    if repeated:
        warnings.append(f"{where}: {len(repeated)} file(s) are listed more than once, such as {repeated[0]!r}.")
    return [_one(by_path[path]) for path in sorted(by_path)]


def warn_of_unlisted(files: Files, entries: Iterable[Entry], warnings: list[str], where: str) -> None:
    """Add a warning if SOURCE holds images that no row names: they are left out."""
    unlisted = sorted({table_path(path) for path in files.paths} - {entry.path for entry in entries})
    if unlisted:
        warnings.append(
            f"{where}: {len(unlisted)} image(s) of SOURCE are not listed and were left out: {some(unlisted)}."
        )


def _entries(
    files: Files, table: Table, roles: Mapping[str, str | None], concepts: Sequence[str], warnings: list[str]
) -> list[Entry]:
    column, split_column, faults = roles["path"] or "", roles["split"], list[str]()
    folders = folder_labels(files)[1] if roles["label"] is None else {}
    entries = []
    for number, row in zip(table.numbers, table.rows, strict=True):
        text = row[column].strip()
        if not text:
            warnings.append(f"{table.path.name}: row {number} names no file and was ignored.")
            continue
        path, reason, detail = find(files, text)
        split_word = row[split_column].strip() if split_column else ""
        if split_word and split_word.lower() not in SPLIT_WORDS:
            faults.append(f"row {number}: {split_word!r}")
        entry = Entry(
            path=table_path(path) if path is not None else _missing_path(text),
            label=_cell(row, roles["label"]) or folders.get(path or "", (None, None))[0],
            split=SPLIT_WORDS.get(split_word.lower()),
            group_id=_cell(row, roles["patient"]),
            concepts=states(row, concepts),
            rejected=reason,
            detail=detail,
        )
        entries.append(entry)
    _refuse_useless(table, entries, faults)
    entries = merged(entries, warnings, table.path.name)
    warn_of_unlisted(files, entries, warnings, table.path.name)
    return entries


def _refuse_useless(table: Table, entries: Sequence[Entry], faults: Sequence[str]) -> None:
    name = table.path.name
    if faults:
        shown = "; ".join(faults[:5])
        raise SourceRefused(f"{name}: column 'split': expected train, val or test, got {shown}; nothing was read.")
    if not entries:
        raise SourceRefused(f"{name}: expected at least one row that names a file, got none; nothing was read.")
    if all(entry.rejected is not None for entry in entries):
        shown = some([entry.path for entry in entries])
        raise SourceRefused(
            f"{name}: none of the {len(entries)} file(s) that it names lies in SOURCE: {shown}.",
            remedy="Paths are relative to SOURCE; correct the CSV or give another folder.",
        )


def _one(same: Sequence[Entry]) -> Entry:
    """One entry of several for the same file."""
    first = same[0]
    for what, values in (
        ("labels", {e.label for e in same if e.label}),
        ("splits", {e.split for e in same if e.split}),
        ("patients", {e.group_id for e in same if e.group_id}),
    ):
        if len(values) > 1 and first.rejected is None:
            detail = f"its rows name {len(values)} {what}: {some(sorted(values))}"
            return replace(first, label=None, rejected=RejectReason.CONFLICTING_LABELS, detail=detail)
    said: dict[str, State] = {}
    for name, state in (item for entry in same for item in entry.concepts.items()):
        # Two rows that disagree are two readers who disagree.
        said[name] = state if said.get(name, state) == state else State.UNCERTAIN
    return replace(
        first,
        label=next((e.label for e in same if e.label), None),
        split=next((e.split for e in same if e.split), None),
        group_id=next((e.group_id for e in same if e.group_id), None),
        concepts=said,
    )


def _choose(root: Path) -> tuple[Table | None, list[str]]:
    """The CSV that lists the files, and what to say of the others."""
    names = sorted(p.name for p in root.iterdir() if p.suffix.lower() == ".csv" and not is_hidden(p.name))
    names = [name for name in names if is_regular_file(root / name)]
    sheets = [name for name in names if name.lower() in ANSWER_SHEETS]
    warnings = [f"{name}: an answer sheet is for scoring; it was not read." for name in sheets]
    names = [name for name in names if name not in sheets]
    preferred = next((name for name in names if name.lower() == PREFERRED), None)
    table = _preferred(root / preferred) if preferred else _only_list(root, names)
    others = [name for name in names if table is None or name != table.path.name]
    if others:
        reason = f"{table.path.name} lists the images" if table else "no column of theirs names files"
        warnings.append(f"CSV file(s) not read, because {reason}: {some(others)}.")
    return table, warnings


def _preferred(path: Path) -> Table:
    table = read_table(path)
    if table.column("path") is None:
        raise SourceRefused(
            f"{path.name}: expected a column that names the files, got {some(table.columns)}; nothing was read.",
            remedy=f"Name it one of {', '.join(ROLES['path'][:5])}.",
        )
    return table


def _only_list(root: Path, names: Sequence[str]) -> Table | None:
    """The one table of several that lists files; raises `SourceRefused` if there are two, or one that is broken."""
    lists, broken = list[Table](), list[SourceRefused]()
    for name in names:
        try:
            table = read_table(root / name)
        except SourceRefused as error:
            broken.append(error)
            continue
        if table.column("path") is not None:
            lists.append(table)
    if len(lists) > 1:
        raise SourceRefused(
            f"SOURCE {root}: expected one CSV that lists the images, got {some([t.path.name for t in lists])}.",
            remedy=f"Name the one that counts {PREFERRED}.",
        )
    if broken and not lists:
        raise broken[0]  # it may have been meant to list the images: do not go on without it
    return lists[0] if lists else None


def _inside(root: Path, text: str) -> tuple[str, str | None]:
    """A cell as a path relative to SOURCE, and what is wrong if it leads out of it."""
    for base in (str(root), os.path.abspath(root), os.path.realpath(root)):
        if os.path.isabs(text) and text.startswith(base.rstrip("/") + "/"):
            text = os.path.relpath(text, base)
    # A backslash may separate folders (Windows) or be part of a name: neither may lead out.
    plain = os.path.normpath(text.replace("\\", "/").lstrip("/"))
    if os.path.isabs(text) or plain == ".." or plain.startswith("../") or _DRIVE.match(plain):
        return text, "the path leads out of SOURCE"
    return os.path.normpath(text), None


def _missing_path(text: str) -> str:
    """How a file that is not there stands in the table: as the CSV spells it."""
    return table_path(os_path(text))


def _cell(row: Row, column: str | None) -> str | None:
    return (row[column].strip() or None) if column else None
