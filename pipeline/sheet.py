"""A spreadsheet's CSV as text cells, whatever the spreadsheet did to it on the way."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

from data_contracts.errors import ContractViolation, InputRefused
from data_contracts.spreadsheet import unshielded

_DELIMITERS = ",;\t|"
_MAX_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Sheet:
    """Header and rows of one CSV file; every cell is stripped text."""

    path: Path
    header: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]
    """(row number as a spreadsheet counts it, cells as many as the header)."""

    @property
    def name(self) -> str:
        """File name, for messages."""
        return self.path.name


def read_sheet(path: Path) -> Sheet:
    """Read a CSV with any of: byte-order mark, UTF-16, Windows-1252, `;` or tab, CRLF, a `sep=` line, empty rows.

    Raises:
        InputRefused: the file cannot be read, or holds no row.
        ContractViolation: header cells repeat or are empty, or rows are wider than the header.
    """
    try:
        lines = [(number, [cell.strip() for cell in cells]) for number, cells in rows_of(text_of(_bytes(path)))]
    except csv.Error as error:
        raise InputRefused(f"{path.name}: expected CSV, got: {error}; nothing was imported.") from error
    if len(lines) < 2:
        found = "only a header" if lines else "nothing"
        raise InputRefused(f"{path.name}: expected a header and at least one row, found {found}; nothing was imported.")
    _, header = lines[0]
    width = len(header)
    while width and not header[width - 1]:
        width -= 1
    faults = _header_faults(header[:width]) + _width_faults(lines[1:], width)
    if faults:
        raise ContractViolation(path.name, faults, remedy="Nothing was imported.")
    rows = tuple((number, (cells + [""] * width)[:width]) for number, cells in lines[1:])
    return Sheet(path, tuple(header[:width]), tuple((number, tuple(cells)) for number, cells in rows))


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputRefused(f"{path.name}: expected at most {_MAX_BYTES:,} bytes, found more; nothing was imported.")
        return path.read_bytes()
    except OSError as error:
        raise InputRefused(f"{path}: could not be read ({error.strerror}); nothing was imported.") from error


def text_of(data: bytes) -> str:
    """The bytes of a CSV as text: what their byte-order mark says, else UTF-8, else Windows-1252."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")  # what Excel writes on Windows


def rows_of(text: str) -> list[tuple[int, list[str]]]:
    """Rows that are not empty, with the number that a spreadsheet shows, cells without the shield of `harmless`.

    The separator is the one that a `sep=` line declares, else the most frequent one of the header. Raises `csv.Error`
    where a quoted cell never ends.
    """
    declared = re.match(r'"?sep=(.)"?\r?\n', text)
    if declared:
        text = text[declared.end() :]
    header = re.sub(r'"[^"]*"', "", text.lstrip("\r\n").partition("\n")[0])
    delimiter = declared[1] if declared else max(_DELIMITERS, key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    numbered = [(i, [unshielded(cell) for cell in cells]) for i, cells in enumerate(reader, 2 if declared else 1)]
    return [(number, cells) for number, cells in numbered if any(cell.strip() for cell in cells)]


def _header_faults(header: list[str]) -> list[str]:
    lowered = [cell.casefold() for cell in header]
    empty = [f"header, column {i}: expected a name, got nothing" for i, cell in enumerate(header, 1) if not cell]
    repeated = sorted({cell for cell in lowered if cell and lowered.count(cell) > 1})
    return empty + [f"header: column {cell!r} occurs {lowered.count(cell)} times" for cell in repeated]


def _width_faults(lines: list[tuple[int, list[str]]], width: int) -> list[str]:
    return [
        f"row {number}: expected at most {width} cells, got {len(cells)}"
        for number, cells in lines
        if any(cells[width:])
    ]
