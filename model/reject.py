"""The reject option: which images are too uncertain to be given a class, and what that buys.

Confidence is the calibrated probability of the class that is said. Coverage is the fraction of images whose
confidence reaches a threshold, risk the fraction of those whose class is wrong. The threshold is chosen on
validation images; what it does is measured on test images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_contracts.errors import ConfigurationError
from model.calibration import Calibration
from model.intervals import highest_plausible_fraction, proportion

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]

_ERROR = 0.05
"""Probability with which the promised risk may be exceeded."""


@dataclass(frozen=True)
class Reject:
    """Below this confidence no class is given."""

    threshold: float
    reason: str
    """How the threshold came about, in words."""

    def says(self, confidence: float) -> str | None:
        """Why an image of this confidence is given no class; None where it is."""
        if confidence >= self.threshold:
            return None
        return f"too uncertain: confidence {confidence:.2f} is below {self.threshold:.2f}, {self.reason}"


def choose_reject(
    calibration: Calibration | None, *, coverage: float | None = None, max_risk: float | None = None
) -> Reject | None:
    """The reject option for a wanted coverage or a highest risk on validation images; None where neither is wanted.

    Raises `ConfigurationError` when both are wanted, there were no validation images, or too few for the risk.
    """
    if coverage is None and max_risk is None:
        return None
    if coverage is not None and max_risk is not None:
        raise ConfigurationError(
            f"explain.reject_coverage = {coverage} and explain.reject_max_risk = {max_risk}: expected one of them."
        )
    if calibration is None:
        raise ConfigurationError(
            "reject option: expected a model with model/calibration.json, this one has none.",
            remedy="Train again with a validation split, or leave explain.reject_coverage and reject_max_risk out.",
        )
    confidences, right = np.asarray(calibration.confidences), np.asarray(calibration.right, bool)
    if coverage is not None:
        threshold = threshold_for_coverage(confidences, coverage)
        return Reject(threshold, f"which {coverage:.0%} of the validation images reached")
    assert max_risk is not None
    threshold = threshold_for_risk(confidences, right, max_risk)
    return Reject(threshold, f"from where on at most {max_risk:.1%} of the classes are wrong")


def threshold_for_coverage(confidences: Floats, coverage: float) -> float:
    """The highest threshold that at least this fraction of the confidences reaches."""
    ascending = np.sort(confidences)
    n_kept = max(1, math.ceil(coverage * len(ascending) - 1e-9))
    return float(ascending[len(ascending) - n_kept])


def threshold_for_risk(confidences: Floats, right: Bools, max_risk: float) -> float:
    """The lowest threshold found above which the risk is at most `max_risk` with 95 % probability.

    Selection with guaranteed risk (Geifman and El-Yaniv, NeurIPS 2017, algorithm 1): a binary search over thresholds,
    each tested by Clopper and Pearson's bound at an error divided by the number of tests. Raises `ConfigurationError`
    when no threshold passes.
    """
    order = np.argsort(confidences, kind="stable")
    ascending, wrong = confidences[order], ~right[order]
    n = len(ascending)
    n_tests = max(1, math.ceil(math.log2(n)))
    low, high, best = 0, n - 1, None
    for _ in range(n_tests):
        middle = (low + high) // 2
        first = int(np.searchsorted(ascending, ascending[middle]))  # equal confidences stand or fall together
        bound = highest_plausible_fraction(int(wrong[first:].sum()), n - first, _ERROR / n_tests)
        if bound <= max_risk:
            best, high = float(ascending[first]), middle
        else:
            low = min(middle + 1, n - 1)
    if best is None:
        raise ConfigurationError(
            f"explain.reject_max_risk = {max_risk}: no confidence was found above which so few of the {n} validation "
            "images are wrong that this risk can be promised.",
            remedy="Choose a higher risk, use explain.reject_coverage, or give more validation images.",
        )
    return best


def coverage_risk(confidences: Floats, right: Bools, split: str, n_points: int = 50) -> pd.DataFrame:
    """The curve: split, threshold, coverage, risk with Wilson's interval, n accepted; from all images to few."""
    descending = np.sort(confidences)[::-1]
    places = np.unique(np.linspace(0, len(descending) - 1, min(n_points, len(descending))).astype(int))[::-1]
    rows = [_point(confidences, right, float(descending[place]), split) for place in places]
    return pd.DataFrame(rows, columns=_COLUMNS).drop_duplicates("threshold", ignore_index=True)


def area_under_risk(confidences: Floats, right: Bools) -> float:
    """Mean risk over all coverages (AURC; Geifman et al., ICLR 2019): lower is better, NaN for no image."""
    if not len(confidences):
        return float("nan")
    wrong = ~right[np.argsort(-confidences, kind="stable")]
    return float((np.cumsum(wrong) / np.arange(1, len(wrong) + 1)).mean())


def at_threshold(confidences: Floats, right: Bools, threshold: float, split: str) -> pd.DataFrame:
    """One row of the curve: what this threshold does on these images."""
    return pd.DataFrame([_point(confidences, right, threshold, split)], columns=_COLUMNS)


_COLUMNS = ["split", "threshold", "n", "n_accepted", "coverage", "risk", "risk_low", "risk_high"]


def _point(confidences: Floats, right: Bools, threshold: float, split: str) -> tuple[object, ...]:
    accepted = confidences >= threshold
    n_accepted = int(accepted.sum())
    risk = proportion(int((~right[accepted]).sum()), n_accepted)
    coverage = n_accepted / len(confidences) if len(confidences) else float("nan")
    return (split, threshold, len(confidences), n_accepted, coverage, *risk)
