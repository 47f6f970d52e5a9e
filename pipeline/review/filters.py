"""Which images the grid shows, in which order: the whole state of the page, its address, and its SQL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlencode

from data_contracts.concepts import Vocabulary
from data_contracts.tables import State
from pipeline.review.wide import (
    CODE,
    DISAGREEMENT_STEPS,
    DISPUTED,
    PROBABILITY_STEPS,
    dispute,
    doubt,
    is_state,
)

SORTS = {"": "as in the folder", "uncertain": "most uncertain first", "disputed": "most disputed first"}
DISPUTES = {"witnesses": "the machine’s witnesses disagree", "reviewers": "reviewers disagree"}
MAX_WORDS = 8
"""Words of a text search that count; more would only narrow an already narrow search."""


@dataclass(frozen=True)
class Filters:
    """Which images, in which order, from where on."""

    label: str = ""
    split: str = ""
    concept: str = ""
    state: str = ""
    dispute: str = ""
    low: str = ""
    """Lowest probability of the concept, in percent."""
    high: str = ""
    """Highest probability of the concept, in percent."""
    text: str = ""
    """Words that all occur in the path, the class or the evidence."""
    expert: str = ""
    """`yes`: an expert spoke; `no`: nobody did yet."""
    sort: str = ""
    after: str = ""
    """The page begins behind the image at this place of the folder."""
    before: str = ""
    """The page ends in front of the image at this place of the folder."""

    def query(self, **changes: object) -> str:
        """The query string of these filters, with changes; empty for the plain grid."""
        kept = {k: v for k, v in {**self.__dict__, **changes}.items() if v not in ("", None)}
        return f"?{urlencode(kept)}" if kept else ""

    def within(self, **changes: object) -> str:
        """As `query`, but from the first image on."""
        return self.query(**{"after": "", "before": "", **changes})

    def hidden(self) -> Filters:
        """What is left of the filters in audit mode: nothing that tells what the machine or the class says."""
        return Filters(split=self.split, expert=self.expert, after=self.after, before=self.before)


class Condition(NamedTuple):
    """A WHERE clause over `cells` and its parameters."""

    sql: str
    parameters: list[Any]


def condition(
    filters: Filters, vocabulary: Vocabulary, numbers: dict[str, int], labels: Sequence[str] = ()
) -> Condition:
    """The images that pass; `numbers` are the columns of the concepts, `labels` all classes.

    What is no valid choice narrows nothing.
    """
    k = numbers.get(filters.concept) if filters.concept in vocabulary else None
    parts: list[Condition] = []
    for column in ("label", "split"):
        if wanted := getattr(filters, column):
            parts.append(Condition(f"{column} = ?", [wanted]))
    if filters.state in CODE:
        parts.append(Condition(_state(filters.state, k, len(numbers)), []))
    if filters.expert in ("yes", "no"):
        spoke = "n_expert > 0" if k is None else f"s{k} >= 4"
        parts.append(Condition(spoke if filters.expert == "yes" else f"NOT ({spoke})", []))
    if filters.dispute == "witnesses":
        column = "worst" if k is None else f"({dispute(k)})"
        parts.append(Condition(f"{column} >= {round(DISPUTED * DISAGREEMENT_STEPS)}", []))
    if filters.dispute == "reviewers":
        only = "" if k is None else " WHERE concept = ?"
        parts.append(
            Condition(f"position IN (SELECT position FROM contested{only})", [] if k is None else [filters.concept])
        )
    parts += _range(filters, k)
    parts += [_word(word, labels) for word in filters.text.lower().split()[:MAX_WORDS]]
    return Condition(
        " AND ".join(f"({part.sql})" for part in parts) or "true", [p for c in parts for p in c.parameters]
    )


def order(filters: Filters, vocabulary: Vocabulary, numbers: dict[str, int]) -> str:
    """SQL of the number that sorts, highest first; ties and the plain order follow the folder."""
    k = numbers.get(filters.concept) if filters.concept in vocabulary else None
    if filters.sort == "uncertain":
        return "doubt" if k is None else f"({doubt(k)})"
    if filters.sort == "disputed":
        return "dispute" if k is None else f"({dispute(k)})"
    return "0"


def _state(state: str, k: int | None, n_concepts: int) -> str:
    if k is not None:
        return is_state(k, state)
    if state == State.NOT_ASSESSED:
        return f"n_present + n_absent + n_uncertain < {n_concepts}"
    return f"n_{state} > 0"


def _range(filters: Filters, k: int | None) -> list[Condition]:
    """Limits of the probability; they mean nothing without a concept."""
    if k is None:
        return []
    low, high = percent_of(filters.low), percent_of(filters.high)
    limits = []
    if low is not None:
        limits.append(Condition(f"p{k} >= ?", [round(low / 100 * PROBABILITY_STEPS)]))
    if high is not None:
        limits.append(Condition(f"p{k} <= ?", [round(high / 100 * PROBABILITY_STEPS)]))
    return limits


def percent_of(text: str) -> float | None:
    """A percentage between 0 and 100, or None for anything else."""
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) and 0 <= value <= 100 else None


def _word(word: str, labels: Sequence[str]) -> Condition:
    """In the path, in the class, or the beginning of a word of the evidence."""
    classes = [label for label in labels if word in label.lower()]
    return Condition(
        "contains(path_lower, ?) OR label IN (SELECT unnest(?::VARCHAR[])) OR position IN "
        "(SELECT position FROM mentions WHERE word >= ? AND word < ?)",
        [word, classes, word, word + "\U0010ffff"],
    )
