"""Adding to what a run already holds, without saying anything twice."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.store import RunFolder
from data_contracts.tables import ConceptOrigin, ConceptStatus, DropReason, vocabulary_of

# A judgement with all of these equal says the same thing again.
_SAME = ["image_id", "concept_id", "witness", "witness_model", "prompt_sha256", "state", "probability", "request_id"]


def append_new(run: RunFolder, judgements: pd.DataFrame) -> int:
    """Append the judgements whose newest counterpart in the ledger says something else; returns how many."""
    if judgements.empty:
        return 0
    source = ["image_id", "concept_id", "witness", "witness_model"]
    newest = run.read_judgements().drop_duplicates(source, keep="last")
    said = set(_rows(newest))
    fresh = judgements[[row not in said for row in _rows(judgements)]]
    run.append_judgements(fresh)
    return len(fresh)


def merge_concepts(stored: pd.DataFrame | None, added: pd.DataFrame) -> pd.DataFrame:
    """The stored concepts with `added` behind them; an id that is there already keeps its row."""
    if stored is None or stored.empty:
        return added
    new = added[~added["concept_id"].isin(stored["concept_id"])]
    if new.empty:
        return stored
    first = int(stored["position"].max()) + 1 if stored["position"].notna().any() else 0
    return pd.concat([stored, new.assign(position=range(first, first + len(new)))], ignore_index=True)


def keep_edits(stored: pd.DataFrame | None, proposed: pd.DataFrame) -> pd.DataFrame:
    """Newly proposed concepts, with what people added, renamed, merged, split or dropped before left as they put it."""
    if stored is None or stored.empty:
        return proposed
    edited = stored[[_is_edited(row) for row in stored.to_dict("records")]]
    if edited.empty:
        return proposed
    others = proposed[~proposed["concept_id"].isin(edited["concept_id"])]
    first = int(others["position"].max()) + 1 if others["position"].notna().any() else 0
    return pd.concat([others, edited.assign(position=range(first, first + len(edited)))], ignore_index=True)


_BY_A_PERSON = re.compile(
    r"(added|renamed|defined anew|dropped|kept|merged|split|edited|'.*' merged into it)\b.* (by|in) "
)


def _is_edited(row: Mapping[Hashable, Any]) -> bool:
    """Whether a person's hand shows: in origin or reason, or in a note of the review page or an edited sheet."""
    if row["origin"] == ConceptOrigin.USER or row["reason"] == DropReason.BY_USER:
        return True
    notes: Any = row.get("provenance")
    return hasattr(notes, "__len__") and any(_BY_A_PERSON.match(str(note)) for note in notes)


def asked_concepts(concepts: pd.DataFrame) -> pd.DataFrame:
    """The concepts that images are judged for: the kept ones, and those dropped after they were judged.

    The latter stay in the question, because leaving them out would change every prompt and pay for it again.
    """
    later = (DropReason.NOT_SEEN_IN_ANY_IMAGE, DropReason.FAILS_NULL_TEST, DropReason.LEAKS_CLASS)
    return concepts.assign(status=concepts["status"].mask(concepts["reason"].isin(later), ConceptStatus.KEPT))


def asked_vocabulary(run: RunFolder) -> Vocabulary:
    """Concepts the models are asked for: all but those whose labels came with the data."""
    concepts = asked_concepts(run.read_concepts())
    return vocabulary_of(concepts[concepts["origin"] != ConceptOrigin.GIVEN])


def was_given(concepts: pd.DataFrame) -> bool:
    """Whether the data set brought its own concepts."""
    return bool((concepts["origin"] == ConceptOrigin.GIVEN).any())


def _rows(frame: pd.DataFrame) -> list[tuple[str, ...]]:
    columns = [
        frame[name].astype("object").where(frame[name].notna(), "").astype(str)
        if name in frame
        else pd.Series([""] * len(frame), index=frame.index)
        for name in _SAME
    ]
    return list(zip(*columns, strict=True))
