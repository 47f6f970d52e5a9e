"""Concepts and their order.

`Vocabulary` is the only owner of concept order: every array with a concept axis is ordered by a
`Vocabulary`, and every file with such an axis carries its `sha256`. Nothing else may sort concepts.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, field
from functools import cached_property
from typing import Any

from data_contracts.errors import ContractViolation, VocabularyMismatch


def slug(name: str) -> str:
    """Stable ASCII identifier of a concept name: lower case, words joined by `-`; never empty.

    Names without any ASCII letter or digit get a short hash, so that no two of them collide.
    """
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    words = re.findall(r"[a-z0-9]+", ascii_name.lower())
    return "-".join(words) or "concept-" + hashlib.sha256(name.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Concept:
    """One visual attribute that can be present in, or absent from, an image."""

    concept_id: str
    """Slug, unique in its vocabulary."""
    name: str
    """What people and prompts read, such as `ground-glass opacity`."""
    definition: str = ""
    """One sentence that says what to look for."""
    group: str | None = None
    """Name of the attribute of which exactly one value holds, such as `nucleus shape`."""
    synonyms: tuple[str, ...] = ()
    """Other words for the same thing."""
    contrast: str = ""
    """What it must not be confused with, such as `a fold of the skin`."""


@dataclass(frozen=True)
class Vocabulary:
    """The kept concepts in their order; frozen, and hashed over all that is said of them."""

    concepts: tuple[Concept, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        faults = [
            f"concept {c.concept_id!r} has an empty id or name"
            for c in self.concepts
            if not (c.concept_id and c.name.strip())
        ]
        seen: set[str] = set()
        for concept in self.concepts:
            if concept.concept_id in seen:
                faults.append(f"concept id {concept.concept_id!r} occurs twice; ids are unique")
            seen.add(concept.concept_id)
        if faults:
            raise ContractViolation("vocabulary", faults)

    def __len__(self) -> int:
        return len(self.concepts)

    def __iter__(self) -> Iterator[Concept]:
        return iter(self.concepts)

    def __contains__(self, concept_id: object) -> bool:
        return concept_id in self._positions

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {c.concept_id: i for i, c in enumerate(self.concepts)}

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Concept ids in order: the meaning of every concept axis."""
        return tuple(c.concept_id for c in self.concepts)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Concept names in order."""
        return tuple(c.name for c in self.concepts)

    @cached_property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Mutually exclusive attributes: group name → its concept ids in order."""
        found: dict[str, list[str]] = {}
        for concept in self.concepts:
            if concept.group is not None:
                found.setdefault(concept.group, []).append(concept.concept_id)
        return {name: tuple(ids) for name, ids in found.items()}

    @cached_property
    def sha256(self) -> str:
        """Hash of all that is said of every concept, in order (hex)."""
        canonical = json.dumps([astuple(c) for c in self.concepts], ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def position(self, concept_id: str) -> int:
        """Index of a concept on every concept axis; raises `ContractViolation` for an unknown id."""
        try:
            return self._positions[concept_id]
        except KeyError:
            raise ContractViolation(
                "vocabulary",
                [f"concept {concept_id!r} is unknown; {len(self)} concepts are: {', '.join(self.ids[:8])}"],
            ) from None

    def __getitem__(self, concept_id: str) -> Concept:
        return self.concepts[self.position(concept_id)]

    def require(self, sha256: str, where: str) -> None:
        """Raise `VocabularyMismatch` unless `sha256` (as stored in the file `where`) is this vocabulary's."""
        if sha256 != self.sha256:
            raise VocabularyMismatch(
                where,
                [f"vocabulary hash: expected {self.sha256[:12]}…, found {sha256[:12]}…"],
                remedy="The file was written for other concepts; make it again, or use the run folder it belongs to.",
            )

    def to_json(self) -> str:
        """The vocabulary as readable JSON, with its hash."""
        rows = [asdict(c) for c in self]
        return json.dumps({"sha256": self.sha256, "concepts": rows}, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, where: str = "vocabulary.json") -> Vocabulary:
        """Read what `to_json` wrote; raises `ContractViolation` if malformed or its hash does not hold."""
        try:
            content = json.loads(text)
            vocabulary = cls.of(_concept(row) for row in content["concepts"])
            stored = str(content["sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise ContractViolation(where, [f"expected a vocabulary as JSON, got: {error}"]) from error
        vocabulary.require(stored, where)
        return vocabulary

    @classmethod
    def of(cls, concepts: Iterable[Concept]) -> Vocabulary:
        """A vocabulary of the given concepts, in the given order."""
        return cls(tuple(concepts))


def _concept(row: dict[str, Any]) -> Concept:
    row["synonyms"] = tuple(row["synonyms"])
    return Concept(**row)
