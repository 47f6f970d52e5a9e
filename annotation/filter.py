"""The paper's concept filters: length, likeness to a class, likeness to another concept, and presence in images.

Two things are added that text embeddings do not tell. A lexicon knows names of what no image shows, and class names
in other words. And opposites, like values of one exclusive group, never drop one another: `left` and `right` are
close in text space, and both are wanted.

Every decision leaves its reason and nearest neighbour in the `concepts` table. Concepts that a person gave are never
dropped for their words, and others give way to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from annotation.wording import mentions, normalise, not_visual_word, opposes
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


@dataclass(frozen=True)
class _Candidate:
    """What the filters look at."""

    concept_id: str
    name: str
    group: str | None
    origin: str

    def excludes(self, other: _Candidate) -> bool:
        """Whether both are wanted however close their texts are."""
        return (self.group is not None and self.group == other.group) or opposes(self.name, other.name)


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
    candidates = [_candidate(concepts, row) for row in order]
    vectors = _unit(embed([*(c.name for c in candidates), *class_names])) if candidates else np.zeros((0, 1))
    like_class = vectors[: len(candidates)] @ vectors[len(candidates) :].T
    kept: list[int] = []
    decisions: dict[int, _Decision] = {}
    for k, row in enumerate(order):
        if concepts["status"].iloc[row] != ConceptStatus.KEPT:
            continue
        others = [candidates[j] for j in kept]
        to_others = vectors[kept] @ vectors[k] if kept else np.zeros(0)
        decision = _nearest_of([c.concept_id for c in others], to_others)
        if candidates[k].origin not in _BY_A_PERSON:
            to_class = _nearest_class(candidates[k], class_names, like_class[k])
            rival = _rival(candidates[k], others, to_others, options)
            decision = _decide(candidates[k].name, to_class, rival, decision, options)
        decisions[row] = decision
        if decision.reason is None:
            kept.append(k)
    return _without_lone_values(_with_decisions(concepts, decisions, [order[k] for k in kept]))


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
    # Groups stay: what is unseen is still asked for, and another question would be paid for again.
    return _with_decisions(concepts, decisions, kept)


def _candidate(concepts: pd.DataFrame, row: int) -> _Candidate:
    found = concepts.iloc[row]
    group = None if pd.isna(found["group"]) else str(found["group"])
    return _Candidate(str(found["concept_id"]), str(found["name"]), group, str(found["origin"]))


def _decide(name: str, to_class: _Decision, rival: _Decision, nearest: _Decision, options: FilterOptions) -> _Decision:
    """The first reason to drop, else `nearest`; `to_class` and `rival` come with their reason, if they have one."""
    word = not_visual_word(name)
    if word is not None:
        return _Decision(DropReason.NOT_VISUAL, word)
    if len(name) > options.max_name_characters:
        closest = max(nearest, to_class, key=lambda d: -np.inf if d.similarity is None else d.similarity)
        return _Decision(DropReason.TOO_LONG, closest.nearest, closest.similarity)
    if to_class.reason is not None or (to_class.similarity or -1.0) > options.like_class_cosine:
        return _Decision(DropReason.LIKE_A_CLASS, to_class.nearest, to_class.similarity)
    return nearest if rival.reason is None else rival


def _nearest_class(candidate: _Candidate, class_names: Sequence[str], cosines: npt.NDArray[np.floating]) -> _Decision:
    """The class a name is closest to; with its reason when the words alone say that it is the class."""
    # The embedded endpoint never sees a class name: where its fixed words meet one, that is chance.
    is_blind = candidate.origin == ConceptOrigin.EMBEDDED
    for class_name, cosine in zip(class_names, cosines, strict=True):
        is_class = normalise(candidate.name).key == normalise(class_name).key
        if is_class or (not is_blind and mentions(candidate.name, class_name)):
            return _Decision(DropReason.LIKE_A_CLASS, class_name, float(cosine))
    return _nearest_of(class_names, cosines)


def _rival(
    candidate: _Candidate, kept: Sequence[_Candidate], cosines: npt.NDArray[np.floating], options: FilterOptions
) -> _Decision:
    """The kept concept that makes this one superfluous: the same thing in other words, or else the closest in text."""
    key = normalise(candidate.name).key
    same = [j for j, other in enumerate(kept) if normalise(other.name).key == key]
    # Looked up only for those that are close: comparing words takes longer than comparing vectors.
    above = map(int, np.flatnonzero(cosines > options.like_each_other_cosine))
    close = [j for j in above if not kept[j].excludes(candidate)]
    chosen = same or sorted(close, key=lambda j: -cosines[j])
    if not chosen:
        return _Decision()
    return _Decision(DropReason.LIKE_ANOTHER, kept[chosen[0]].concept_id, float(cosines[chosen[0]]))


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


def _without_lone_values(concepts: pd.DataFrame) -> pd.DataFrame:
    """The table where a proposed concept, left alone in its exclusive group, has no group: it excludes nothing now."""
    kept = concepts["status"] == ConceptStatus.KEPT
    n_members = concepts["group"].where(kept).groupby(concepts["group"]).transform("count")
    is_lone = kept & (n_members == 1) & ~concepts["origin"].isin(_BY_A_PERSON)
    if not is_lone.any():
        return concepts
    return concepts.assign(group=concepts["group"].astype("object").mask(is_lone, None))


def _unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12), dtype=np.float32)
