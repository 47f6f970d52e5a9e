"""One image's cells as the page shows them: what stands, and what each witness said."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any

from data_contracts.store import RunFolder
from data_contracts.tables import State, Witness
from pipeline.review import queries
from pipeline.review.experts import UNDO, events, standing
from pipeline.review.index import Index
from pipeline.review.ledger import Reviewer
from pipeline.review.site import Site
from pipeline.review.wide import DISPUTED
from pipeline.review.witnesses import Map, maps_of, said_by_witnesses

_NOTHING: dict[str, Any] = {
    "state": State.NOT_ASSESSED,
    "by_expert": False,
    "probability": None,
    "disagreement": 0.0,
}


def rows_of(site: Site, index: Index, position: int, image_id: str, reviewer: Reviewer) -> list[dict[str, Any]]:
    """One row a concept. In audit mode it holds nothing but the reviewer's own word."""
    said = events(index.cursor(), position)
    if reviewer.is_blind:
        return [_blind_row(concept, said, reviewer) for concept in site.vocabulary]
    machine = _latest(said_by_witnesses(index.cursor(), site.run, position, image_id))
    maps = maps_of(index.cursor(), site.run, position, image_id)
    states = queries.cells(index, [position])[position]
    rows = []
    for concept in site.vocabulary:
        k, c = index.numbers.get(concept.concept_id), concept.concept_id
        experts = _standing_by_reviewer(said, c)
        aligned = _alignment(maps.get(c))
        cell = _NOTHING if k is None else states[k]
        rows.append(
            {
                "concept": concept,
                **cell,
                "is_disputed": not cell["by_expert"] and cell["disagreement"] >= DISPUTED,
                "has_map": c in maps and maps[c].grid is not None,
                "witnesses": [*machine.get(c, []), *aligned, *map(_expert, experts.values())],
                "reviewers_differ": len({word["state"] for word in experts.values()}) > 1,
                "can_undo": reviewer.name in experts,
                "n_said": sum(row["concept"] == c for row in said),
            }
        )
    return rows


def row_of(
    site: Site, index: Index, position: int, image_id: str, concept_id: str, reviewer: Reviewer
) -> dict[str, Any]:
    """One of `rows_of`."""
    rows = rows_of(site, index, position, image_id, reviewer)
    return rows[site.vocabulary.position(concept_id)]


def history_of(run: RunFolder, index: Index, position: int, image_id: str, concept_id: str) -> list[dict[str, Any]]:
    """Every row of the ledger about one cell, oldest first: who, what, when, and whether it takes something back."""
    machine = [
        {
            "at": row["created_at"],
            "who": f"{row['witness']} ({row['witness_model']})",
            "state": row["state"],
            "probability": row["probability"],
            "evidence": row["evidence"],
            "is_undo": False,
        }
        for row in said_by_witnesses(index.cursor(), run, position, image_id)
        if row["concept_id"] == concept_id
    ]
    people = [
        {
            "at": _time(row["at_us"]),
            "who": row["reviewer"],
            "state": row["state"],
            "probability": None,
            "evidence": row["evidence"],
            "is_undo": str(row["request_id"]).startswith(UNDO),
        }
        for row in events(index.cursor(), position, concept_id)
    ]
    all_of_them: list[dict[str, Any]] = [*machine, *people]
    return sorted(all_of_them, key=itemgetter("at"))


def _blind_row(concept: Any, said: list[dict[str, Any]], reviewer: Reviewer) -> dict[str, Any]:
    mine = _standing_by_reviewer(said, concept.concept_id).get(reviewer.name)
    state = State.NOT_ASSESSED if mine is None else State(mine["state"])
    return {
        "concept": concept,
        **_NOTHING,
        "state": state,
        "is_disputed": False,
        "has_map": False,
        "witnesses": [],
        "reviewers_differ": False,
        "can_undo": mine is not None,
        "n_said": 0,
    }


def _latest(said: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Concept id → the last word of every witness, if it is one."""
    last = {(row["concept_id"], row["witness"], row["witness_model"]): row for row in said}
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (concept_id, witness, model), row in last.items():
        if row["state"] != State.NOT_ASSESSED:
            found[concept_id].append(
                {
                    "who": witness,
                    "name": witness,
                    "title": f"{model}, {row['created_at']:%Y-%m-%d %H:%M} UTC",
                    "state": row["state"],
                    "probability": row["probability"],
                    "evidence": row["evidence"],
                }
            )
    return found


def _standing_by_reviewer(said: list[dict[str, Any]], concept_id: str) -> dict[str, dict[str, Any]]:
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in said:
        if row["concept"] == concept_id:
            rows[row["reviewer"]].append(row)
    stacks = {reviewer: standing(mine) for reviewer, mine in rows.items()}
    return {
        reviewer: dict(stack[-1])
        for reviewer, stack in stacks.items()
        if stack and stack[-1]["state"] != State.NOT_ASSESSED
    }


def _expert(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "who": Witness.EXPERT.value,
        "name": row["reviewer"],
        "title": f"{_time(row['at_us']):%Y-%m-%d %H:%M} UTC",
        "state": row["state"],
        "probability": None,
        "evidence": row["evidence"],
    }


def _alignment(found: Map | None) -> list[dict[str, Any]]:
    """The aligner's word: a number, for it takes no side."""
    if found is None or found.probability is None:
        return []
    return [
        {
            "who": Witness.ALIGNMENT.value,
            "name": Witness.ALIGNMENT.value,
            "title": "the aligner’s score for the concept in these pixels",
            "state": None,
            "probability": found.probability,
            "evidence": None,
        }
    ]


def _time(at_us: int) -> datetime:
    return datetime.fromtimestamp(at_us / 1e6, UTC)
