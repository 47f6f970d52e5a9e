"""Metrics as pure functions of arrays. All are fractions; one that is undefined is NaN, never 0 or 1.

A macro average runs over the classes (concepts) for which the metric is defined.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

N_BINS = 15
"""Confidence bins of the calibration error."""


class PerClass(NamedTuple):
    """(C,) arrays; NaN where undefined."""

    precision: Floats
    recall: Floats
    f1: Floats
    support: Ints


class Reliability(NamedTuple):
    """(N_BINS,) arrays over equal-width bins of confidence; NaN in empty bins."""

    n: Ints
    confidence: Floats
    accuracy: Floats


def confusion_matrix(y: Ints, predicted: Ints, n_classes: int) -> Ints:
    """(C, C) counts; rows are true classes, columns predicted ones."""
    return np.bincount(y * n_classes + predicted, minlength=n_classes**2).reshape(n_classes, n_classes).astype(np.int64)


def accuracy(confusion: Ints) -> float:
    """Fraction of images on the diagonal."""
    return float(_ratio(np.trace(confusion), confusion.sum()))


def per_class(confusion: Ints) -> PerClass:
    """Precision, recall and F1 of each class; NaN for a class without images, precision 0 if never predicted."""
    hits, support, n_predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    absent = support == 0
    precision = np.where(absent, np.nan, _ratio(hits, np.maximum(n_predicted, 1)))
    return PerClass(
        precision, _ratio(hits, support), np.where(absent, np.nan, _ratio(2 * hits, support + n_predicted)), support
    )


def binary_auroc(positive: Bools, score: Floats) -> float:
    """Area under the ROC curve by ranks, ties counted half; NaN unless both kinds occur."""
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if n_positive == 0 or n_negative == 0:
        return float("nan")
    ranks = rankdata(score)
    return float((ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def class_auroc(y: Ints, probabilities: Floats) -> Floats:
    """(C,) one-versus-rest AUROC of each class from (N, C) probabilities."""
    return np.array([binary_auroc(y == j, probabilities[:, j]) for j in range(probabilities.shape[1])])


def concept_auroc(c: Floats, mask: Bools, probabilities: Floats) -> Floats:
    """(K,) AUROC of each concept over its usable cells; the target is c ≥ 0.5."""
    hard = c >= 0.5
    return np.array(
        [binary_auroc(hard[mask[:, k], k], probabilities[mask[:, k], k]) for k in range(c.shape[1])], dtype=np.float64
    )


def concept_f1(c: Floats, mask: Bools, probabilities: Floats) -> Floats:
    """(K,) F1 of each concept at 0.5 over its usable cells; NaN for one that is never present."""
    target, said = (c >= 0.5) & mask, (probabilities >= 0.5) & mask
    hits, present, claimed = (target & said).sum(0), target.sum(0), said.sum(0)
    return np.where(present == 0, np.nan, _ratio(2 * hits, present + claimed))


def concept_accuracy(c: Floats, mask: Bools, probabilities: Floats) -> Floats:
    """(K,) fraction of usable cells on the right side of 0.5."""
    return _ratio((((c >= 0.5) == (probabilities >= 0.5)) & mask).sum(0), mask.sum(0))


def attribute_macro_f1(c: Floats, mask: Bools, probabilities: Floats, attributes: Sequence[Sequence[int]]) -> Floats:
    """Macro-F1 of each attribute over its values, as studies of attributes report it.

    An attribute is the columns of values that exclude one another: the most probable one is what is said, judged on
    images for which exactly one is true and all are known. An attribute of one column has the values present and
    absent. Values that never occur are left out; NaN for an attribute without images.
    """
    found = []
    for columns in attributes:
        truth, said, usable = attribute_values(c[:, columns], mask[:, columns], probabilities[:, columns])
        n_values = max(2, len(columns))
        found.append(mean_defined(per_class(confusion_matrix(truth[usable], said[usable], n_values)).f1))
    return np.array(found, dtype=np.float64)


def attribute_values(c: Floats, mask: Bools, probabilities: Floats) -> tuple[Ints, Ints, Bools]:
    """(N,) true value, said value and usability of one attribute, from the (N, V) columns of its values."""
    hard = c >= 0.5
    if c.shape[1] == 1:
        return hard[:, 0].astype(np.int64), (probabilities[:, 0] >= 0.5).astype(np.int64), mask[:, 0]
    usable = mask.all(1) & (hard.sum(1) == 1)
    return hard.argmax(1).astype(np.int64), probabilities.argmax(1).astype(np.int64), usable


def reliability(y: Ints, probabilities: Floats) -> Reliability:
    """Mean confidence and accuracy of the predicted class, in bins of confidence."""
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == y
    # Bins are (low, high], as in torchmetrics.
    bins = np.clip(np.ceil(confidence * N_BINS).astype(np.int64) - 1, 0, N_BINS - 1)
    n = np.bincount(bins, minlength=N_BINS)
    return Reliability(
        n.astype(np.int64),
        _ratio(np.bincount(bins, confidence, N_BINS), n),
        _ratio(np.bincount(bins, right, N_BINS), n),
    )


def expected_calibration_error(bins: Reliability) -> float:
    """Mean gap between confidence and accuracy, weighted by images."""
    gaps = np.nan_to_num(np.abs(bins.confidence - bins.accuracy))
    return float(_ratio((gaps * bins.n).sum(), bins.n.sum()))


def brier(y: Ints, probabilities: Floats) -> float:
    """Mean squared distance between probabilities and the one-hot truth, summed over classes: 0 to 2."""
    if len(y) == 0:
        return float("nan")
    truth = np.eye(probabilities.shape[1])[y]
    return float(((probabilities - truth) ** 2).sum(1).mean())


def mean_defined(values: Floats) -> float:
    """Mean over the entries that are not NaN; NaN if there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of an empty mean; NaN is the answer here
        return float(np.nanmean(values)) if np.size(values) else float("nan")


def _ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Floats:
    """Elementwise division, NaN where the denominator is 0."""
    n, d = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(n, d, out=np.full(np.broadcast(n, d).shape, np.nan), where=d != 0)
