"""What rules are worth: each class's rules measured on images that were not used to read them, and across seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from data_contracts.concepts import Vocabulary
from model.explain.bootstrap import Resampling
from model.explain.class_rules import ClassRule
from model.explain.rules import Bools, Ints, image_rule_holds, literals_of
from model.intervals import Interval
from model.outputs import Outputs

MEASURES = ("coverage", "precision", "recall", "fidelity", "network_recall", "network_precision")

CLASS_RULE_COLUMNS = (
    "class", "rule", "length", "n_images", "support",
    *(f"{name}{end}" for name in MEASURES for end in ("", "_low", "_high")),
    "stability", "stability_low", "stability_high", "n_seeds", "n_seeds_same", "terms",
)  # fmt: skip

SEED_COLUMNS = ("seed", "class", "rule", "terms")
"""Of the tables that training writes for each seed."""

RulesOfSeeds = Mapping[int, Sequence[ClassRule]]


class Measured(NamedTuple):
    """Held-out images as the rules are measured on them."""

    outputs: Outputs
    y: Ints
    """(N,) true classes."""
    vocabulary: Vocabulary
    class_names: tuple[str, ...]
    resampling: Resampling

    @property
    def concepts(self) -> Bools:
        """(N, K) the network's own concepts."""
        return self.outputs.concept_probabilities >= 0.5


def class_rules(
    rules: Sequence[ClassRule],
    outputs: Outputs,
    y: Ints,
    vocabulary: Vocabulary,
    class_names: tuple[str, ...],
    *,
    groups: Sequence[object] | None = None,
    other_seeds: RulesOfSeeds | None = None,
) -> pd.DataFrame:
    """The rules measured on these outputs and true classes `y`, one row a rule: take held-out images.

    n_images: images of the split. support: images where the rule holds. coverage: support as a fraction.
    precision: fraction of the supported images that are of the class. recall: fraction of the class's images that
    are supported. fidelity: fraction of all images on which rule and network agree about the class.
    network_recall: fraction of the images given the class by the network that are supported; network_precision:
    fraction of the supported images that the network gives the class. Each with a 95 % interval.
    stability: likeness (Jaccard's index of terms) with the closest rule of each other seed's network, mean, smallest
    and largest; n_seeds of them, of which n_seeds_same have the very same rule. terms: JSON list of
    {concept_id, present}.
    """
    measured = Measured(outputs, y, vocabulary, class_names, Resampling(len(y), groups))
    rows = [
        {
            "class": rule.class_name,
            "rule": rule.text(vocabulary),
            "length": len(rule.literals),
            **measures(rule.holds(measured.concepts, vocabulary), rule.class_name, measured),
            **_stability(rule, other_seeds or {}),
            "terms": terms_json(rule),
        }
        for rule in rules
    ]
    return pd.DataFrame(rows, columns=list(CLASS_RULE_COLUMNS))


def class_summary(
    rules: Sequence[ClassRule], measured: Measured, other_seeds: RulesOfSeeds | None = None
) -> pd.DataFrame:
    """One row a class: how many rules it has, the `or` of them measured like one rule, and its terms across seeds.

    term_overlap: Jaccard's index of the terms of all the class's rules between each two seeds; mean, smallest, largest.
    names_no_concept: fraction of the images of the class (by the network) whose own rule has no term.
    """
    predicted = measured.outputs.predicted
    empty: Bools = np.logical_not(literals_of(measured.outputs, predicted).used.any(axis=1))
    rows = []
    for j, name in enumerate(measured.class_names):
        own = [rule for rule in rules if rule.class_name == name]
        holds = np.zeros(len(measured.y), bool)
        for rule in own:
            holds |= rule.holds(measured.concepts, measured.vocabulary)
        said = predicted == j
        row: dict[str, object] = {"class": name, "n_rules": len(own), **measures(holds, name, measured)}
        row["names_no_concept"] = float(empty[said].mean()) if said.any() else float("nan")
        rows.append(row | _spread("term_overlap", _overlaps(name, rules, other_seeds or {})))
    return pd.DataFrame(rows)


def measures(holds: Bools, class_name: str, measured: Measured) -> dict[str, float]:
    """Support and all measures of a rule that holds for these images, with intervals."""
    j = measured.class_names.index(class_name)
    truly, said = measured.y == j, measured.outputs.predicted == j
    fraction = measured.resampling.fraction
    found: dict[str, Interval] = {
        "coverage": fraction(holds),
        "precision": fraction(truly, holds),
        "recall": fraction(holds, truly),
        "fidelity": fraction(holds == said),
        "network_recall": fraction(holds, said),
        "network_precision": fraction(said, holds),
    }
    numbers: dict[str, float] = {"n_images": len(holds), "support": int(holds.sum())}
    for name, interval in found.items():
        numbers |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return numbers


class Faithfulness(NamedTuple):
    """How the logic layer agrees with the decision that is reported, over all held-out images."""

    rule_agrees: Interval
    """Images where the class with the truest rule is the class the network says."""
    image_rule_holds: Interval
    """Images whose own rule, for the class they were given, agrees with their own concepts."""
    rule_accuracy: Interval
    network_accuracy: Interval


def faithfulness(measured: Measured) -> Faithfulness:
    """The rule's fidelity to the network, beside the accuracies of both."""
    outputs, fraction = measured.outputs, measured.resampling.fraction
    decided = outputs.rule_truth.argmax(1)
    return Faithfulness(
        fraction(decided == outputs.predicted),
        fraction(image_rule_holds(outputs, outputs.predicted)),
        fraction(decided == measured.y),
        fraction(outputs.predicted == measured.y),
    )


# ---- across seeds --------------------------------------------------------------------------------------------


def seed_table(seed: int, rules: Sequence[ClassRule], vocabulary: Vocabulary) -> pd.DataFrame:
    """The rules of one seed's network, to be kept with the model."""
    rows = [(seed, rule.class_name, rule.text(vocabulary), terms_json(rule)) for rule in rules]
    return pd.DataFrame(rows, columns=list(SEED_COLUMNS))


def rules_of(table: pd.DataFrame) -> list[ClassRule]:
    """The rules that `seed_table` wrote down."""
    return [
        ClassRule(str(name), tuple((t["concept_id"], bool(t["present"])) for t in json.loads(terms)))
        for name, terms in zip(table["class"], table["terms"], strict=True)
    ]


def terms_json(rule: ClassRule) -> str:
    """The terms as a JSON list of {concept_id, present}."""
    return json.dumps([{"concept_id": c, "present": present} for c, present in rule.literals])


def jaccard(first: frozenset[tuple[str, bool]], second: frozenset[tuple[str, bool]]) -> float:
    """Shared terms over all terms; 1 for two empty sets."""
    return len(first & second) / len(first | second) if first | second else 1.0


def _stability(rule: ClassRule, other_seeds: RulesOfSeeds) -> dict[str, float]:
    own = frozenset(rule.literals)
    closest = [
        max((jaccard(own, frozenset(o.literals)) for o in others if o.class_name == rule.class_name), default=0.0)
        for others in other_seeds.values()
    ]
    return _spread("stability", closest) | {"n_seeds": len(closest), "n_seeds_same": closest.count(1.0)}


def _overlaps(name: str, rules: Sequence[ClassRule], other_seeds: RulesOfSeeds) -> list[float]:
    """Jaccard's index of the class's terms between each two seeds, the one that is kept among them."""
    terms = [
        frozenset(literal for rule in found if rule.class_name == name for literal in rule.literals)
        for found in (rules, *other_seeds.values())
    ]
    return [jaccard(terms[a], terms[b]) for a in range(len(terms)) for b in range(a)]


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean, smallest and largest: a few seeds are too few for an interval."""
    if not values:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), float("nan"))
    return {name: float(np.mean(values)), f"{name}_low": min(values), f"{name}_high": max(values)}
