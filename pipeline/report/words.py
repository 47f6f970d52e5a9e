"""Numbers and codes as a person reads them. Percent exists here and nowhere else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from data_contracts.errors import DropReason, RejectReason

NOTHING = "–"

REJECTED: Mapping[str, str] = {
    RejectReason.EMPTY_FILE: "the file is empty",
    RejectReason.NOT_AN_IMAGE: "the bytes are no image, whatever the name says",
    RejectReason.UNSUPPORTED_FORMAT: "an image format that is not read",
    RejectReason.TRUNCATED: "the file ends too early",
    RejectReason.UNREADABLE: "the image could not be decoded",
    RejectReason.ZERO_SIZE: "no width or no height",
    RejectReason.TOO_MANY_PIXELS: "more pixels than the safety limit",
    RejectReason.ANIMATED: "several frames where one was expected",
    RejectReason.DICOM_WITHOUT_PIXELS: "a DICOM object without an image",
    RejectReason.DICOM_NEEDS_PLUGIN: "a DICOM compression whose plug-in is not installed",
    RejectReason.EXACT_DUPLICATE: "the same bytes as another image",
    RejectReason.CONFLICTING_LABELS: "one image with two different classes",
    RejectReason.MISSING_FILE: "named in the table, but there is no such file",
    RejectReason.OUTSIDE_SOURCE: "the path leaves the source folder",
    RejectReason.NEAR_DUPLICATE_ACROSS_SPLITS: "nearly the same picture as one in another split",
    RejectReason.EXCLUDED_BY_SOURCE: "excluded by those who published the data",
}

DROPPED: Mapping[str, str] = {
    DropReason.TOO_LONG: "the name is too long to be one attribute",
    DropReason.LIKE_A_CLASS: "says the diagnosis rather than what is seen",
    DropReason.LIKE_ANOTHER: "says the same as another concept",
    DropReason.FAILS_NULL_TEST: "its answers follow the pixels no better than answers at random",
    DropReason.LEAKS_CLASS: "the class alone predicts its answers: the diagnosis in other words",
    DropReason.NOT_SEEN_IN_ANY_IMAGE: "matches no image well enough",
    DropReason.NOT_VISUAL: "cannot be seen in an image",
    DropReason.CONSTANT: "the same in every image",
    DropReason.BY_USER: "dropped by a person",
}

METRICS: Mapping[str, tuple[str, str]] = {
    "accuracy": ("Accuracy", "share of held-out images whose class is right"),
    "macro_f1": ("Macro F1", "precision and recall in one number, every class counting the same"),
    "macro_precision": (
        "Macro precision",
        "of the images given a class, the share that belong to it; mean over classes",
    ),
    "macro_recall": ("Macro recall", "of the images of a class, the share that are found; mean over classes"),
    "auroc": ("AUROC", "chance that a random image of a class scores above one of another; 0.5 is guessing"),
    "concept_auroc": ("Concept AUROC", "the same for the predicted concepts, against their labels; mean over concepts"),
    "concept_f1": ("Concept F1", "precision and recall of the predicted concepts; mean over concepts"),
    "concept_accuracy": ("Concept accuracy", "share of concept predictions that equal the label"),
    "ece": ("Calibration error", "mean gap between stated probability and how often it is right; 0 is best"),
    "brier": (
        "Brier score",
        "squared distance of the probabilities from the truth, summed over classes; 0 is best, 2 worst",
    ),
    "rule_accuracy": ("Accuracy of the rule alone", "when only the concept rules decide"),
    "rule_macro_f1": ("Macro F1 of the rule alone", "when only the concept rules decide"),
    "rule_auroc": ("AUROC of the rule alone", "how well the rules' truth values rank images; 0.5 is guessing"),
    "rule_agreement": ("Agreement of rule and classifier", "share of images where both say the same class"),
    "neural_accuracy": ("Accuracy of the rule layer alone", "when only the concepts decide"),
    "neural_macro_f1": ("Macro F1 of the rule layer alone", "when only the concepts decide"),
    "fidelity": ("Fidelity", "share of images where the rule and the classifier say the same class"),
}
IN_PERCENT = frozenset(METRICS) - {"auroc", "concept_auroc", "rule_auroc", "brier"}

STEPS: Mapping[str, str] = {
    "ingest": "read, check and split the images",
    "concepts": "propose and filter concepts",
    "judge": "ask, image by image, which concepts are visible",
    "align": "compare each concept with the pixels",
    "fuse": "join all witnesses into one label",
    "assemble": "build the training table",
    "dataset": "build the training table",
    "train": "train the classifier",
    "explain": "extract rules and maps",
    "report": "write this page",
}


def known(value: Any) -> bool:
    """Whether there is a number to show."""
    try:
        return value is not None and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def percent(fraction: Any, digits: int = 0) -> str:
    """`0.423` as `42 %`; ends are not rounded away: `<1 %`, `>99 %`."""
    if not known(fraction):
        return NOTHING
    value = 100 * float(fraction)
    if digits == 0 and 0 < value < 0.5:
        return "<1 %"
    if digits == 0 and 99.5 <= value < 100:
        return ">99 %"
    return f"{value:.{digits}f} %"


def decimal(value: Any, digits: int = 2) -> str:
    """`0.8214` as `0.82`."""
    return f"{float(value):.{digits}f}" if known(value) else NOTHING


def count(value: Any) -> str:
    """`12345` as `12 345`, with narrow no-break spaces."""
    return f"{round(float(value)):,}".replace(",", "\u202f") if known(value) else NOTHING


def seconds(value: Any) -> str:
    """`95` as `1 min 35 s`."""
    if not known(value):
        return NOTHING
    total = float(value)
    if total < 60:
        return f"{total:.1f} s" if total < 10 else f"{total:.0f} s"
    minutes, rest = divmod(round(total), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def dollars(value: Any) -> str:
    """`0.5` as `$0.50`."""
    return f"${float(value):,.2f}" if known(value) else NOTHING


def words(code: Any) -> str:
    """`like_a_class` as `like a class`."""
    return str(code).replace("_", " ")


def plural(number: Any, noun: str, many: str | None = None) -> str:
    """`1 image`, `2 images`."""
    return f"{count(number)} {noun if number == 1 else many or noun + 's'}"


def agreement_word(kappa: Any) -> str:
    """Landis and Koch's words for kappa (Biometrics 33, 1977)."""
    if not known(kappa):
        return ""
    value = float(kappa)
    for limit, word in ((0.0, "none"), (0.2, "slight"), (0.4, "fair"), (0.6, "moderate"), (0.8, "substantial")):
        if value <= limit:
            return word
    return "almost perfect"


def pretty(value: Any) -> str:
    """Settings as readable JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


FILTERS: Mapping[str, Callable[..., str]] = {
    "percent": percent,
    "decimal": decimal,
    "count": count,
    "seconds": seconds,
    "dollars": dollars,
    "words": words,
    "agreement_word": agreement_word,
    "pretty": pretty,
}
