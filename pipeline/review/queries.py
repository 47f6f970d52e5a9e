"""What the page shows of many images: pages of the grid, neighbours, counts and prevalence per class."""

from __future__ import annotations

from typing import Any, NamedTuple

import duckdb

from data_contracts.concepts import Vocabulary
from data_contracts.tables import State
from pipeline.review.filters import Condition, Filters, condition, order
from pipeline.review.index import Index
from pipeline.review.wide import PROBABILITY_STEPS, by_expert, is_state, state_of

PAGE_SIZE = 60
_DESCRIBED = ("position", "image_id", "path", "label", "split", "group_id", "width_px", "height_px")


class Page(NamedTuple):
    """One page of the grid."""

    images: list[dict[str, Any]]
    n_found: int
    first: int
    """How many images come before this page."""

    @property
    def last(self) -> int:
        """Place of the last image on the page, from 1."""
        return self.first + len(self.images)


class Neighbours(NamedTuple):
    """An image among those that pass the filters."""

    before: str | None
    after: str | None
    place: int
    """From 1; 0 when the image itself does not pass."""
    n_found: int


class _Search(NamedTuple):
    """Filters as SQL, and where a page begins: a place in the order, not a number of rows to skip."""

    cursor: duckdb.DuckDBPyConnection
    where: Condition
    key: str

    def count(self, more: str = "true", parameters: tuple[Any, ...] = ()) -> int:
        sql = f"SELECT count(*) FROM images WHERE ({self.where.sql}) AND {more}"
        return int(self.cursor.execute(sql, [*self.where.parameters, *parameters]).fetchall()[0][0])

    def take(
        self, n: int, more: str = "true", parameters: tuple[Any, ...] = (), *, backwards: bool = False
    ) -> list[int]:
        direction = ("ASC", "DESC") if backwards else ("DESC", "ASC")
        sort = f"position {direction[1]}" if self.key == "0" else f"{self.key} {direction[0]}, position {direction[1]}"
        sql = f"SELECT position FROM images WHERE ({self.where.sql}) AND {more} ORDER BY {sort} LIMIT {n}"
        found = [int(p) for (p,) in self.cursor.execute(sql, [*self.where.parameters, *parameters]).fetchall()]
        return found[::-1] if backwards else found

    def around(self, position: int) -> tuple[str, str, tuple[Any, ...]]:
        """SQL of what comes before and after the image at `position`, and the parameters of either."""
        if self.key == "0":
            return "position < ?", "position > ?", (position,)
        rows = self.cursor.execute(f"SELECT {self.key} FROM images WHERE position = ?", [position]).fetchall()
        value = rows[0][0] if rows else 0
        before = f"({self.key} > ? OR ({self.key} = ? AND position < ?))"
        return before, f"({self.key} < ? OR ({self.key} = ? AND position > ?))", (value, value, position)


def _search(index: Index, vocabulary: Vocabulary, filters: Filters) -> _Search:
    numbers = index.numbers
    return _Search(index.cursor(), condition(filters, vocabulary, numbers), order(filters, vocabulary, numbers))


def page(index: Index, vocabulary: Vocabulary, filters: Filters) -> Page:
    """One page of the grid."""
    search = _search(index, vocabulary, filters)
    n_found = search.count()
    if filters.before.isdigit():
        before, _, parameters = search.around(int(filters.before))
        positions = search.take(PAGE_SIZE, before, parameters, backwards=True)
        first = max(0, search.count(before, parameters) - len(positions))
    elif filters.after.isdigit():
        before, after, parameters = search.around(int(filters.after))
        positions = search.take(PAGE_SIZE, after, parameters)
        first = n_found - search.count(after, parameters)
    else:
        positions, first = search.take(PAGE_SIZE), 0
    return Page(_cards(index, vocabulary, filters, positions), n_found, first)


def neighbours(index: Index, vocabulary: Vocabulary, filters: Filters, position: int) -> Neighbours:
    """The images before and after one, among those that pass."""
    search = _search(index, vocabulary, filters)
    before, after, parameters = search.around(position)
    previous = search.take(1, before, parameters, backwards=True)
    following = search.take(1, after, parameters)
    inside = search.count("position = ?", (position,))
    place = search.count(before, parameters) + 1 if inside else 0
    ids = {row["position"]: row["image_id"] for row in described(index, [*previous, *following])}
    return Neighbours(
        ids[previous[0]] if previous else None, ids[following[0]] if following else None, place, search.count()
    )


def matching_ids(index: Index, vocabulary: Vocabulary, filters: Filters, limit: int) -> list[str]:
    """Ids of the first images that pass, in order."""
    positions = _search(index, vocabulary, filters).take(limit)
    ids = {row["position"]: row["image_id"] for row in described(index, positions)}
    return [ids[p] for p in positions]


def described(index: Index, positions: list[int]) -> list[dict[str, Any]]:
    """Id, path, class, split and size of images; missing ones are None."""
    sql = f"SELECT {', '.join(_DESCRIBED)} FROM images WHERE position IN (SELECT unnest(?))"
    rows = index.cursor().execute(sql, [positions]).fetchall()
    return [dict(zip(_DESCRIBED, row, strict=True)) for row in rows]


def cells(index: Index, positions: list[int]) -> dict[int, list[dict[str, Any]]]:
    """Position → one entry a concept of the database: state, by_expert, probability, disagreement."""
    numbers = range(len(index.concept_ids))
    columns = ", ".join(["position", *(f"s{k}, p{k}, d{k}" for k in numbers)])
    sql = f"SELECT {columns} FROM images WHERE position IN (SELECT unnest(?))"
    rows = index.cursor().execute(sql, [positions]).fetchall()
    return {row[0]: [_cell(*row[1 + 3 * k : 4 + 3 * k]) for k in numbers] for row in rows}


def _cell(stored: int, probability: int | None, disagreement: int) -> dict[str, Any]:
    return {
        "state": state_of(stored),
        "by_expert": by_expert(stored),
        "probability": None if probability is None else probability / PROBABILITY_STEPS,
        "disagreement": disagreement / 250,
    }


def _cards(index: Index, vocabulary: Vocabulary, filters: Filters, positions: list[int]) -> list[dict[str, Any]]:
    images = {row["position"]: row for row in described(index, positions)}
    states = cells(index, positions)
    return [_card(images[p], states[p], index, vocabulary, filters) for p in positions]


def _card(
    image: dict[str, Any], states: list[dict[str, Any]], index: Index, vocabulary: Vocabulary, filters: Filters
) -> dict[str, Any]:
    known = [(vocabulary[c].name, states[k]) for c, k in index.numbers.items() if c in vocabulary]
    card = image | {
        "present": [name for name, cell in known if cell["state"] == State.PRESENT],
        "n_uncertain": sum(cell["state"] == State.UNCERTAIN for _, cell in known),
        "n_expert": sum(cell["by_expert"] for _, cell in known),
        "asked": None,
    }
    if filters.concept in vocabulary and filters.concept in index.numbers:
        card["asked"] = states[index.numbers[filters.concept]]
    return card


class Prevalence(NamedTuple):
    """How often a concept is present among the images of a class that have a label for it."""

    label: str | None
    n_images: int
    counts: dict[str, tuple[int, int]]
    """Concept id → (present, absent)."""


def prevalence(index: Index, vocabulary: Vocabulary, filters: Filters, concepts: list[str]) -> list[Prevalence]:
    """One row a class, of the images that pass."""
    where = condition(filters, vocabulary, index.numbers)
    shown = [c for c in concepts if c in index.numbers]
    sums = [
        f"sum(({is_state(index.numbers[c], state)})::INT)" for c in shown for state in (State.PRESENT, State.ABSENT)
    ]
    sql = (
        f"SELECT {', '.join(['label', 'count(*)', *sums])} FROM images WHERE {where.sql} GROUP BY label ORDER BY label"
    )
    rows = index.cursor().execute(sql, where.parameters).fetchall()
    return [
        Prevalence(row[0], row[1], {c: (int(row[2 + 2 * n]), int(row[3 + 2 * n])) for n, c in enumerate(shown)})
        for row in rows
    ]


def split_counts(index: Index, vocabulary: Vocabulary, filters: Filters) -> list[tuple[str | None, str | None, int]]:
    """(class, split, images) of the images that pass."""
    where = condition(filters, vocabulary, index.numbers)
    sql = f"SELECT label, split, count(*) FROM images WHERE {where.sql} GROUP BY ALL ORDER BY ALL"
    return index.cursor().execute(sql, where.parameters).fetchall()
