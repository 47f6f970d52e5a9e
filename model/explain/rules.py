"""Rules in concepts: read from a network over a whole split, simplified, and tested on images not used to read them.

An image's rule for class j takes every concept whose relevance for j exceeds ½, as it is when its polarity exceeds ½
and negated otherwise. It *holds* when every such literal agrees with the network's own concepts (ĉ ≥ ½).

- `dcr` with Gödel's t-norm: the rule of class j holds exactly when ŷ_j exceeds ½, so the Boolean reading loses
  nothing. The product t-norm multiplies what is uncertain: ŷ_j can fall below ½ while every literal agrees.
- `paper`: ŷ does not contain ĉ, so the rule is a reading of the network, and its fidelity has to be measured.

A class's rule is one conjunction: of the literals that most images of the class share, those that help to tell where
the network says the class. Fidelity is always measured against the network's reported decision.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.errors import InputRefused
from model.outputs import Outputs

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

AND, NOT, IF = " ∧ ", "¬ ", " ← "

CLASS_RULE_COLUMNS = (
    "class", "rule", "length", "n_images", "support", "coverage", "precision", "recall", "fidelity", "network_recall",
)  # fmt: skip


class Literals(NamedTuple):
    """(N, K) of one rule an image: which concepts it names, and whether as present."""

    used: Bools
    present: Bools


@dataclass(frozen=True)
class ClassRule:
    """One class's conjunction, the most telling literal first."""

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


def rule_text(class_name: str, literals: list[tuple[str, bool]]) -> str:
    """The rule as one line; a rule without literals says so."""
    body = AND.join(name if present else NOT + name for name, present in literals)
    return class_name + IF + (body or "(always)")


def literals_of(outputs: Outputs, classes: Ints) -> Literals:
    """Literals of each image's rule for the class (N,) asked of it; raises `InputRefused` for want of rules."""
    if not outputs.has_rules:
        raise InputRefused("rules: expected a system with a logic layer, got one without; there is no rule to read.")
    asked = classes[:, None, None]
    relevance = np.take_along_axis(outputs.relevance, asked, axis=2)[..., 0]
    polarity = np.take_along_axis(outputs.polarity, asked, axis=2)[..., 0]
    return Literals(relevance > 0.5, polarity > 0.5)


def image_rule_holds(outputs: Outputs, classes: Ints) -> Bools:
    """(N,) whether each image's own rule for the class asked of it holds on its Boolean concepts."""
    literals = literals_of(outputs, classes)
    return ~(literals.used & (literals.present != (outputs.concept_probabilities >= 0.5))).any(axis=1)


def read_class_rules(
    outputs: Outputs, vocabulary: Vocabulary, class_names: tuple[str, ...], *, shared_fraction: float = 0.5
) -> list[ClassRule]:
    """One rule for each class that the network says at least once, read from these outputs: take training images.

    A literal is a candidate when more than `shared_fraction` of the images given the class have it in their rule.
    Candidates that do not help to tell these images from the others are dropped, one by one, the weakest first.
    """
    concepts = outputs.concept_probabilities >= 0.5
    rules = []
    for j, name in enumerate(class_names):
        said = outputs.predicted == j
        if not said.any():
            continue
        literals = literals_of(_rows(outputs, said), np.full(int(said.sum()), j))
        present, share = _majority(literals)
        candidates = np.flatnonzero(share > shared_fraction)
        chosen = _simplified(candidates, concepts == present, said)
        rules.append(ClassRule(name, tuple((vocabulary.ids[k], bool(present[k])) for k in chosen)))
    return rules


def class_rules(
    rules: list[ClassRule], outputs: Outputs, y: Ints, vocabulary: Vocabulary, class_names: tuple[str, ...]
) -> pd.DataFrame:
    """The rules measured on these outputs and true classes `y`, one row a rule: take held-out images.

    n_images: images of the split. support: images where the rule holds. coverage: support as a fraction.
    precision: fraction of the supported images that are of the class. recall: fraction of the class's images that
    are supported. fidelity: fraction of all images on which rule and network agree about the class.
    network_recall: fraction of the images given the class by the network that are supported.
    """
    concepts = outputs.concept_probabilities >= 0.5
    rows = []
    for rule in rules:
        j = class_names.index(rule.class_name)
        holds = rule.holds(concepts, vocabulary)
        rows.append(
            {
                "class": rule.class_name,
                "rule": rule.text(vocabulary),
                "length": len(rule.literals),
                "n_images": len(y),
                **_agreement(holds, y == j, outputs.predicted == j),
            }
        )
    return pd.DataFrame(rows, columns=list(CLASS_RULE_COLUMNS))


def image_rules(
    outputs: Outputs, image_ids: list[str], vocabulary: Vocabulary, class_names: tuple[str, ...]
) -> pd.DataFrame:
    """The rule of each image for the class it was given, one row an image.

    holds: whether every literal agrees with the image's Boolean concepts. truth: ŷ_neural of the class, in [0, 1].
    terms: JSON list of {concept_id, present, truth}, where truth is ĉ, or 1 − ĉ for a negated literal; weakest first,
    as the weakest decides under Gödel's t-norm. Values of an exclusive group that a present one implies are left out.
    """
    predicted = outputs.predicted
    literals = literals_of(outputs, predicted)
    holds = image_rule_holds(outputs, predicted)
    truth = np.take_along_axis(outputs.rule_truth, predicted[:, None], axis=1)[:, 0]
    rows = []
    for n, image_id in enumerate(image_ids):
        terms = image_terms(literals.used[n], literals.present[n], outputs.concept_probabilities[n], vocabulary)
        named = [(vocabulary[t["concept_id"]].name, t["present"]) for t in terms]
        rows.append(
            {
                "image_id": image_id,
                "class": class_names[predicted[n]],
                "rule": rule_text(class_names[predicted[n]], named),
                "length": len(terms),
                "holds": bool(holds[n]),
                "truth": float(truth[n]),
                "terms": json.dumps(terms),
            }
        )
    return pd.DataFrame(rows, columns=["image_id", "class", "rule", "length", "holds", "truth", "terms"])


def image_terms(
    used: Bools, present: Bools, concepts: npt.NDArray[np.float32], vocabulary: Vocabulary
) -> list[dict[str, Any]]:
    """Terms of one image's rule, from (K,) arrays: concept id, whether asked to be present, truth; weakest first."""
    asked = {vocabulary.ids[k] for k in np.flatnonzero(used & present)}
    implied = {c for ids in vocabulary.groups.values() if asked & set(ids) for c in ids} - asked
    terms = [
        {
            "concept_id": vocabulary.ids[k],
            "present": bool(present[k]),
            "truth": round(float(concepts[k] if present[k] else 1 - concepts[k]), 4),
        }
        for k in np.flatnonzero(used)
        if vocabulary.ids[k] not in implied
    ]
    return sorted(terms, key=lambda term: term["truth"])


def _rows(outputs: Outputs, which: Bools) -> Outputs:
    return Outputs(*(part[which] for part in outputs))


def _majority(literals: Literals) -> tuple[Bools, npt.NDArray[np.float64]]:
    """(K,) the commoner polarity of each concept among rules that use it, and the fraction of rules that have it so."""
    n_present = (literals.used & literals.present).mean(axis=0)
    n_absent = (literals.used & ~literals.present).mean(axis=0)
    return n_present >= n_absent, np.maximum(n_present, n_absent)


def _simplified(candidates: Ints, agrees: Bools, said: Bools) -> list[int]:
    """Candidates without those that the conjunction's F1 for `said` can spare; the most telling first.

    Backward elimination: each round drops the literal whose loss leaves the best F1, while F1 does not fall.
    """
    violated = ~agrees[:, candidates]  # (N, candidates)
    kept = np.ones(len(candidates), bool)
    n_violations = violated.sum(axis=1)
    best = _f1(n_violations == 0, said)
    while kept.any():
        places = np.flatnonzero(kept)
        without = np.array([_f1(n_violations == violated[:, p], said) for p in places])
        # Of equals, the one that holds least often where the class is said carries the least.
        weakest = np.lexsort((agrees[np.ix_(said, candidates[places])].mean(axis=0), -without))[0]
        if without[weakest] < best:
            break
        best = without[weakest]
        kept[places[weakest]] = False
        n_violations = n_violations - violated[:, places[weakest]]
    chosen = np.flatnonzero(kept)
    loss = [_f1(n_violations == violated[:, p], said) for p in chosen]
    return [int(candidates[chosen[i]]) for i in np.argsort(loss, kind="stable")]


def _f1(holds: Bools, said: Bools) -> float:
    total = int(holds.sum()) + int(said.sum())
    return 2 * int((holds & said).sum()) / total if total else 0.0


def _agreement(holds: Bools, truly: Bools, said: Bools) -> dict[str, float]:
    return {
        "support": int(holds.sum()),
        "coverage": _fraction(holds),
        "precision": _fraction(truly[holds]),
        "recall": _fraction(holds[truly]),
        "fidelity": _fraction(holds == said),
        "network_recall": _fraction(holds[said]),
    }


def _fraction(which: Bools) -> float:
    return float(which.mean()) if which.size else float("nan")
