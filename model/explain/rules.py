"""Rules in concepts: the rule of each image, read from a network's logic layer, with the truth of every term.

An image's rule for class j takes every concept whose relevance for j exceeds ½, as it is when its polarity exceeds ½
and negated otherwise. It *holds* when every such literal agrees with the network's own concepts (ĉ ≥ ½).

- `dcr` with Gödel's t-norm: the rule of class j holds exactly when ŷ_j exceeds ½, so the Boolean reading loses
  nothing. The product t-norm multiplies what is uncertain: ŷ_j can fall below ½ while every literal agrees.
- `paper`: ŷ does not contain ĉ, so the rule is a reading of the network, and its fidelity has to be measured.

The rules of whole classes are made of these in `model.explain.class_rules`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.errors import InputRefused
from model.outputs import Outputs

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

AND, NOT, IF = " ∧ ", "¬ ", " ← "

IMAGE_RULE_COLUMNS = ("image_id", "class", "rule", "length", "holds", "truth", "terms")
_DIGITS = 3
"""Decimals of a term's truth value."""


class Literals(NamedTuple):
    """(N, K) of one rule an image: which concepts it names, and whether as present."""

    used: Bools
    present: Bools


class Terms(NamedTuple):
    """The terms of N images' rules one after the other, image by image, the weakest of each first."""

    n_terms: Ints
    """(N,) of each image."""
    concepts: Ints
    """(M,) position in the vocabulary."""
    present: Bools
    """(M,) whether the rule asks for the concept, or for its absence."""
    truth: Floats
    """(M,) ĉ, or 1 − ĉ where absence is asked for."""


def rule_text(class_name: str, literals: Sequence[tuple[str, bool]]) -> str:
    """The rule as one line; a rule without literals says so."""
    body = AND.join(name if present else NOT + name for name, present in literals)
    return class_name + IF + (body or "(always)")


def literals_of(outputs: Outputs, classes: Ints) -> Literals:
    """Literals of each image's rule for the class (N,) asked of it; raises `InputRefused` for want of rules."""
    if not outputs.has_rules:
        raise InputRefused("rules: expected a system with a logic layer, got one without; there is no rule to read.")
    rows = np.arange(len(classes))
    return Literals(outputs.relevance[rows, :, classes] > 0.5, outputs.polarity[rows, :, classes] > 0.5)


def holds_on(literals: Literals, concepts: Bools) -> Bools:
    """(N,) whether each image's literals all agree with its own Boolean concepts (N, K)."""
    return ~(literals.used & (literals.present != concepts)).any(axis=1)


def image_rule_holds(outputs: Outputs, classes: Ints) -> Bools:
    """(N,) whether each image's own rule for the class asked of it holds on its Boolean concepts."""
    return holds_on(literals_of(outputs, classes), outputs.concept_probabilities >= 0.5)


def without_implied(literals: Literals, vocabulary: Vocabulary) -> Literals:
    """The literals less the absent values of an exclusive attribute of which the rule asks for another as present."""
    used = literals.used.copy()
    for ids in vocabulary.groups.values():
        members = [vocabulary.position(c) for c in ids]
        asked = literals.used[:, members] & literals.present[:, members]
        used[:, members] &= asked | ~asked.any(axis=1, keepdims=True)
    return Literals(used, literals.present)


def terms_of(literals: Literals, concepts: Floats) -> Terms:
    """The terms of all images' rules with their truth values, from (N, K) concept probabilities."""
    rows, positions = np.nonzero(literals.used)
    present = literals.present[rows, positions]
    own = concepts[rows, positions]
    truth = np.where(present, own, 1 - own)
    order = np.lexsort((truth, rows))
    n_terms = literals.used.sum(axis=1).astype(np.int64)
    return Terms(n_terms, positions[order].astype(np.int64), present[order], truth[order])


def image_rules(
    outputs: Outputs, image_ids: Sequence[str], vocabulary: Vocabulary, class_names: tuple[str, ...]
) -> pd.DataFrame:
    """The rule of each image for the class it was given, one row an image.

    holds: whether every literal agrees with the image's Boolean concepts. truth: ŷ_neural of the class, in [0, 1].
    terms: JSON list of {concept_id, present, truth}, where truth is ĉ, or 1 − ĉ for a negated literal; weakest first,
    as the weakest decides under Gödel's t-norm. Values of an exclusive group that a present one implies are left out.
    """
    predicted = outputs.predicted
    literals = literals_of(outputs, predicted)
    terms = terms_of(without_implied(literals, vocabulary), outputs.concept_probabilities)
    names = np.asarray(class_names, dtype=object)[predicted]
    return pd.DataFrame(
        {
            "image_id": list(image_ids),
            "class": names,
            "rule": [
                name + IF + (AND.join(words) or "(always)")
                for name, words in zip(names, _split(_names(terms, vocabulary), terms.n_terms), strict=True)
            ],
            "length": terms.n_terms,
            "holds": holds_on(literals, outputs.concept_probabilities >= 0.5),
            "truth": outputs.rule_truth[np.arange(len(predicted)), predicted].astype(np.float64).round(4),
            "terms": [f"[{', '.join(texts)}]" for texts in _split(_as_json(terms, vocabulary), terms.n_terms)],
        },
        columns=list(IMAGE_RULE_COLUMNS),
    )


def image_terms(used: Bools, present: Bools, concepts: Floats, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Terms of one image's rule, from (K,) arrays: concept id, whether asked to be present, truth; weakest first."""
    literals = without_implied(Literals(used[None], present[None]), vocabulary)
    _, positions, asked, truth = terms_of(literals, concepts[None])
    return [
        {"concept_id": vocabulary.ids[k], "present": bool(wanted), "truth": round(float(value), _DIGITS)}
        for k, wanted, value in zip(positions, asked, truth, strict=True)
    ]


def _names(terms: Terms, vocabulary: Vocabulary) -> npt.NDArray[np.object_]:
    """(M,) literals in words; made once for each literal there is, not for each term."""
    table = np.array([[NOT + name, name] for name in vocabulary.names], dtype=object).reshape(-1, 2)
    words: npt.NDArray[np.object_] = table[terms.concepts, terms.present.astype(np.int64)]
    return words


def _as_json(terms: Terms, vocabulary: Vocabulary) -> npt.NDArray[np.object_]:
    """(M,) terms as JSON objects, made once for each that there is: 2 · 1001 truth values for each concept."""
    steps = np.rint(terms.truth * 10**_DIGITS).astype(np.int64)
    codes = (terms.concepts * 2 + terms.present) * (10**_DIGITS + 1) + steps
    distinct, where = np.unique(codes, return_inverse=True)
    texts = np.empty(len(distinct), dtype=object)
    for n, code in enumerate(distinct):
        literal, step = divmod(int(code), 10**_DIGITS + 1)
        term = {"concept_id": vocabulary.ids[literal // 2], "present": bool(literal % 2), "truth": step / 10**_DIGITS}
        texts[n] = json.dumps(term)
    found: npt.NDArray[np.object_] = texts[where]
    return found


def _split(values: npt.NDArray[np.object_], lengths: Ints) -> Iterator[list[str]]:
    """The values in runs of these lengths."""
    start = 0
    listed = values.tolist()
    for length in lengths.tolist():
        yield listed[start : start + length]
        start += length
