"""Rules of classes: an `or` of a few short conjunctions, read from the rules of training images.

1. The image rules of the images that the network gives a class are counted; most images share one of few. The terms
   that most of them share are one more.
2. Two that differ in one literal only, asked as present by one and as absent by the other, become one without it
   (Quine and McCluskey); one that another implies is dropped.
3. Of each, terms are dropped whose loss does not change what it says, or brings it nearer to the network (greedy).
4. Of what is left, those are taken one by one that bring the `or` of them nearest to what the network says.

All is read from the network's decisions, never from the true classes. Conjunctions are tried on bit patterns: one bit
an image, 64 images a machine word, so that 100,000 images cost no more than seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_contracts.concepts import Vocabulary
from model.explain.rules import Bools, Ints, Literals, holds_on, literals_of, rule_text
from model.outputs import Outputs

Words = npt.NDArray[np.uint64]
"""One bit an image."""
Conjunction = frozenset[tuple[int, bool]]
"""Literals: (concept's position, whether present)."""

MAX_RULES_PER_CLASS = 5
SMALLEST_GAIN = 0.01
"""A further rule must bring the `or` nearer to the network on this fraction of the class's images."""
_MAX_PATTERNS = 512
"""Image rules of one class that are looked at, the commonest ones."""
_MAX_CANDIDATES = 48
"""Of them, so many are simplified: those that hold for most of the class's images."""


@dataclass(frozen=True)
class ClassRule:
    """One conjunction that speaks for a class, the most telling literal first."""

    class_name: str
    literals: tuple[tuple[str, bool], ...]
    """(concept id, True for present and False for absent)."""

    def text(self, vocabulary: Vocabulary) -> str:
        """Such as `eosinophil ← granule colour: red ∧ ¬ nucleus shape: round`."""
        return rule_text(self.class_name, [(vocabulary[c].name, present) for c, present in self.literals])

    def holds(self, concepts: Bools, vocabulary: Vocabulary) -> Bools:
        """(N,) where all literals agree with the (N, K) Boolean concepts; a rule without literals holds everywhere."""
        agree = [concepts[:, vocabulary.position(c)] == present for c, present in self.literals]
        return np.logical_and.reduce([np.ones(len(concepts), bool), *agree])


def read_class_rules(
    outputs: Outputs,
    vocabulary: Vocabulary,
    class_names: tuple[str, ...],
    *,
    max_rules_per_class: int = MAX_RULES_PER_CLASS,
) -> list[ClassRule]:
    """A few rules for each class that the network says at least once, read from these outputs: take training images.

    A class has none where its image rules name no concept, or nothing that tells its images from others. Raises
    `InputRefused` for a system without rules.
    """
    concepts = outputs.concept_probabilities >= 0.5
    predicted = outputs.predicted
    literals = literals_of(outputs, predicted)
    own = holds_on(literals, concepts)
    rules = []
    for j, name in enumerate(class_names):
        said = predicted == j
        if not said.any():
            continue
        # A rule that does not hold for its own image is no reason for the class; taken only where there is no other.
        where = said & own if (said & own).any() else said
        patterns = _patterns(Literals(literals.used[where], literals.present[where]))
        patterns += [rule for rule in [_shared(Literals(literals.used[said], literals.present[said]))] if rule]
        for chosen in _chosen(patterns, _Images.of(concepts, said), max_rules_per_class):
            rules.append(ClassRule(name, tuple((vocabulary.ids[k], present) for k, present in chosen)))
    return rules


# ---- patterns ------------------------------------------------------------------------------------------------


class Distinct(NamedTuple):
    """Different image rules."""

    literals: Literals
    """(P, K)"""
    n: Ints
    """(P,) images that have it."""


def distinct(literals: Literals) -> Distinct:
    """The different rules among (N, K) literals and how often each occurs, the commonest first."""
    used = literals.used
    packed = np.packbits(np.concatenate([used, used & literals.present], axis=1), axis=1)
    keys = np.ascontiguousarray(packed).view(np.dtype((np.void, packed.shape[1]))).ravel()
    _, first, n = np.unique(keys, return_index=True, return_counts=True)
    order = np.lexsort((first, -n))
    rows = first[order]
    return Distinct(Literals(used[rows], (used & literals.present)[rows]), n[order].astype(np.int64))


def _patterns(literals: Literals) -> list[Conjunction]:
    """The commonest image rules that name a concept, merged, the commonest first."""
    found = distinct(literals)
    rules = [
        frozenset((int(k), bool(present[k])) for k in np.flatnonzero(used))
        for used, present in zip(*(part[:_MAX_PATTERNS] for part in found.literals), strict=True)
    ]
    return merged([rule for rule in rules if rule])


def _shared(literals: Literals) -> Conjunction:
    """The literals that more than half of the images have in their rules."""
    shares = [(literals.used & (literals.present == present)).mean(axis=0) for present in (False, True)]
    return frozenset((int(k), bool(present)) for present in (0, 1) for k in np.flatnonzero(shares[present] > 0.5))


def merged(rules: Iterable[Conjunction]) -> list[Conjunction]:
    """An equivalent `or` of fewer rules: a ∧ b, a ∧ ¬b → a; then what another one implies is dropped. Order is kept."""
    known = dict.fromkeys(rules)
    fresh = list(known)
    while fresh:
        shorter = [
            rule - {(k, present)}
            for rule in fresh
            for k, present in rule
            if len(rule) > 1 and (rule - {(k, present)}) | {(k, not present)} in known
        ]
        fresh = [rule for rule in dict.fromkeys(shorter) if rule not in known]
        known.update(dict.fromkeys(fresh))
    return [rule for rule in known if not any(other < rule for other in known)]


# ---- conjunctions over all images ----------------------------------------------------------------------------


class _Images(NamedTuple):
    """Boolean concepts of N images as bits, and which of them the network gives the class."""

    literals: Words
    """(2, K, W): absent, present."""
    said: Words
    """(W,)"""
    n_said: int

    @classmethod
    def of(cls, concepts: Bools, said: Bools) -> _Images:
        """The bits of (N, K) concepts and (N,) decisions; bits beyond the last image agree with no literal."""
        both = np.stack([~concepts, concepts]).transpose(0, 2, 1)
        return cls(_as_bits(both), _as_bits(said), int(said.sum()))

    def rows(self, rule: Sequence[tuple[int, bool]]) -> Words:
        """(L, W) where each literal agrees."""
        rows: Words = self.literals[[int(present) for _, present in rule], [k for k, _ in rule]]
        return rows

    def holds(self, rule: Iterable[tuple[int, bool]]) -> Words:
        """(W,) where all literals agree."""
        bits: Words = np.bitwise_and.reduce(self.rows(list(rule)), axis=0)
        return bits

    def gain(self, bits: Words) -> Ints:
        """(…) images of the class among these (…, W), less images of other classes: how fidelity grows by them."""
        return 2 * _count(bits & self.said) - _count(bits)


def _as_bits(values: Bools) -> Words:
    """(…, N) → (…, ⌈N / 64⌉)."""
    packed = np.packbits(values, axis=-1)
    missing = -packed.shape[-1] % 8
    padded = np.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, missing)])
    words: Words = np.ascontiguousarray(padded).view(np.uint64)
    return words


def _count(bits: Words) -> Ints:
    """(…, W) → (…) bits that are set."""
    return np.bitwise_count(bits).sum(axis=-1, dtype=np.int64)


def _simplified(rule: Conjunction, images: _Images) -> list[tuple[int, bool]]:
    """The rule without terms that it can spare, the most telling first; at least one is left.

    Each round drops the term whose loss brings the rule nearest to the network, while that is no loss: a term that
    excludes as many images of the class as of others stays, one that excludes none goes. Of equals the one goes that
    agrees with the fewest images of the class.
    """
    kept = sorted(rule)
    agrees = {literal: int(_count(images.holds([literal]) & images.said)) for literal in kept}
    while len(kept) > 1:
        without = _leave_one_out(images.rows(kept))
        gains, sizes = images.gain(without), _count(without)
        here = images.holds(kept)
        spare = (gains > images.gain(here)) | (sizes == _count(here))
        if not spare.any():
            break
        agreement = np.array([agrees[literal] for literal in kept])
        order = np.lexsort((agreement, np.where(spare, -gains, np.iinfo(np.int64).max)))
        kept.pop(int(order[0]))
    if len(kept) == 1:
        return kept
    gains = images.gain(_leave_one_out(images.rows(kept)))
    return [kept[n] for n in np.argsort(gains, kind="stable")]


def _leave_one_out(rows: Words) -> Words:
    """(L, W) → (L, W) the conjunction of all rows but each one."""
    before = np.bitwise_and.accumulate(rows, axis=0)
    after = np.bitwise_and.accumulate(rows[::-1], axis=0)[::-1]
    without = np.full_like(rows, ~np.uint64(0))
    without[1:] &= before[:-1]
    without[:-1] &= after[1:]
    return without


def _chosen(patterns: list[Conjunction], images: _Images, max_rules: int) -> list[list[tuple[int, bool]]]:
    """Rules that together come nearest to what the network says, the most telling first."""
    support = [int(_count(images.holds(rule) & images.said)) for rule in patterns]
    # The last one, of shared terms, is among the first even where it holds for no image as it stands.
    commonest = sorted(range(len(patterns)), key=lambda n: (n < len(patterns) - 1, -support[n]))[:_MAX_CANDIDATES]
    simplified = {frozenset(rule): rule for rule in (_simplified(patterns[n], images) for n in commonest)}
    candidates = [simplified.get(rule) or sorted(rule) for rule in merged(simplified)]
    if not candidates:
        return []
    holds = np.stack([images.holds(rule) for rule in candidates])
    chosen: list[list[tuple[int, bool]]] = []
    covered = np.zeros_like(images.said)
    while len(chosen) < max_rules:
        gains = images.gain(holds & ~covered)
        best = min(range(len(candidates)), key=lambda n: (-gains[n], len(candidates[n])))
        if gains[best] < max(1, SMALLEST_GAIN * images.n_said):
            break
        chosen.append(candidates[best])
        covered |= holds[best]
    return chosen
