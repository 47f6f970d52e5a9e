"""Which kept concepts tell which classes apart, as far as the questions say in which they were proposed.

A concept speaks for a class when it was proposed for it, and against a class when its absence was. It tells two
classes apart when it does not say the same of both, or when it was the answer to what tells these two apart. What
the images say is measured later; this report comes before anything is spent on judging.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from annotation.provenance import Source, sources_of
from annotation.wording import normalise
from data_contracts.tables import ConceptStatus

COLUMNS = ["class_a", "class_b", "n_distinguishing", "concept_ids"]

_NEXT_STEP = "Give concepts with --concepts FILE, or raise concepts.proposed_per_class or concepts.rounds."
_MOST_NAMED = 5


def coverage(concepts: pd.DataFrame, class_names: Sequence[str]) -> pd.DataFrame:
    """One row per pair of classes: `class_a`, `class_b`, `n_distinguishing`, and the `concept_ids` that do.

    Only kept concepts count, in their order. Concepts of which nobody said for which class they are (those that a
    person gave) tell nothing apart here.
    """
    kept = concepts[concepts["status"] == ConceptStatus.KEPT].sort_values("position", kind="stable")
    ids = _telling(kept, class_names)
    rows = [(a, b, len(ids[a, b]), ids[a, b]) for a, b in combinations(class_names, 2)]
    return pd.DataFrame(rows, columns=COLUMNS)


def uncovered(concepts: pd.DataFrame, class_names: Sequence[str]) -> list[str]:
    """What coverage lacks, as sentences for people with a next step; empty when nothing does.

    Also empty when no kept concept says for which class it is, as with concepts that a person gave: then there is
    nothing to report from.
    """
    kept = concepts[concepts["status"] == ConceptStatus.KEPT]
    if len(class_names) < 2 or not _stances(kept, class_names).any():
        return []
    table = coverage(concepts, class_names)
    dropped = _telling(concepts[concepts["status"] == ConceptStatus.DROPPED], class_names)
    bare = table[table["n_distinguishing"] == 0]
    pairs = list(zip(bare["class_a"], bare["class_b"], strict=True))
    silent = [c for c in class_names if not _speaks_for(kept, c, class_names)]
    return [_about_class(c, concepts) for c in silent] + _about_pairs(pairs, dropped)


def _telling(concepts: pd.DataFrame, class_names: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """Pair of classes → ids of the given concepts that tell them apart, in their order."""
    stances = _stances(concepts, class_names)
    ids = [str(i) for i in concepts["concept_id"]]
    column = {name: j for j, name in enumerate(class_names)}
    asked: dict[frozenset[str | None], list[int]] = {}
    for i, sources in enumerate(_sources(concepts)):
        for source in sources:
            asked.setdefault(frozenset((source.class_name, source.against)), []).append(i)
    found = {}
    for a, b in combinations(class_names, 2):
        tells = stances[:, column[a]] != stances[:, column[b]]
        tells[asked.get(frozenset((a, b)), [])] = True
        found[a, b] = [ids[i] for i in np.flatnonzero(tells)]
    return found


def _stances(concepts: pd.DataFrame, class_names: Sequence[str]) -> npt.NDArray[np.int8]:
    """(concepts × classes): 1 where a concept was proposed for a class, -1 where its absence was, else 0."""
    stances = np.zeros((len(concepts), len(class_names)), np.int8)
    column = {name: j for j, name in enumerate(class_names)}
    rows = zip(_sources(concepts), concepts["proposed_for"], strict=True)
    for i, (sources, proposed_for) in enumerate(rows):
        signs: dict[str, set[int]] = {}
        for source in sources:
            if source.class_name is not None:
                signs.setdefault(source.class_name, set()).add(-1 if normalise(source.words).negated else 1)
        if not sources:
            signs = {str(name): {1} for name in proposed_for}
        for name, found in signs.items():
            # Both at once say nothing.
            if name in column:
                stances[i, column[name]] = sum(found)
    return stances


def _sources(concepts: pd.DataFrame) -> list[list[Source]]:
    lines: Iterable[Any] = concepts["provenance"] if "provenance" in concepts else [None] * len(concepts)
    return [sources_of(cell) for cell in lines]


def _speaks_for(kept: pd.DataFrame, class_name: str, class_names: Sequence[str]) -> bool:
    return bool(_stances(kept, class_names)[:, list(class_names).index(class_name)].any())


def _about_class(class_name: str, concepts: pd.DataFrame) -> str:
    dropped = concepts[concepts["status"] == ConceptStatus.DROPPED]
    rows = zip(dropped["name"], dropped["reason"], dropped["proposed_for"], strict=True)
    why = [f"{name} ({reason})" for name, reason, proposed_for in rows if class_name in proposed_for]
    lost = f" Dropped were: {_listed(why)}." if why else ""
    return (
        f"Class {class_name!r}: no kept concept was proposed for it, so only what it lacks can tell it from other "
        f"classes.{lost} {_NEXT_STEP}"
    )


def _about_pairs(pairs: Sequence[tuple[str, str]], dropped: dict[tuple[str, str], list[str]]) -> list[str]:
    """A sentence per pair; one for all of them when they are many."""
    if len(pairs) > _MOST_NAMED:
        named = _listed([f"{a!r} and {b!r}" for a, b in pairs])
        return [f"{len(pairs)} pairs of classes: no kept concept tells them apart ({named}). {_NEXT_STEP}"]
    found = []
    for pair in pairs:
        lost = f" Dropped ones would: {_listed(dropped[pair])}." if dropped[pair] else ""
        found.append(f"Classes {pair[0]!r} and {pair[1]!r}: no kept concept tells them apart.{lost} {_NEXT_STEP}")
    return found


def _listed(items: Sequence[str]) -> str:
    rest = len(items) - _MOST_NAMED
    return ", ".join(items[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
