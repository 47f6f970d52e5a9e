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
_MAX_REMEMBERED = 200
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


class _Found(NamedTuple):
    """Some images in order, and how many pass all filters, and how many of those come before them."""

    positions: list[int]
    n_found: int
    n_before: int


class _Search(NamedTuple):
    """Filters as SQL, and where a page begins: a place in the order, not a number of rows to skip."""

    cursor: duckdb.DuckDBPyConnection
    where: Condition
    key: str

    def first(self, n: int) -> _Found:
        """The first images."""
        positions, n_found, _ = self._ask(n, "true", "false", ())
        return _Found(positions, n_found, 0)

    def after(self, position: int, n: int) -> _Found:
        """The images behind one."""
        _, after, parameters = self._around(position)
        positions, n_found, n_before = self._ask(n, after, f"NOT {after}", parameters)
        return _Found(positions, n_found, n_before)

    def before(self, position: int, n: int) -> _Found:
        """The images in front of one."""
        before, _, parameters = self._around(position)
        positions, n_found, n_before = self._ask(n, before, before, parameters, backwards=True)
        return _Found(positions, n_found, max(0, n_before - len(positions)))

    def _around(self, position: int) -> tuple[str, str, tuple[Any, ...]]:
        """SQL of what comes before and after the image at `position`, and the parameters of either."""
        rows = self.cursor.execute(f"SELECT {self.key} FROM images WHERE position = ?", [position]).fetchall()
        value = rows[0][0] if rows else 0
        before, after = ((f"(key {a} ? OR (key = ? AND position {b} ?))") for a, b in (("> ", "<"), ("<", ">")))
        return before, after, (value, value, position)

    def _ask(
        self, n: int, taken: str, counted: str, parameters: tuple[Any, ...], *, backwards: bool = False
    ) -> tuple[list[int], int, int]:
        """`n` positions of those `taken`, how many pass, and how many of these are `counted`: filters run once."""
        sort = "key ASC, position DESC" if backwards else "key DESC, position ASC"
        again = parameters if counted != "false" else ()
        sql = f"""
            WITH passing AS MATERIALIZED (SELECT position, {self.key} AS key FROM images WHERE {self.where.sql}),
                 taken AS (SELECT position, key FROM passing WHERE {taken} ORDER BY {sort} LIMIT {n})
            SELECT (SELECT list(position ORDER BY {sort}) FROM taken), (SELECT count(*) FROM passing),
                   (SELECT count(*) FROM passing WHERE {counted})
        """
        row = self.cursor.execute(sql, [*self.where.parameters, *parameters, *again]).fetchall()[0]
        found = [int(p) for p in row[0] or ()]
        return found[::-1] if backwards else found, int(row[1]), int(row[2])


def _search(index: Index, vocabulary: Vocabulary, filters: Filters) -> _Search:
    numbers = index.numbers
    where = condition(filters, vocabulary, numbers, index.labels)
    return _Search(index.cursor(), where, order(filters, vocabulary, numbers))


def page(index: Index, vocabulary: Vocabulary, filters: Filters) -> Page:
    """One page of the grid."""
    search = _search(index, vocabulary, filters)
    if filters.before.isdigit():
        found = search.before(int(filters.before), PAGE_SIZE)
    elif filters.after.isdigit():
        found = search.after(int(filters.after), PAGE_SIZE)
    else:
        found = search.first(PAGE_SIZE)
    return Page(_cards(index, vocabulary, filters, found.positions), found.n_found, found.n_before)


def neighbours(index: Index, vocabulary: Vocabulary, filters: Filters, position: int) -> Neighbours:
    """The images before and after one, among those that pass."""
    search = _search(index, vocabulary, filters)
    previous, following = search.before(position, 1), search.after(position, 1)
    # What is neither in front of it nor behind it is the image itself, if it passes.
    passes = following.n_before > previous.n_before + len(previous.positions)
    ids = {row["position"]: row["image_id"] for row in described(index, previous.positions + following.positions)}
    before, after = ([ids[p] for p in found.positions] for found in (previous, following))
    place = following.n_before if passes else 0
    return Neighbours(before[0] if before else None, after[0] if after else None, place, previous.n_found)


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
    where = condition(filters, vocabulary, index.numbers, index.labels)
    shown = [c for c in concepts if c in index.numbers]
    sums = [
        f"sum(({is_state(index.numbers[c], state)})::INT)" for c in shown for state in (State.PRESENT, State.ABSENT)
    ]
    sql = (
        f"SELECT {', '.join(['label', 'count(*)', *sums])} FROM images WHERE {where.sql} GROUP BY label ORDER BY label"
    )
    key = (sql, repr(where.parameters))
    rows = index.memo.get(key) or index.cursor().execute(sql, where.parameters).fetchall()
    if len(index.memo) < _MAX_REMEMBERED:
        index.memo[key] = rows
    return [
        Prevalence(row[0], row[1], {c: (int(row[2 + 2 * n]), int(row[3 + 2 * n])) for n, c in enumerate(shown)})
        for row in rows
    ]


def split_counts(index: Index, vocabulary: Vocabulary, filters: Filters) -> list[tuple[str | None, str | None, int]]:
    """(class, split, images) of the images that pass."""
    where = condition(filters, vocabulary, index.numbers, index.labels)
    sql = f"SELECT label, split, count(*) FROM images WHERE {where.sql} GROUP BY ALL ORDER BY ALL"
    return index.cursor().execute(sql, where.parameters).fetchall()
