"""CSV files that open cleanly, and safely, in Excel, LibreOffice and pandas."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from data_contracts.files import write_with

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_SHIELDED = re.compile(r"'+[=+\-@\t\r]")


def harmless(text: str) -> str:
    """The text, with a leading `'` where a spreadsheet would otherwise run it as a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def unshielded(text: str) -> str:
    """What `harmless` was given."""
    return text[1:] if _SHIELDED.match(text) else text


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a frame atomically: UTF-8 with byte-order mark, text that looks like a formula made harmless."""
    write_with(path, lambda file: csv_appender(file)(frame))


def csv_appender(path: Path) -> Callable[[pd.DataFrame], None]:
    """Writes frames of the same columns under one another, as `write_csv` does one; not atomic by itself."""
    is_first = True

    def append(frame: pd.DataFrame) -> None:
        nonlocal is_first
        texts = _text_columns(frame)
        shielded = frame.assign(**{name: frame[name].map(_shield, na_action="ignore") for name in texts})
        # The csv module quotes "\n" by itself, but a lone "\r" only when told to quote everything.
        has_return = any(frame[name].map(_has_return).any() for name in texts)
        shielded.to_csv(
            path,
            mode="w" if is_first else "a",
            header=is_first,
            index=False,
            encoding="utf-8-sig" if is_first else "utf-8",
            lineterminator="\n",
            quoting=csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL,
        )
        is_first = False

    return append


def read_csv(path: Path, *, as_text: bool = False) -> pd.DataFrame:
    """Read what `write_csv` wrote; with `as_text` every cell stays the text it is, empty ones included."""
    options = {"dtype": str, "keep_default_na": False} if as_text else {}
    frame = pd.read_csv(path, encoding="utf-8-sig", **options)
    return frame.assign(**{name: frame[name].map(_unshield, na_action="ignore") for name in _text_columns(frame)})


def _text_columns(frame: pd.DataFrame) -> list[str]:
    return [str(name) for name in frame if pd.api.types.is_string_dtype(frame[name]) or frame[name].dtype == object]


def _has_return(value: object) -> bool:
    return isinstance(value, str) and "\r" in value


def _shield(value: object) -> object:
    return harmless(value) if isinstance(value, str) else value


def _unshield(value: object) -> object:
    return unshielded(value) if isinstance(value, str) else value
