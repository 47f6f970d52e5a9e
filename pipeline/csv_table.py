"""CSV tables as people make them: read as text, with columns known by what they mean."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_contracts.errors import SourceRefused
from data_contracts.tables import State
from pipeline.sheet import rows_of, text_of
from pipeline.wording import some

ROLES: Mapping[str, tuple[str, ...]] = {
    "path": (
        "path",
        "file_path",
        "filepath",
        "image_path",
        "file",
        "file_name",
        "filename",
        "image",
        "image_name",
        "image_id",
        "imageid",
        "img",
    ),
    "label": ("label", "class", "class_name", "target", "diagnosis", "dx", "category"),
    "split": ("split", "partition", "subset", "set"),
    "patient": ("patient_id", "patient", "patientid", "subject_id", "subject", "group_id", "case_id", "lesion_id"),
}
"""Header names, in lower case with `_` for blanks, by what they mean; the first that is there counts."""

STATES: Mapping[str, State] = {
    "1": State.PRESENT,
    "1.0": State.PRESENT,
    "true": State.PRESENT,
    "yes": State.PRESENT,
    "present": State.PRESENT,
    "0": State.ABSENT,
    "0.0": State.ABSENT,
    "false": State.ABSENT,
    "no": State.ABSENT,
    "absent": State.ABSENT,
    "uncertain": State.UNCERTAIN,
    "not_assessed": State.NOT_ASSESSED,
}
"""What a concept cell may hold, in lower case; an empty cell says nothing."""

_NEVER_CONCEPTS = frozenset(
    {"sex", "gender", "age", "fold", "index", "id", "width", "height", "size", "site", "hospital"}
)
Row = dict[str, str]


@dataclass(frozen=True)
class Table:
    """A CSV file as text: column names as written, and one dictionary a row."""

    path: Path
    columns: list[str]
    rows: list[Row]
    numbers: list[int]
    """Where each row stands in the file, counted from 1 with the header."""

    def column(self, role: str) -> str | None:
        """The column that plays a role of `ROLES`, or None."""
        names = {_plain(name): name for name in reversed(self.columns)}
        return next((names[alias] for alias in ROLES[role] if alias in names), None)


def read_table(path: Path) -> Table:
    """A CSV file whatever its byte-order mark, line ends, encoding or separator; raises `SourceRefused`."""
    try:
        lines = rows_of(_text_of(path))
    except csv.Error as error:
        raise _refused(path, f"expected a CSV file, got one that breaks off ({error})") from error
    columns = [name.strip() for name in lines[0][1]] if lines else []
    repeated = sorted({name for name in columns if name and columns.count(name) > 1})
    if repeated:
        raise _refused(path, f"expected unique column names, got {repeated[0]!r} twice")
    wide = [number for number, line in lines if any(line[len(columns) :])]
    if wide:
        raise _refused(path, f"expected {len(columns)} cells a row, got more in row(s) {some(wide)}; quote the commas")
    rows = [_row(columns, line) for _, line in lines[1:]]
    return Table(path, columns, rows, [number for number, _ in lines[1:]])


def _row(columns: list[str], line: list[str]) -> Row:
    return dict(zip(columns, (*line, *[""] * len(columns)), strict=False))


def concept_columns(table: Table, used: Iterable[str | None]) -> tuple[list[str], list[str]]:
    """Names of the columns that hold concept states, and of those that hold something else."""
    taken = {name for name in used if name is not None}
    concepts: list[str] = []
    others: list[str] = []
    for name in table.columns:
        if name in taken or not name or _plain(name).startswith("unnamed:"):
            continue
        values = {row[name].strip().lower() for row in table.rows} - {""}
        is_concept = bool(values) and values <= STATES.keys() and _plain(name) not in _NEVER_CONCEPTS
        (concepts if is_concept else others).append(name)
    return concepts, others


def states(row: Row, names: Iterable[str]) -> dict[str, State]:
    """Concept name → state, for the cells of a row that say something."""
    cells = ((name, row.get(name, "").strip().lower()) for name in names)
    return {name: STATES[cell] for name, cell in cells if cell in STATES}


def _text_of(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceRefused(
            f"{path.name}: could not be read ({error.strerror}).", remedy="Check its permissions."
        ) from error
    text = text_of(data)
    if "\0" in text:
        raise _refused(path, "expected a CSV file, got binary data")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _refused(path: Path, what: str) -> SourceRefused:
    return SourceRefused(
        f"{path.name}: {what}; nothing was read.", remedy="Correct the file, or take it out of SOURCE."
    )


def _plain(name: str) -> str:
    return "_".join(name.strip().lower().replace("-", " ").split())
