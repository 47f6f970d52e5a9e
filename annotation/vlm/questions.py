"""What is asked of one image: single concepts, and exclusive groups as one choice each.

A question is the unit that is asked, answered, journalled and paid for. Its hash covers everything that bears on its
answer but the pixels, so a changed definition asks that one question again and no other.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_contracts.concepts import Concept, Vocabulary, slug

NONE_OF_THEM = "none"
UNCERTAIN_CHOICE = "uncertain"


@dataclass(frozen=True)
class Question:
    """One thing to be answered: is this concept present, or which value of this attribute holds."""

    question_id: str
    """Name of the answer in the JSON that comes back."""
    concepts: tuple[Concept, ...]
    """The concept, or the values of an exclusive group."""
    attribute: str | None = None
    """Name of the exclusive group; None for a single concept."""

    @property
    def concept_ids(self) -> tuple[str, ...]:
        """The concepts that one answer decides."""
        return tuple(c.concept_id for c in self.concepts)

    @property
    def none(self) -> str:
        """The choice that no value of the group holds."""
        return free_name(NONE_OF_THEM, self.concept_ids)

    @property
    def uncertain(self) -> str:
        """The choice that the image does not allow to tell."""
        return free_name(UNCERTAIN_CHOICE, self.concept_ids)

    @property
    def choices(self) -> tuple[str, ...]:
        """What a choice may answer: a value, none of them, or uncertain."""
        return (*self.concept_ids, self.none, self.uncertain)

    def as_json(self) -> dict[str, Any]:
        """The question as it stands in the prompt."""
        if self.attribute is None:
            return _described(self.concepts[0], self.question_id)
        values = [_described(c, c.concept_id) for c in self.concepts]
        return {"id": self.question_id, "attribute": self.attribute, "choice_of": values}


def questions_of(vocabulary: Vocabulary) -> tuple[Question, ...]:
    """One question per concept outside groups, one per exclusive group, in the vocabulary's order.

    A group of which only one value is asked has nothing to choose from: it is asked as a single concept.
    """
    found: dict[str, Question] = {}
    for concept in vocabulary:
        members = vocabulary.groups[concept.group] if concept.group is not None else ()
        if concept.group is None or len(members) < 2:
            found[concept.concept_id] = Question(concept.concept_id, (concept,))
        else:
            name = free_name(f"choice-{slug(concept.group)}", vocabulary.ids)
            values = tuple(vocabulary[concept_id] for concept_id in members)
            found.setdefault(name, Question(name, values, concept.group))
    return tuple(found.values())


def select(questions: Iterable[Question], question_ids: Iterable[str]) -> tuple[Question, ...]:
    """The questions with these ids, in their own order."""
    wanted = set(question_ids)
    return tuple(q for q in questions if q.question_id in wanted)


def in_chunks(questions: Sequence[Question], most: int) -> list[tuple[Question, ...]]:
    """The questions in runs of at most `most`, as equal in size as possible."""
    n_chunks = -(-len(questions) // most)
    edges = [round(k * len(questions) / n_chunks) for k in range(n_chunks + 1)] if n_chunks else [0]
    return [tuple(questions[a:b]) for a, b in itertools.pairwise(edges)]


def free_name(name: str, taken: Collection[str]) -> str:
    """The name, with as many dashes behind it as make it differ from those that are taken."""
    while name in taken:
        name += "-"
    return name


def _described(concept: Concept, name: str) -> dict[str, Any]:
    words: Mapping[str, Any] = {
        "id": name,
        "name": concept.name,
        "definition": concept.definition,
        "also_called": list(concept.synonyms),
        "not_to_be_confused_with": concept.contrast,
    }
    return {key: value for key, value in words.items() if value}
