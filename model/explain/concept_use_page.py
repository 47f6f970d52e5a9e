"""One page in plain words: how much of the decision goes through the concepts."""

from __future__ import annotations

import pandas as pd

from model.config import TrainConfig
from model.explain.concept_use import BY_CONSTRUCTION, ConceptUse, Measure
from model.explain.curves import RIGHT, WRONG
from model.intervals import Interval

_MANY, _FEW = 0.8, 0.2
_FUSION_WORDS = {
    "concat": "`fusion = concat`, as published: the class layer reads concepts and image features side by side, so it "
    "may pass the concepts by",
    "bottleneck": "`fusion = bottleneck`: the class layer reads the concepts alone and cannot pass them by",
    "residual": "`fusion = residual`: the concepts decide, and image features may only correct what they leave over",
}
_FAMILY_WORDS = {
    "cem": "a concept embedding model: the class layer reads concept embeddings alone",
    "joint-cbm": "a joint concept bottleneck: the class layer reads concept probabilities alone",
    "sequential-cbm": "a sequential concept bottleneck: the class layer reads concept probabilities alone",
    "label-free-cbm": "a sparse concept bottleneck: the class layer reads concept scores alone",
    "rule-only": "a rule over concepts, which decides alone",
}


def concept_use_page(use: ConceptUse, config: TrainConfig, split: str) -> str:
    """The page, as Markdown: an answer first, then what it rests on."""
    parts = ["# Are the concepts used?"]
    if not use.n_images or not use.measures:
        return "\n\n".join([*parts, *use.remarks]) + "\n"
    if not use.has_concepts:
        return "\n\n".join([*parts, _without_concepts(use, config, split), *use.remarks]) + "\n"
    parts += [_answer(use, config), _basis(use, split), "## What happens when concepts are hidden", _hidden(use)]
    corrected = _corrected(use)
    if corrected:
        parts += ["## What happens when a person corrects concepts", corrected]
    carried = _carried(use)
    if carried:
        parts += ["## What the concepts carry", carried]
    parts += ["## Single concepts", _single(use)]
    if use.remarks:
        parts += ["## What limits these numbers", "\n".join(f"- {remark}" for remark in use.remarks)]
    return "\n\n".join(parts) + "\n"


def points(interval: Interval) -> str:
    """`11.0 percentage points (8.2 to 13.9)`."""
    return f"{100 * interval.value:.1f} percentage points{_ends(interval, 1)}"


def percent(interval: Interval) -> str:
    """`94.5 % (92.5 to 96.2)`."""
    return "unknown" if pd.isna(interval.value) else f"{100 * interval.value:.1f} %{_ends(interval, 1)}"


def _falls(interval: Interval) -> str:
    """What an accuracy does that loses so much."""
    if interval.low > 0:
        return f"accuracy falls by {points(interval)}"
    if interval.high < 0:
        return f"accuracy rises by {points(Interval(-interval.value, -interval.high, -interval.low))}"
    return f"accuracy does not change beyond chance (loss of {points(interval)})"


def _ends(interval: Interval, digits: int) -> str:
    if pd.isna(interval.low) or interval.low == interval.high:
        return ""
    return f" ({100 * interval.low:.{digits}f} to {100 * interval.high:.{digits}f})"


def _without_concepts(use: ConceptUse, config: TrainConfig, split: str) -> str:
    accuracy = use.measures[0]
    return (
        f"**No.** This system (`{config.family}`) has no concepts: its decision goes from the image's features "
        f"straight to the class, and 0 % of it goes through concepts. It gets {percent(accuracy.interval)} of the "
        f"{use.n_images} images of the {split} split right; always saying the commonest class would get "
        f"{100 * accuracy.control:.1f} %. There is no concept to hide or to correct, and no rule to read."
    )


def _answer(use: ConceptUse, config: TrainConfig) -> str:
    share = _of(use, "share_through_concepts")
    built = (
        _FUSION_WORDS.get(config.fusion, "") if config.family == "med-micn" else _FAMILY_WORDS.get(config.family, "")
    )
    return f"**{_verdict(use)}{_but(use)}** {_share_words(share)} The system is {built or config.family}."


def _verdict(use: ConceptUse) -> str:
    share, lost = _of(use, "share_through_concepts").interval, _of(use, "lost_without_concepts").interval
    can_be_lost = _of(use, "lost_with_shuffled_concepts").control
    needed = lost.value / can_be_lost if can_be_lost > 0 else float("nan")
    if share.value >= _MANY and (pd.isna(needed) or needed >= _MANY):
        return "Yes: the decision goes through the concepts."
    if share.value <= _FEW and not lost.low > 0:
        return "Hardly: the decision goes past the concepts."
    if not lost.low > 0:
        return "Partly: the concepts are read, but without them accuracy does not fall beyond chance."
    if needed < _MANY:
        return "Partly: the concepts are read, but most decisions would stay right without them."
    return "Partly: the concepts are read, and so are the features beside them."


def _but(use: ConceptUse) -> str:
    """What the concepts' way is worth to a reader, where the class layer uses of them what has no name."""
    lost, truths = _of(use, "lost_without_concepts").interval, _of(use, "lost_with_truth_values_hidden").interval
    if not lost.low > 0 or truths.value >= _FEW * lost.value:
        return ""
    return (
        " Little of that depends on whether a concept is present or absent: the class layer uses what else the "
        "concepts' embeddings hold, which their names do not describe."
    )


def _share_words(share: Measure) -> str:
    if share.control_is == BY_CONSTRUCTION:
        return "All of what moves the decision comes through the concepts, because there is no other way."
    return (
        f"Of what moves the decision from image to image and class to class, {percent(share.interval)} comes through "
        f"the concepts and the rest straight from the image's features (with another image's concepts the same "
        f"reckoning gives {100 * share.control:.1f} %)."
    )


def _basis(use: ConceptUse, split: str) -> str:
    accuracy = _of(use, "accuracy")
    return (
        f"Measured on {use.n_images} images of the {split} split, of which the classifier gets "
        f"{percent(accuracy.interval)} right; always saying the commonest class would get {100 * accuracy.control:.1f} "
        "%. In brackets: 95 % intervals. All numbers, with their controls, are in `concept_use.csv`."
    )


def _hidden(use: ConceptUse) -> str:
    lost, shuffled = _of(use, "lost_without_concepts"), _of(use, "lost_with_shuffled_concepts")
    truths, alone = _of(use, "lost_with_truth_values_hidden"), _of(use, "accuracy_of_concepts_alone")
    has_side = _of(use, "share_through_concepts").control_is != BY_CONSTRUCTION
    lines = [
        f"- Every concept hidden (given its mean over the training images): {_falls(lost.interval)}."
        + (f" With the direct way hidden instead, the loss is {100 * lost.control:.1f} points." if has_side else ""),
        f"- Concepts of another image: {_falls(shuffled.interval)}; {100 * shuffled.control:.1f} points could be lost. "
        "Here the class layer is misled, not only left without knowledge.",
        f"- Only the truth values hidden, which are what a person reads and corrects: {_falls(truths.interval)}."
        + _embedding_words(truths, lost),
    ]
    if has_side:
        lines.append(
            f"- The concepts alone, without the direct way from the features: {percent(alone.interval)} right."
        )
    random = use.of("accuracy_with_random_concepts")
    if random is not None:
        only = _of(use, "random_concepts_alone")
        lines.append(
            f"- The same system trained on concept labels that were shuffled between images gets "
            f"{percent(random.interval)} right, and {percent(only.interval)} by its meaningless concepts alone. "
            + _random_words(_of(use, "lost_with_random_concept_labels").interval)
        )
    return "\n".join(lines)


def _embedding_words(truths: Measure, lost: Measure) -> str:
    if lost.interval.value <= 0 or truths.interval.value >= 0.5 * lost.interval.value:
        return ""
    return " Most of what the concepts tell the class layer is thus in their embeddings, which no name describes."


def _random_words(lost: Interval) -> str:
    if lost.low > 0:
        return "That is worse: the meaning of the labels helps the decision."
    return "That is not worse beyond chance: a good accuracy is no evidence that the concepts mean anything."


def _corrected(use: ConceptUse) -> str:
    lines = []
    for order in dict.fromkeys(curve.order for curve in use.curves):
        right, wrong = (
            next(c for c in use.curves if (c.order, c.corrections) == (order, kind)) for kind in (RIGHT, WRONG)
        )
        start, ends = right.table.iloc[0], [curve.table.iloc[-1]["accuracy"] for curve in (right, wrong)]
        lines.append(
            f"- {_ORDER_WORDS[order].capitalize()}: right corrections change accuracy by {points(right.area)} on the "
            f"mean of the curve, wrong ones by {points(wrong.area)}. With everything corrected it goes from "
            f"{100 * start['accuracy']:.1f} % to {100 * ends[0]:.1f} % (right) or {100 * ends[1]:.1f} % (wrong)."
        )
    return "\n".join([*lines, "", _listening(use)]) if lines else ""


_ORDER_WORDS = {
    "random": "in random order",
    "uncertainty": "the network's least certain first",
    "utility": "the most useful first (found on validation images)",
}


def _listening(use: ConceptUse) -> str:
    areas = {c.corrections: c.area for c in use.curves if c.order == "random"}
    right, wrong = areas[RIGHT], areas[WRONG]
    if right.low > 0 and wrong.high < 0:
        return "The classifier follows corrections both ways: right ones help, wrong ones harm."
    if right.low > 0:
        return "Right corrections help, and wrong ones do no harm that can be told from chance."
    if wrong.high < 0:
        return "Wrong corrections harm, but right ones do not help more than chance: correct with care."
    return "Corrections move accuracy neither up nor down beyond chance: the classifier does not listen to them."


def _carried(use: ConceptUse) -> str:
    labels = use.of("probe_linear_labels")
    if labels is None:
        return ""
    lines = [
        f"- A fresh linear classifier that is given only the concepts' labels gets {percent(labels.interval)} right."
    ]
    for given, words in (("probabilities", "the network's concept probabilities"), ("embeddings", "its embeddings")):
        probe, complete = use.of(f"probe_linear_{given}"), use.of(f"completeness_{given}")
        if probe is None or complete is None:
            continue
        lines.append(
            f"- Given {words}: {percent(probe.interval)}. Completeness {_decimal(complete.interval)}, where 1 is the "
            f"classifier and 0 the commonest class; as many random directions of the features reach "
            f"{complete.control:.2f}."
        )
        leaks = [use.of(f"leakage_{kind}_{given}") for kind in ("linear", "non_linear")]
        largest = max((leak for leak in leaks if leak is not None), key=lambda m: m.interval.value, default=None)
        if largest is not None:
            lines.append(_leak_words(largest, words, 1 - labels.interval.value))
    return "\n".join(lines)


def _leak_words(leak: Measure, words: str, left: float) -> str:
    verdict = (
        "they carry knowledge of the class that their names do not"
        if leak.interval.low > 0
        else "no leak that can be told from chance"
    )
    return (
        f"- Leakage: {words} beside the labels add {points(leak.interval)}, of {100 * left:.1f} that "
        f"the labels leave over (those of another image: {100 * leak.control:.1f}): {verdict}."
    )


def _decimal(interval: Interval) -> str:
    if pd.isna(interval.value):
        return "unknown"
    ends = "" if pd.isna(interval.low) else f" ({interval.low:.2f} to {interval.high:.2f})"
    return f"{interval.value:.2f}{ends}"


def _single(use: ConceptUse) -> str:
    table = use.knock_out
    sure = table[(table["p_corrected"] < 0.05) & (table["drop"] > 0)]
    top = table.sort_values("drop", ascending=False, kind="stable").head(5)
    shown = "; ".join(
        f"{row['concept']} {100 * row['drop']:.1f} points ({100 * row['changed']:.1f} % of decisions change)"
        for row in top.to_dict("records")
    )
    found = (
        f"{len(sure)} of {len(table)} lower the accuracy beyond chance when hidden alone (sign test, corrected for "
        "their number)."
        if len(sure)
        else f"None of {len(table)} lowers the accuracy beyond chance when hidden alone: concepts stand in for one "
        "another."
    )
    return f"{found} The largest losses: {shown}. All are in `knock_out.csv`."


def _of(use: ConceptUse, name: str) -> Measure:
    found = use.of(name)
    if found is None:
        raise AssertionError(f"{name} is always measured where there are concepts")
    return found
