"""Proposals of many answers as concepts: names that mean the same become one, and every wording is remembered.

Names mean the same when their canonical words are equal, when a model called one the other's synonym, or when a text
embedding puts them close together and no word of the one excludes a word of the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from annotation.provenance import Source
from annotation.vlm.schema import MAX_SYNONYMS, Proposal
from annotation.wording import Wording, normalise, opposes, plain
from data_contracts.ports import TextEmbedder

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """The proposals of one question."""

    source: Source
    proposals: Sequence[Proposal]


@dataclass(frozen=True)
class Merged:
    """One concept, from all wordings that mean it."""

    name: str
    definition: str
    group: str | None
    synonyms: tuple[str, ...]
    contrast: str
    sources: tuple[Source, ...]

    @property
    def default_definition(self) -> str:
        """What is to be decided when nobody has said it otherwise."""
        return f"{self.name[:1].upper()}{self.name[1:]} can be seen."


@dataclass(frozen=True)
class _Said:
    """One proposal of one answer, taken apart."""

    answer: int
    source: Source
    proposal: Proposal
    wording: Wording

    @property
    def group_key(self) -> str | None:
        """What the exclusive group is about; a thing that is missing is no value of it."""
        group = self.proposal.group
        return None if group is None or self.wording.negated else normalise(group).key


@dataclass
class _Entry:
    """Wordings that mean one thing, the first of them first."""

    said: list[_Said] = field(default_factory=list)

    def standing(self, max_characters: int) -> _Said:
        """The first wording that affirms and is short enough; else the first that affirms; else the first."""
        affirming = [s for s in self.said if not s.wording.negated]
        short = [s for s in affirming if len(s.wording.positive) <= max_characters]
        return (short or affirming or self.said)[0]

    def excludes(self, other: _Said) -> bool:
        """Whether the other wording cannot mean this: opposite words, or another value of a group in one answer."""
        if opposes(self.said[0].wording.positive, other.wording.positive):
            return True
        group = other.group_key
        return group is not None and any(s.answer == other.answer and s.group_key == group for s in self.said)


def merge(
    answers: Sequence[Answer], embed: TextEmbedder | None, min_cosine: float, name_characters: int
) -> list[Merged]:
    """Concepts in the order of their first wording: the answers take turns, those about single classes before pairs.

    The first wording stands, unless it has more than `name_characters` and a shorter one follows. Without `embed`,
    only names whose canonical words are equal, or that were called synonyms, become one.
    """
    said = list(_in_turns(answers))
    entries = _entries(said, _vectors(said, embed), min_cosine)
    groups = _groups(entries)
    keys = {s.wording.key for s in said}
    return [
        _merged(entry, entry.standing(name_characters), group, keys)
        for entry, group in zip(entries, groups, strict=True)
    ]


def _in_turns(answers: Sequence[Answer]) -> Iterator[_Said]:
    """Proposals by rank, so that no class comes last."""
    for about_pairs in (False, True):
        chosen = [(k, a) for k, a in enumerate(answers) if (a.source.against is not None) is about_pairs]
        for rank in range(max((len(a.proposals) for _, a in chosen), default=0)):
            for k, answer in chosen:
                if rank < len(answer.proposals):
                    proposal = answer.proposals[rank]
                    source = replace(answer.source, words=proposal.name)
                    yield _Said(k, source, proposal, normalise(proposal.name))


def _vectors(said: Sequence[_Said], embed: TextEmbedder | None) -> Mapping[str, Vector]:
    """Canonical key → unit vector of its first wording, without negation; empty without an embedder."""
    texts: dict[str, str] = {}
    for s in said:
        texts.setdefault(s.wording.key, s.wording.positive)
    if embed is None or not texts:
        return {}
    vectors = embed(list(texts.values()))
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return dict(zip(texts, unit, strict=True))


def _entries(said: Sequence[_Said], vectors: Mapping[str, Vector], min_cosine: float) -> list[_Entry]:
    entries: list[_Entry] = []
    by_key: dict[str, _Entry] = {}
    by_synonym: dict[str, _Entry] = {}
    for s in said:
        synonyms = [w.key for w in map(normalise, s.proposal.synonyms) if not w.negated]
        entry = by_key.get(s.wording.key)
        if entry is None:
            called = [by_synonym.get(s.wording.key), *(by_key.get(key) for key in synonyms)]
            candidates = [*(e for e in called if e is not None), *_alike(s, entries, vectors, min_cosine)]
            entry = next((e for e in candidates if not e.excludes(s)), None)
        if entry is None:
            entry = _Entry()
            entries.append(entry)
        entry.said.append(s)
        by_key.setdefault(s.wording.key, entry)
        for key in () if s.wording.negated else synonyms:
            by_synonym.setdefault(key, entry)
    return entries


def _alike(
    said: _Said, entries: Sequence[_Entry], vectors: Mapping[str, Vector], min_cosine: float
) -> Iterator[_Entry]:
    """Entries whose first wording is closer than the least cosine, the closest first."""
    if not vectors or not entries:
        return
    cosines = np.stack([vectors[e.said[0].wording.key] for e in entries]) @ vectors[said.wording.key]
    for i in np.argsort(-cosines, kind="stable"):
        if cosines[i] <= min_cosine:
            return
        yield entries[i]


def _groups(entries: Sequence[_Entry]) -> list[str | None]:
    """The exclusive group of each entry, in its first wording; none where it would hold a single entry.

    Of several answers with a group `colour`, each may mean the colour of something else. Groups of one name are one
    group if the name says of what (more than one word) or if their answers share a concept; else the first stays.
    """
    meant: dict[str, set[int]] = {}
    for entry in entries:
        for key in dict.fromkeys(s.group_key for s in entry.said if s.group_key):
            answers = {s.answer for s in entry.said if s.group_key == key}
            if " " in key or answers & meant.setdefault(key, answers):
                meant[key] = meant.get(key, set()) | answers
    names: dict[str, str] = {}
    chosen: list[str | None] = []
    for entry in entries:
        member = next((s for s in entry.said if s.group_key and s.answer in meant[s.group_key]), None)
        chosen.append(None if member is None else member.group_key)
        if member is not None and member.group_key and member.proposal.group:
            names.setdefault(member.group_key, member.proposal.group)
    return [None if key is None or chosen.count(key) < 2 else names[key] for key in chosen]


def _merged(entry: _Entry, standing: _Said, group: str | None, keys: set[str]) -> Merged:
    name = standing.wording.positive
    affirmed = [s.proposal for s in entry.said if not s.wording.negated]
    merged = Merged(
        name=name,
        definition=next((p.definition for p in (standing.proposal, *affirmed) if p.definition), ""),
        group=group,
        synonyms=_synonyms(entry, name, keys),
        contrast=next((p.contrast for p in affirmed if p.contrast), ""),
        sources=tuple(s.source for s in entry.said),
    )
    # Where only its absence was proposed, the concept is the thing itself, and the definition must decide that.
    return replace(merged, definition=merged.default_definition) if standing.wording.negated else merged


def _synonyms(entry: _Entry, name: str, keys: set[str]) -> tuple[str, ...]:
    """Other wordings of the entry, then what models called synonyms, unless that names another concept."""
    wordings = [s.wording.positive for s in entry.said]
    own = {s.wording.key for s in entry.said}
    called = [t for s in entry.said if not s.wording.negated for t in s.proposal.synonyms]
    wordings += [
        t for t in called if not normalise(t).negated and normalise(t).key not in keys - own and not opposes(t, name)
    ]
    # Spelling and number make no other word.
    by_words = {plain(t): t for t in reversed(wordings)}
    by_words.pop(plain(name), None)
    order = dict.fromkeys(plain(t) for t in wordings)
    return tuple(by_words[words] for words in order if words in by_words)[:MAX_SYNONYMS]
