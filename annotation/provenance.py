"""Where a concept came from: one line per question and wording, which people read and code reads back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_QUOTED = r"'((?:[^'\\]|\\.)*)'"
_LINE = re.compile(
    rf"(?:all images|class {_QUOTED}|{_QUOTED} against {_QUOTED})(?: \(round (\d+)\))?: \"((?:[^\"\\]|\\.)*)\"",
    re.DOTALL,
)


@dataclass(frozen=True)
class Source:
    """One question and the words with which it named a concept."""

    class_name: str | None
    """The class that was asked about; None: unlabelled images."""
    against: str | None = None
    """The class it was to be told from, in a question about a pair."""
    round_number: int = 1
    """Which of the rounds, each with other images."""
    words: str = ""
    """The concept's name as it was proposed."""

    @property
    def line(self) -> str:
        """The source for people, such as `class 'melanoma' (round 1): "irregular borders"`."""
        words = _escaped(self.words, '"')
        if self.class_name is None:
            return f'all images (round {self.round_number}): "{words}"'
        name = _escaped(self.class_name, "'")
        if self.against is None:
            return f"class '{name}' (round {self.round_number}): \"{words}\""
        return f"'{name}' against '{_escaped(self.against, chr(39))}': \"{words}\""


def sources_of(lines: Any) -> list[Source]:
    """The sources in a cell of the column `provenance`; none for a null cell or for lines in other words."""
    # A null list is None or NaN, depending on its neighbours; only lists have a length.
    found = map(_LINE.fullmatch, lines if isinstance(lines, Iterable) and not isinstance(lines, str) else [])
    return [_source(match) for match in found if match is not None]


def _source(match: re.Match[str]) -> Source:
    alone, name, against, round_number, words = (None if x is None else _unescaped(x) for x in match.groups())
    return Source(name if alone is None else alone, against, int(round_number or 1), words or "")


def _escaped(text: str, quote: str) -> str:
    return text.replace("\\", "\\\\").replace(quote, "\\" + quote)


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)
