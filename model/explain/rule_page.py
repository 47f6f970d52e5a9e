"""The rules of a classifier as a page of text, with what they are worth in plain words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from textwrap import fill
from typing import Any, NamedTuple

import pandas as pd

from data_contracts.concepts import Vocabulary
from model.config import TrainConfig
from model.explain.rule_evidence import Faithfulness
from model.intervals import Interval

_WIDTH = 100
_NBSP = "\N{NO-BREAK SPACE}"
"""Keeps a number and its sign on one line."""
Row = Mapping[str, Any]


class RulePage(NamedTuple):
    """All that the page tells of."""

    rules: pd.DataFrame
    """Of `rule_evidence.class_rules`."""
    classes: pd.DataFrame
    """Of `rule_evidence.class_summary`."""
    faithfulness: Faithfulness
    config: TrainConfig
    vocabulary: Vocabulary
    split: str
    n_images: int


def rules_page(page: RulePage) -> str:
    """The page: how faithful the rules are, then each class with its rules."""
    parts = ["RULES OF THE CLASSIFIER", *(_wrapped(text) for text in _opening(page))]
    for row in page.classes.to_dict("records"):
        parts.append(_class_part(row, page))
    return "\n\n".join(parts) + "\n"


def percent(interval: Interval) -> str:
    """`87 % (80–92)`; without the bracket where there is no interval, and `unknown` for no number."""
    return _percent(*interval)


def _percent(value: float, low: float, high: float) -> str:
    if pd.isna(value):
        return "unknown"
    text = _plain(value)
    return text if pd.isna(low) else f"{text}{_NBSP}({100 * low:.0f}–{100 * high:.0f})"


def _plain(value: float) -> str:
    return f"{100 * value:.0f}{_NBSP}%"


def _of(row: Row, name: str) -> str:
    return _percent(row[name], row[f"{name}_low"], row[f"{name}_high"])


def _opening(page: RulePage) -> list[str]:
    found = page.faithfulness
    return [
        f"Read on the training images from what the network decides there, and measured on the {page.n_images} images "
        f"of the {page.split} split, which took no part in reading them. In brackets: 95 % intervals. A rule holds for "
        "an image when the network itself sees (probability ½ or more) every concept that the rule asks for, and does "
        "not see those it excludes.",
        _nature(page.config, found),
        f"Decided by the logic layer alone, {percent(found.rule_accuracy)} of the images get the right class; the "
        f"classifier as it is used gets {percent(found.network_accuracy)} right."
        + ("" if (page.rules["n_seeds"] > 0).any() else _ONE_TRAINING),
    ]


_ONE_TRAINING = " No rules of other trainings are kept, so whether another training would find the same is unknown."


def _nature(config: TrainConfig, found: Faithfulness) -> str:
    agrees = f"the logic layer's truest rule names the classifier's class in {percent(found.rule_agrees)} of the images"
    own = f"{percent(found.image_rule_holds)} of the images agree with every term of their own rule"
    if config.family == "rule-only":
        return f"In this system the rule is the decision: {agrees}, and {own}."
    if config.logic == "dcr":
        return (
            "How faithful they are: the logic layer (`dcr`) computes with the very terms that are written here, but "
            f"the reported class comes from the class layer beside it. So this is measured: {agrees}; {own}."
        )
    return (
        "How faithful they are: in the `paper` logic the truth of a rule is computed from concept embeddings and does "
        "not contain whether a concept is present. What is written here is therefore a reading of the network, not the "
        f"way it decides, and has to be measured: {agrees}; {own}. Where these numbers are low, trust the measured "
        "precision and fidelity of each rule, not the rule's origin."
    )


def _class_part(row: Row, page: RulePage) -> str:
    name = str(row["class"])
    rules = page.rules[page.rules["class"] == name].to_dict("records")
    if not rules:
        return f"{name.upper()}\n" + _wrapped(_without_rule(row, name), "  ")
    lines = [name.upper()]
    for n, rule in enumerate(rules, 1):
        lines.append(_wrapped(f"{n}. {_in_words(rule, page.vocabulary)}", "  ", "     "))
        lines.append(_wrapped(_worth(rule, name), "     "))
    if len(rules) == 1:
        together = ("This rule agrees", "It covers")
    else:
        together = (f"One or another of the {len(rules)} rules: this agrees", "Together they cover")
    lines.append(
        _wrapped(
            f"{together[0]} with the classifier in {_of(row, 'fidelity')} of all images. {together[1]} "
            f"{_of(row, 'network_recall')} of what the classifier calls {name}.{_across_seeds(row)}",
            "  ",
        )
    )
    return "\n".join(lines)


def _without_rule(row: Row, name: str) -> str:
    if pd.isna(row["names_no_concept"]):
        return f"No rule can be given: the classifier calls no image of this split {name}, or learnt no rule for it."
    return (
        f"No rule can be given. In {_plain(row['names_no_concept'])} of the images that are called {name} the "
        f"network's rule names no concept at all; what the others name does not tell {name} from the other classes. "
        "The decision comes from the class layer, which these rules do not show."
    )


def _in_words(rule: Row, vocabulary: Vocabulary) -> str:
    terms = json.loads(rule["terms"])
    words = [("" if t["present"] else "NOT ") + vocabulary[t["concept_id"]].name for t in terms]
    return f"{rule['class']} if {' AND '.join(words)}" if words else f"{rule['class']} always"


def _worth(rule: Row, name: str) -> str:
    if not rule["support"]:
        return "Holds for no image of this split, so nothing can be said about it."
    text = (
        f"Holds for {rule['support']} of {rule['n_images']} images, {_of(rule, 'coverage')}. Of these, "
        f"{_of(rule, 'precision')} truly are {name}, and {_of(rule, 'network_precision')} are called so by the "
        f"classifier. It holds for {_of(rule, 'recall')} of all images that are {name}."
    )
    return text + _stability(rule)


def _stability(rule: Row) -> str:
    n = int(rule["n_seeds"])
    if not n:
        return ""
    same = int(rule["n_seeds_same"])
    others = "the other training" if n == 1 else f"{n} other trainings"
    found = f" Of {others}, {same} found the same rule" if n > 1 else f" The other training found {_same(same)}"
    return f"{found}; the closest rules share {_plain(rule['stability'])} of their terms."


def _same(n: int) -> str:
    return "the same rule" if n else "a different rule"


def _across_seeds(row: Row) -> str:
    if pd.isna(row["term_overlap"]):
        return ""
    return f" Between two trainings, {_plain(row['term_overlap'])} of the terms used for {row['class']} are shared."


def _wrapped(text: str, first: str = "", later: str | None = None) -> str:
    return fill(text, _WIDTH, initial_indent=first, subsequent_indent=first if later is None else later)
