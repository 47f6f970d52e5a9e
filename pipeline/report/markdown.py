"""Markdown that says what was meant: text from tables and files cannot become markup, nor break a table."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jinja2

from pipeline.report import words

PACKAGE = "pipeline.report"

_SPECIAL = re.compile(r"([\\`*_\[\]|#])")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def escaped(value: Any) -> Any:
    """A string on one line with Markdown's and HTML's signs escaped; everything else as it is."""
    if not isinstance(value, str) or isinstance(value, Markdown):
        return value
    return _SPECIAL.sub(r"\\\1", " ".join(value.split())).translate(_ENTITIES)


class Markdown(str):
    """Text that is Markdown already and stays as it is."""

    __slots__ = ()


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markdown:
    """A pipe table; numbers are written as they come, so format them before."""
    lines = [headers, ["---"] * len(headers), *rows]
    cells = [[str(cell) if line is lines[1] else str(escaped(_text(cell))) for cell in line] for line in lines]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in cells))


def interval(value: Any, low: Any, high: Any, digits: int = 3) -> str:
    """`0.944 (0.923 to 0.960)`; without an interval, the number alone."""
    if not (words.known(low) and words.known(high)):
        return words.decimal(value, digits)
    return f"{words.decimal(value, digits)} ({words.decimal(low, digits)} to {words.decimal(high, digits)})"


@functools.cache
def environment() -> jinja2.Environment:
    """Templates whose every value is escaped for Markdown, strict about what is missing."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader(PACKAGE),
        autoescape=False,  # `finalize` escapes, for Markdown
        undefined=jinja2.StrictUndefined,
        finalize=escaped,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters.update(words.FILTERS)
    return found


def _text(cell: Any) -> str:
    is_missing = cell is None or (isinstance(cell, float) and math.isnan(cell))
    return words.NOTHING if is_missing else str(cell)
