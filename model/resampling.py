"""Metrics of many resampled test sets at once: what intervals and paired tests are made of.

A resample is a row of weights, how often each image is drawn. The same rows serve every system and seed, so that the
difference of two systems is measured on the same images (a paired bootstrap).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_contracts.dataset import AlignedDataset
from model import metrics as m
from model.evaluate import attributes_of
from model.outputs import Outputs

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Statistic = Callable[[Floats], Floats]
"""(R, N) weights → (R,) values, or (R, M) values that are to be averaged over those that are defined."""

_CELLS_AT_ONCE = 2_000_000
"""Weights that are held at a time."""


class Metric(NamedTuple):
    """A metric of one network on one test set, for any weights of its images."""

    of: Statistic
    is_ranked: bool = False
    """Whether it costs a pass over sorted images, not one product of matrices."""


def clusters_of(dataset: AlignedDataset) -> Ints:
    """(N,) number of each image's cluster: its patient (`group_id`), or itself where there is none."""
    frame = dataset.frame
    own = "image " + frame["image_id"].astype(str)
    names = frame["group_id"].astype(object).where(frame["group_id"].notna(), own).astype(str)
    return np.unique(names.to_numpy(), return_inverse=True)[1].astype(np.int64)


def strata_of(clusters: Ints, y: Ints) -> Ints:
    """(number of clusters,) the class that most images of each cluster have."""
    counts = np.zeros((clusters.max(initial=-1) + 1, y.max(initial=0) + 1), np.int64)
    np.add.at(counts, (clusters, y), 1)
    return counts.argmax(1).astype(np.int64)


def resamples(clusters: Ints, y: Ints, n_resamples: int, seed: int = 0) -> Iterator[Floats]:
    """Blocks of (r, N) weights: clusters drawn with replacement within each class, so that no class goes missing."""
    rng = np.random.default_rng(seed)
    strata = strata_of(clusters, y)
    block = max(1, _CELLS_AT_ONCE // max(1, len(y)))
    for start in range(0, n_resamples, block):
        r = min(block, n_resamples - start)
        drawn = np.zeros((r, len(strata)))
        for stratum in np.unique(strata):
            members = np.flatnonzero(strata == stratum)
            drawn[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=r)
        yield drawn[:, clusters]


def metrics_of(dataset: AlignedDataset, outputs: Outputs) -> dict[str, Metric]:
    """Every metric that `evaluate.measure` gives of these outputs and that a comparison shows, by its name."""
    y, n_classes = dataset.class_index(), len(dataset.class_names)
    confusion = _confusion(y, outputs.predicted, n_classes)
    found = {
        "accuracy": Metric(_after(confusion, _accuracy)),
        "macro_f1": Metric(_after(confusion, _f1)),
        "auroc": Metric(_aurocs([(y == j, outputs.class_probabilities[:, j], None) for j in range(n_classes)]), True),
        "ece": Metric(_calibration_error(y, outputs.class_probabilities)),
        "brier": Metric(_brier(y, outputs.class_probabilities)),
    }
    if outputs.has_concepts:
        found |= _concept_metrics(dataset, outputs)
    if outputs.has_rules:
        decided = outputs.rule_truth.argmax(1).astype(np.int64)
        by_rule = _confusion(y, decided, n_classes)
        found |= {
            "rule_accuracy": Metric(_after(by_rule, _accuracy)),
            "rule_macro_f1": Metric(_after(by_rule, _f1)),
            "rule_agreement": Metric(_weighted_mean((decided == outputs.predicted).astype(np.float64))),
        }
    return found


def values_of(metric: Metric, weights: Floats) -> Floats:
    """(R,) the metric for (R, N) weights; macro averages run over the parts that are defined in that resample."""
    values = metric.of(weights)
    if values.ndim == 1:
        return values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of an empty mean; NaN is the answer here
        return np.nanmean(values, axis=1)


# ---- statistics --------------------------------------------------------------------------------------------------


def _after(counts: Statistic, score: Callable[[Floats], Floats]) -> Statistic:
    return lambda w: score(counts(w))


def _weighted_mean(values: Floats) -> Statistic:
    return lambda w: _divided(w @ values, w.sum(1))


def _confusion(truth: Ints, said: Ints, n_values: int, usable: npt.NDArray[np.bool_] | None = None) -> Statistic:
    cells = np.eye(n_values * n_values)[truth * n_values + said]
    counted = cells if usable is None else cells * usable[:, None]
    return lambda w: (w @ counted).reshape(len(w), n_values, n_values)


def _accuracy(confusion: Floats) -> Floats:
    return _divided(np.trace(confusion, axis1=1, axis2=2), confusion.sum((1, 2)))


def _f1(confusion: Floats) -> Floats:
    hits, support, said = np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(2), confusion.sum(1)
    return np.where(support > 0, _divided(2 * hits, support + said), np.nan)


def _calibration_error(y: Ints, probabilities: npt.NDArray[np.float32]) -> Statistic:
    confidence, right = probabilities.max(1), probabilities.argmax(1) == y
    bins = np.clip(np.ceil(confidence * m.N_BINS).astype(np.int64) - 1, 0, m.N_BINS - 1)
    gaps = np.eye(m.N_BINS)[bins] * (confidence - right)[:, None]
    return lambda w: _divided(np.abs(w @ gaps).sum(1), w.sum(1))


def _brier(y: Ints, probabilities: npt.NDArray[np.float32]) -> Statistic:
    distances = ((probabilities - np.eye(probabilities.shape[1])[y]) ** 2).sum(1)
    return _weighted_mean(distances)


def _concept_metrics(dataset: AlignedDataset, outputs: Outputs) -> dict[str, Metric]:
    c, mask, said = dataset.concepts, dataset.mask, outputs.concept_probabilities
    present, claimed = (c >= 0.5) & mask, (said >= 0.5) & mask
    hits, right = (present & claimed).astype(np.float64), ((c >= 0.5) == (said >= 0.5)) & mask
    counts = np.concatenate([hits, present, claimed, right, mask], axis=1).astype(np.float64)

    def counted(w: Floats) -> list[Floats]:
        return np.split(w @ counts, 5, axis=1)

    def f1(w: Floats) -> Floats:
        n_hits, n_present, n_claimed, _, _ = counted(w)
        return np.where(n_present > 0, _divided(2 * n_hits, n_present + n_claimed), np.nan)

    def accuracy(w: Floats) -> Floats:
        _, _, _, n_right, n = counted(w)
        return _divided(n_right, n)

    columns = [(c[:, k] >= 0.5, said[:, k], mask[:, k]) for k in range(c.shape[1])]
    return {
        "concept_auroc": Metric(_aurocs(columns), True),
        "concept_f1": Metric(f1),
        "concept_accuracy": Metric(accuracy),
        "concept_macro_f1": Metric(_attribute_f1(c, mask, said, attributes_of(dataset.vocabulary))),
    }


def _attribute_f1(
    c: npt.NDArray[np.float32],
    mask: npt.NDArray[np.bool_],
    said: npt.NDArray[np.float32],
    attributes: Sequence[Sequence[int]],
) -> Statistic:
    confusions = [
        _confusion(*m.attribute_values(c[:, k], mask[:, k], said[:, k])[:2], max(2, len(k)),
                   m.attribute_values(c[:, k], mask[:, k], said[:, k])[2])
        for k in attributes
    ]  # fmt: skip

    def of(w: Floats) -> Floats:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return np.stack([np.nanmean(_f1(confusion(w)), axis=1) for confusion in confusions], axis=1)

    return of


def _aurocs(
    columns: Sequence[tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32], npt.NDArray[np.bool_] | None]],
) -> Statistic:
    ranked = [_auroc(*column) for column in columns]
    return lambda w: np.stack([of(w) for of in ranked], axis=1)


def _auroc(
    positive: npt.NDArray[np.bool_], score: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_] | None
) -> Statistic:
    """Area under the ROC curve, ties counted half."""
    rows = np.arange(len(score)) if mask is None else np.flatnonzero(mask)
    order = rows[np.argsort(score[rows], kind="stable")]
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0]) if len(order) else np.zeros(0, np.int64)
    truth = positive[order].astype(np.float64)

    def of(w: Floats) -> Floats:
        if not len(order):
            return np.full(len(w), np.nan)
        drawn = w[:, order]
        n_positive = np.add.reduceat(drawn * truth, starts, axis=1)
        n_negative = np.add.reduceat(drawn * (1 - truth), starts, axis=1)
        below = np.cumsum(n_negative, axis=1) - n_negative / 2
        return _divided((n_positive * below).sum(1), n_positive.sum(1) * n_negative.sum(1))

    return of


def _divided(numerator: Floats, denominator: Floats) -> Floats:
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0)
