"""Changes of the concepts by a person: rename, add, drop, keep again, merge, split. Pure: a table in, a table out.

No row is ever taken out and no id changes its meaning: judgements in the ledger stay true of what was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from data_contracts.concepts import slug
from data_contracts.errors import ContractViolation, DropReason
from data_contracts.tables import ConceptOrigin, ConceptStatus, State

MAX_NAME_CHARACTERS = 80
MAX_DEFINITION_CHARACTERS = 400
MAX_PARTS = 8


@dataclass(frozen=True)
class Edit:
    """What a person asks for."""

    action: str
    """One of `ACTIONS`."""
    concept: str = ""
    """Id of the concept that changes."""
    into: str = ""
    """Merge: id of the concept that stays."""
    name: str = ""
    definition: str = ""
    group: str = ""
    parts: str = ""
    """Split: the new names, one a line."""


class Carry(NamedTuple):
    """Experts' words that hold for other concepts too after a change: where `origin` was `said`, `to` is so."""

    origin: str
    said: State
    to: dict[str, State]


class Edited(NamedTuple):
    """A concepts table after a change."""

    concepts: pd.DataFrame
    sentence: str
    carries: tuple[Carry, ...] = ()


def apply(concepts: pd.DataFrame, edit: Edit, by: str) -> Edited:
    """The table after the change, with who made it in `provenance`.

    Raises:
        ContractViolation: an id that is not there, a name that is taken, or a change that makes no sense.
    """
    if edit.action not in ACTIONS:
        raise _refused(f"expected one of {{{', '.join(ACTIONS)}}}, got {edit.action[:40]!r}")
    return ACTIONS[edit.action](concepts, edit, by)


def _rename(concepts: pd.DataFrame, edit: Edit, by: str) -> Edited:
    row = _row(concepts, edit.concept)
    name, definition = _name(edit.name), _definition(edit.definition)
    _require_free(concepts, name, but=edit.concept)
    if (name, definition) == (row["name"], row["definition"]):
        raise _refused(f"concept {edit.concept!r}: expected another name or definition, got the same")
    changes: dict[str, Any] = {"name": name, "definition": definition}
    if name != row["name"]:
        changes["synonyms"] = _with(row["synonyms"], row["name"])
    note = f"renamed from '{row['name']}' by {by}" if name != row["name"] else f"defined anew by {by}"
    return Edited(_changed(concepts, edit.concept, changes, note), f"“{row['name']}” becomes “{name}”.")


def _add(concepts: pd.DataFrame, edit: Edit, by: str) -> Edited:
    name = _name(edit.name)
    new = _new_row(concepts, name, _definition(edit.definition), edit.group.strip() or None, f"added by {by}")
    return Edited(_appended(concepts, [new]), f"“{name}” is added.")


def _drop(concepts: pd.DataFrame, edit: Edit, by: str) -> Edited:
    row = _kept(concepts, edit.concept)
    if (concepts["status"] == ConceptStatus.KEPT).sum() == 1:
        raise _refused(f"concept {edit.concept!r}: expected at least one concept to stay; this is the last")
    changes = {"status": ConceptStatus.DROPPED.value, "reason": DropReason.BY_USER.value}
    return Edited(_changed(concepts, edit.concept, changes, f"dropped by {by}"), f"“{row['name']}” is dropped.")


def _keep(concepts: pd.DataFrame, edit: Edit, by: str) -> Edited:
    row = _row(concepts, edit.concept)
    if row["status"] == ConceptStatus.KEPT:
        raise _refused(f"concept {edit.concept!r}: expected a dropped concept, this one is kept")
    changes: dict[str, Any] = {"status": ConceptStatus.KEPT.value, "reason": None}
    if pd.isna(row["position"]):
        changes["position"] = _next_position(concepts)
    note = f"kept by {by}, though: {row['reason']}"
    return Edited(_changed(concepts, edit.concept, changes, note), f"“{row['name']}” is kept again.")


def _merge(concepts: pd.DataFrame, edit: Edit, by: str) -> Edited:
    gone, stays = _kept(concepts, edit.concept), _kept(concepts, edit.into)
    if edit.concept == edit.into:
        raise _refused(f"concept {edit.concept!r}: expected two concepts to merge, got one")
    dropped = {
        "status": ConceptStatus.DROPPED.value,
        "reason": DropReason.LIKE_ANOTHER.value,
        "nearest": edit.into,
    }
    after = _changed(concepts, edit.concept, dropped, f"merged into '{stays['name']}' by {by}")
    synonyms = _with(stays["synonyms"], gone["name"], *_list(gone["synonyms"]))
    after = _changed(after, edit.into, {"synonyms": synonyms}, f"'{gone['name']}' merged into it by {by}")
    # Where one of two is seen, their union is; where one is not, the other still may be.
    carry = Carry(edit.concept, State.PRESENT, {edit.into: State.PRESENT})
    return Edited(after, f"“{gone['name']}” becomes part of “{stays['name']}”.", (carry,))


def _split(concepts: pd.DataFrame, edit: Edit, by: str) -> Edited:
    row = _kept(concepts, edit.concept)
    names = [_name(line) for line in edit.parts.splitlines() if line.strip()]
    if not 2 <= len(names) <= MAX_PARTS:
        raise _refused(f"split of {edit.concept!r}: expected 2 to {MAX_PARTS} names, one a line, got {len(names)}")
    after = _changed(
        concepts,
        edit.concept,
        {"status": ConceptStatus.DROPPED.value, "reason": DropReason.BY_USER.value},
        f"split into {', '.join(names)} by {by}",
    )
    group = None if pd.isna(row["group"]) else row["group"]
    for name in names:
        after = _appended(after, [_new_row(after, name, "", group, f"split from '{row['name']}' by {by}")])
    # Where the whole is absent, every part is; where it is present, nobody said which part.
    carry = Carry(edit.concept, State.ABSENT, {slug(name): State.ABSENT for name in names})
    return Edited(after, f"“{row['name']}” becomes {', '.join(f'“{n}”' for n in names)}.", (carry,))


ACTIONS: Mapping[str, Callable[[pd.DataFrame, Edit, str], Edited]] = {
    "rename": _rename,
    "add": _add,
    "drop": _drop,
    "keep": _keep,
    "merge": _merge,
    "split": _split,
}


def _row(concepts: pd.DataFrame, concept_id: str) -> dict[str, Any]:
    found = concepts[concepts["concept_id"] == concept_id]
    if found.empty:
        raise _refused(f"concept {concept_id[:40]!r} is not in the table")
    return {str(k): v for k, v in found.iloc[0].to_dict().items()}


def _kept(concepts: pd.DataFrame, concept_id: str) -> dict[str, Any]:
    row = _row(concepts, concept_id)
    if row["status"] != ConceptStatus.KEPT:
        raise _refused(f"concept {concept_id!r}: expected a kept concept, this one is dropped")
    return row


def _new_row(concepts: pd.DataFrame, name: str, definition: str, group: str | None, note: str) -> dict[str, Any]:
    _require_free(concepts, name)
    return {
        "concept_id": slug(name),
        "name": name,
        "definition": definition,
        "group": group,
        "proposed_for": [],
        "origin": ConceptOrigin.USER.value,
        "status": ConceptStatus.KEPT.value,
        "reason": None,
        "nearest": None,
        "similarity": None,
        "position": _next_position(concepts),
        "synonyms": [],
        "contrast": "",
        "provenance": [note],
    }


def _require_free(concepts: pd.DataFrame, name: str, but: str = "") -> None:
    others = concepts[concepts["concept_id"] != but]
    same_name = others["name"].str.casefold() == name.casefold()
    taken = others[same_name | (others["concept_id"] == slug(name))]
    if taken.empty:
        return
    status = taken.iloc[0]["status"]
    remedy = "Keep it again instead." if status == ConceptStatus.DROPPED else "Choose another name, or merge the two."
    raise _refused(f"name {name!r}: concept {taken.iloc[0]['concept_id']!r} ({status}) has it", remedy)


def _appended(concepts: pd.DataFrame, rows: list[dict[str, Any]]) -> pd.DataFrame:
    columns = {name: pd.Series([row.get(name) for row in rows], dtype=object) for name in concepts.columns}
    return _typed(pd.concat([concepts.astype(object), pd.DataFrame(columns)], ignore_index=True), concepts)


def _changed(concepts: pd.DataFrame, concept_id: str, changes: Mapping[str, Any], note: str) -> pd.DataFrame:
    after = concepts.astype(object)
    at = after.index[after["concept_id"] == concept_id][0]
    for name, value in changes.items():
        after.at[at, name] = value
    after.at[at, "provenance"] = [*_list(after.at[at, "provenance"]), note]
    return _typed(after, concepts)


def _typed(after: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Text columns as text again: a column of objects that holds only nulls has no type of its own."""
    texts = {name: "str" for name in ("group", "reason", "nearest", "contrast") if name in before}
    after = after.astype(texts)
    after["position"] = after["position"].astype("Int64")
    after["similarity"] = pd.to_numeric(after["similarity"]).astype("Float64")
    return after


def _next_position(concepts: pd.DataFrame) -> int:
    return int(concepts["position"].max()) + 1 if concepts["position"].notna().any() else 0


def _with(synonyms: Any, *names: str) -> list[str]:
    return list(dict.fromkeys([*_list(synonyms), *names]))


def _list(values: Any) -> list[str]:
    return list(values) if isinstance(values, (list, tuple, np.ndarray)) else []


def _name(text: str) -> str:
    name = " ".join(text.split())
    if not 1 <= len(name) <= MAX_NAME_CHARACTERS:
        raise _refused(f"name: expected 1 to {MAX_NAME_CHARACTERS} characters, got {len(name)}")
    return name


def _definition(text: str) -> str:
    definition = " ".join(text.split())
    if len(definition) > MAX_DEFINITION_CHARACTERS:
        raise _refused(f"definition: expected at most {MAX_DEFINITION_CHARACTERS} characters, got {len(definition)}")
    return definition


def _refused(fault: str, remedy: str | None = None) -> ContractViolation:
    return ContractViolation("concepts", [f"{fault}; nothing was changed"], remedy=remedy)
