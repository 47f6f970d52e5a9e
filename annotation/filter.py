"""The paper's concept filters: length, likeness to a class, likeness to another concept, and presence in images.

Every decision leaves its reason and nearest neighbour in the `concepts` table. Concepts that a person gave are never
dropped for their words, and others give way to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_contracts.errors import DropReason
from data_contracts.ports import TextEmbedder
from data_contracts.tables import ConceptOrigin, ConceptStatus

_BY_A_PERSON = (ConceptOrigin.USER.value, ConceptOrigin.GIVEN.value)


@dataclass(frozen=True)
class FilterOptions:
    """Thresholds of the filters, with the paper's values."""

    max_name_characters: int = 30
    """Longest concept name."""
    like_class_cosine: float = 0.85
    """A concept whose text is closer to a class name than this is the class, not an attribute."""
    like_each_other_cosine: float = 0.90
    """Of two concepts closer than this only the first stays."""
    projection_min_similarity: float | None = None
    """A concept whose image similarity stays below this on every image is dropped; depends on the aligner (0.45 is
    BioViL's), so there is no general value; none: no such filter."""


@dataclass
class _Decision:
    reason: DropReason | None = None
    nearest: str | None = None
    similarity: float | None = None


def filter_concepts(
    concepts: pd.DataFrame,
    class_names: Sequence[str],
    embed: TextEmbedder,
    options: FilterOptions | None = None,
) -> pd.DataFrame:
    """The `concepts` table with status, reason, nearest neighbour, its cosine, and positions of what is kept.

    Concepts already dropped stay dropped. `nearest` names a class or a concept id: the one that decided, or for a
    kept concept the closest kept one.
    """
    options = options or FilterOptions()
    order = _persons_first(concepts)
    names = [str(concepts["name"].iloc[i]) for i in order]
    ids = [str(concepts["concept_id"].iloc[i]) for i in order]
    vectors = _unit(embed([*names, *class_names])) if names else np.zeros((0, 1), np.float32)
    like_class = vectors[: len(names)] @ vectors[len(names) :].T
    kept: list[int] = []
    decisions: dict[int, _Decision] = {}
    for k, row in enumerate(order):
        if concepts["status"].iloc[row] != ConceptStatus.KEPT:
            continue
        given = concepts["origin"].iloc[row] in _BY_A_PERSON
        decision = _nearest_of([ids[j] for j in kept], vectors[kept] @ vectors[k] if kept else np.zeros(0))
        if not given:
            decision = _decide(names[k], decision, like_class[k], class_names, options)
        decisions[row] = decision
        if decision.reason is None:
            kept.append(k)
    return _with_decisions(concepts, decisions, [order[k] for k in kept])


def drop_unseen(
    concepts: pd.DataFrame, max_similarity_by_id: Mapping[str, float], options: FilterOptions
) -> pd.DataFrame:
    """The table without kept concepts whose greatest image similarity stays below the threshold (projection filter)."""
    threshold = options.projection_min_similarity
    if threshold is None:
        return concepts
    decisions: dict[int, _Decision] = {}
    kept: list[int] = []
    for row in _kept_in_order(concepts):
        greatest = max_similarity_by_id.get(concepts["concept_id"].iloc[row])
        given = concepts["origin"].iloc[row] in _BY_A_PERSON
        if greatest is None or greatest >= threshold or given:
            kept.append(row)
        else:
            decisions[row] = _Decision(DropReason.NOT_SEEN_IN_ANY_IMAGE, None, float(greatest))
    return _with_decisions(concepts, decisions, kept)


def _decide(
    name: str,
    nearest: _Decision,
    like_class: npt.NDArray[np.float32],
    class_names: Sequence[str],
    options: FilterOptions,
) -> _Decision:
    if len(name) > options.max_name_characters:
        return _Decision(DropReason.TOO_LONG, nearest.nearest, nearest.similarity)
    to_class = _nearest_of(class_names, like_class)
    if to_class.similarity is not None and to_class.similarity > options.like_class_cosine:
        return _Decision(DropReason.LIKE_A_CLASS, to_class.nearest, to_class.similarity)
    if nearest.similarity is not None and nearest.similarity > options.like_each_other_cosine:
        return _Decision(DropReason.LIKE_ANOTHER, nearest.nearest, nearest.similarity)
    return nearest


def _nearest_of(names: Sequence[str], cosines: npt.NDArray[np.floating]) -> _Decision:
    if not len(names):
        return _Decision()
    best = int(np.argmax(cosines))
    return _Decision(None, names[best], float(cosines[best]))


def _persons_first(concepts: pd.DataFrame) -> list[int]:
    """Row numbers: what a person gave first, then the order in which concepts were proposed."""
    given = concepts["origin"].isin(_BY_A_PERSON).to_numpy()
    return sorted(range(len(concepts)), key=lambda i: (not given[i], i))


def _kept_in_order(concepts: pd.DataFrame) -> list[int]:
    rows = np.flatnonzero((concepts["status"] == ConceptStatus.KEPT).to_numpy())
    return [int(r) for r in rows[np.argsort(concepts["position"].to_numpy(dtype=float)[rows], kind="stable")]]


def _with_decisions(concepts: pd.DataFrame, decisions: Mapping[int, _Decision], kept: Sequence[int]) -> pd.DataFrame:
    """A copy of the table with the decisions written in, and positions counted anew over `kept`."""
    columns: dict[str, list[object]] = {
        name: list(concepts[name]) for name in ("status", "reason", "nearest", "similarity")
    }
    for row, decision in decisions.items():
        status = ConceptStatus.KEPT if decision.reason is None else ConceptStatus.DROPPED
        columns["status"][row] = status.value
        columns["reason"][row] = None if decision.reason is None else decision.reason.value
        columns["nearest"][row], columns["similarity"][row] = decision.nearest, decision.similarity
    place = {row: position for position, row in enumerate(kept)}
    result = concepts.copy()
    for name, values in columns.items():
        result[name] = pd.Series(values, index=result.index, dtype="float64" if name == "similarity" else "object")
    result["position"] = pd.array([place.get(row) for row in range(len(result))], dtype="Int64")
    return result


def _unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12), dtype=np.float32)
