"""Maps in a few numbers: each question's mean, its control's, and the interval of the difference between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from model.intervals import mean_interval

SUMMARY_COLUMNS = (
    *("measure", "method", "n_images", "value", "low", "high", "control", "control_is"),
    *("difference", "difference_low", "difference_high", "verdict", "meaning"),
)


class Question(NamedTuple):
    """One comparison of a column of the table with its control's column."""

    measure: str
    of_class: bool
    value: str
    control: str
    control_is: str
    wanted: int
    """1: the value should be above its control; −1: below."""
    meaning: str


QUESTIONS = (
    Question(
        *("class map with its rule's concept maps", True, "alignment", "shuffled"),
        *("rules' maps of other images", 1),
        "Rank correlation over cells: does the class look where the concepts of its own rule are?",
    ),
    Question(
        *("class map with its rule's concept maps", True, "alignment", "other_concepts"),
        *("maps of concepts that are not in the rule", 1),
        "The same against other concepts of the same image: is it the rule, or do all maps look alike?",
    ),
    Question(
        *("overlap of class map and its rule's concept maps", True, "overlap", "overlap_shuffled"),
        *("rules' maps of other images", 1),
        "Intersection over union of the hottest fifth of the cells.",
    ),
    Question(
        *("concept map with the aligner's map", False, "alignment", "shuffled"),
        *("the aligner's maps of the concept in other images", 1),
        "Rank correlation over cells: does the network see a concept where the aligner does?",
    ),
    Question(
        *("concept map with the aligner's map", False, "alignment", "other_concepts"),
        *("the aligner's maps of other concepts in the image", 1),
        "The same against other concepts of the same image: is it this concept's place?",
    ),
    Question(
        *("deletion of the class map", True, "deletion", "deletion_random", "cells in random order", -1),
        "Area under the class's probability while its hottest cells are blurred away: small when they matter.",
    ),
    Question(
        *("insertion of the class map", True, "insertion", "insertion_random", "cells in random order", 1),
        "Area under the class's probability while its hottest cells are put into a blurred image: large is good.",
    ),
    Question(
        *("deletion of concept maps", False, "deletion", "deletion_random", "cells in random order", -1),
        "Area under the concept's probability while its hottest cells are blurred away: small when they matter.",
    ),
    Question(
        *("insertion of concept maps", False, "insertion", "insertion_random", "cells in random order", 1),
        "Area under the concept's probability while its hottest cells are put into a blurred image: large is good.",
    ),
)


def summarise(table: pd.DataFrame, groups: Mapping[str, str]) -> pd.DataFrame:
    """One row for each question and method: means over maps where value and control are both defined.

    Intervals are bootstrapped over patients where `groups` (image id → patient) names them, else over images: maps of
    one image are not independent.
    """
    rows = [
        row
        for method, of_method in table.groupby("method", sort=False)
        for question in QUESTIONS
        if (row := _answer(question, str(method), of_method, groups)) is not None
    ]
    return pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))


def _answer(
    question: Question, method: str, table: pd.DataFrame, groups: Mapping[str, str]
) -> dict[str, object] | None:
    of_kind = table[(table["target"] == "class") == question.of_class]
    defined = of_kind.dropna(subset=[question.value, question.control])
    if not len(defined):
        return None
    values, controls = (defined[name].to_numpy(np.float64) for name in (question.value, question.control))
    clusters = [groups.get(image_id, image_id) for image_id in defined["image_id"]]
    value, difference = (mean_interval(v, groups=clusters) for v in (values, values - controls))
    return {
        "measure": question.measure,
        "method": method,
        "n_images": defined["image_id"].nunique(),
        **value._asdict(),
        "control": float(controls.mean()),
        "control_is": question.control_is,
        "difference": difference.value,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "verdict": _verdict(difference.low * question.wanted, difference.high * question.wanted),
        "meaning": question.meaning,
    }


def _verdict(one_end: float, other_end: float) -> str:
    """Whether the map does better than its control, from the ends of the difference, positive meaning better."""
    if not np.isfinite(one_end) or not np.isfinite(other_end):
        return "too few images"
    worst, best = min(one_end, other_end), max(one_end, other_end)
    if worst > 0:
        return "better than its control"
    return "worse than its control" if best < 0 else "not told from its control"
