"""Probes: how well do concepts foretell the class, and do they carry more than their own labels can?

A probe is a fresh classifier that is given something instead of the image: concept labels, the network's concept
probabilities or embeddings, its features. It is fitted on training images, its strength is chosen on validation
images, and it is measured on held-out ones. Two kinds: linear (logistic regression) and non-linear (a support-vector
machine with a Gaussian kernel).

*Leakage* (Mahinpei et al., 2021): knowledge of the class that the concepts' meaning does not contain. Whoever knows
the concepts' labels should learn nothing more about the class from the network's concepts, so leakage is what a probe
gains when it is given these beside the labels, against the same probe with labels alone. Its control gives them as they
are in another image: what the additional columns gain by chance.

*Completeness* (Yeh et al., NeurIPS 2020): how far concepts alone carry the decision, (a(probe) − a(chance)) /
(a(network) − a(chance)), where a is accuracy and chance always says the commonest class.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from model.concept_encoder import ConceptCode
from model.explain.bootstrap import Resampling
from model.explain.paths import Seen, Subject
from model.intervals import Interval

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

LINEAR, NON_LINEAR = "linear", "non_linear"
LABELS, HARD, PROBABILITIES, EMBEDDINGS, RANDOM_DIRECTIONS = (
    *("labels", "hard_concepts", "probabilities", "embeddings"),
    "random_directions",
)
BESIDE_LABELS, SHUFFLED_BESIDE_LABELS = "labels_and_", "labels_and_shuffled_"
MAX_TRAINING_IMAGES = 5000
"""Probes are fitted on so many training images at most, drawn at random."""
_STRENGTHS = {LINEAR: (0.01, 0.1, 1.0), NON_LINEAR: (0.3, 1.0, 10.0)}
_DEFAULT_STRENGTH = 1.0


class Codes(NamedTuple):
    """The concepts that the network itself sees in each split's images."""

    train: ConceptCode
    val: ConceptCode | None
    held_out: ConceptCode


class Probe(NamedTuple):
    """One probe on the held-out images."""

    kind: str
    given: str
    correct: Bools
    """(N,)"""
    control_correct: Bools
    """(N,) when each image is judged by the input of another one: what the probe knows without looking."""


class Leakage(NamedTuple):
    """Accuracy that is gained beside the concepts' labels."""

    gained: Interval
    control: Interval


class _Inputs(NamedTuple):
    train: Floats
    val: Floats
    held_out: Floats


def probes(subject: Subject, codes: Codes, *, seed: int = 0) -> dict[tuple[str, str], Probe]:
    """All probes by (kind, what they are given); none where the training images have fewer than two classes."""
    if len(np.unique(subject.train.y)) < 2:
        return {}
    rows = _training_rows(subject.train, seed)
    splits = (subject.train.y[rows], subject.val.y, subject.held_out.y)
    order = np.random.default_rng(seed).permutation(len(subject.held_out))
    found = {}
    for given, inputs in _all_inputs(subject, codes, rows, seed).items():
        for kind in (LINEAR, NON_LINEAR):
            said, control = _fitted(kind, inputs, splits, order)
            y = subject.held_out.y
            found[kind, given] = Probe(kind, given, said == y, control == y)
    return found


def leakage(found: Mapping[tuple[str, str], Probe], kind: str, given: str, resampling: Resampling) -> Leakage:
    """What `given` (probabilities or embeddings) adds to the labels, and what it adds when it is of another image."""
    labels = found[kind, LABELS].correct.astype(np.float64)
    gained, by_chance = (
        resampling.mean(found[kind, prefix + given].correct - labels)
        for prefix in (BESIDE_LABELS, SHUFFLED_BESIDE_LABELS)
    )
    return Leakage(gained, by_chance)


def completeness(probe: Bools, network: Bools, chance: Bools, resampling: Resampling) -> Interval:
    """(a(probe) − a(chance)) / (a(network) − a(chance)) from (N,) correctness each; NaN for a network without skill."""
    sums = np.stack([probe, network, chance], axis=1).astype(np.float64)

    def statistic(totals: Floats) -> Floats:
        gained, whole = totals[:, 0] - totals[:, 2], totals[:, 1] - totals[:, 2]
        return np.divide(gained, whole, out=np.full(len(totals), np.nan), where=whole > 0)

    return resampling.of_sums(sums, statistic)


def best_correct(found: Mapping[tuple[str, str], Probe], given: str) -> Bools:
    """(N,) correctness of the linear or non-linear probe on `given`, whichever is right more often."""
    both = [found[kind, given].correct for kind in (LINEAR, NON_LINEAR)]
    return max(both, key=lambda correct: float(correct.mean()))


def _training_rows(train: Seen, seed: int) -> Ints:
    rows = np.random.default_rng(seed).permutation(len(train))[:MAX_TRAINING_IMAGES]
    missing = np.setdiff1d(train.y, train.y[rows])  # a rare class keeps an image
    kept = [int(np.flatnonzero(train.y == j)[0]) for j in missing]
    return np.sort(np.concatenate([rows, np.asarray(kept, np.int64)])).astype(np.int64)


def _all_inputs(subject: Subject, codes: Codes, rows: Ints, seed: int) -> dict[str, _Inputs]:
    train, val, held = subject.train.take(rows), subject.val, subject.held_out
    code = ConceptCode(*(part[rows] for part in codes.train))
    parts = [code, codes.val, codes.held_out]
    probabilities = _Inputs(*(_probabilities(part, len(subject.vocabulary)) for part in parts))
    features = _Inputs(*(seen.features.numpy() for seen in (train, val, held)))
    # Directions of the features as random as they can be, as many as there are concepts.
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((features.train.shape[1], len(subject.vocabulary))).astype(np.float32)
    labels = _Inputs(*(np.where(seen.mask, seen.targets >= 0.5, 0.5) for seen in (train, val, held)))
    found = {
        LABELS: labels,
        HARD: _Inputs(*((part >= 0.5).astype(np.float32) for part in probabilities)),
        RANDOM_DIRECTIONS: _Inputs(*(part @ directions for part in features)),
    }
    own = {PROBABILITIES: probabilities}
    if code.embeddings.shape[2] > 1:
        own[EMBEDDINGS] = _Inputs(*(_embeddings(part, code) for part in parts))
    for name, inputs in own.items():
        found[name] = inputs
        found[BESIDE_LABELS + name] = _beside(labels, inputs)
        found[SHUFFLED_BESIDE_LABELS + name] = _beside(labels, _Inputs(*(rng.permutation(part) for part in inputs)))
    return found


def _beside(first: _Inputs, second: _Inputs) -> _Inputs:
    return _Inputs(*(np.concatenate(pair, axis=1) for pair in zip(first, second, strict=True)))


def _probabilities(code: ConceptCode | None, n_concepts: int) -> Floats:
    return np.zeros((0, n_concepts), np.float32) if code is None else code.probabilities.numpy()


def _embeddings(code: ConceptCode | None, like: ConceptCode) -> Floats:
    whole = like.embeddings[:0] if code is None else code.embeddings
    return whole.flatten(1).numpy()


def _fitted(kind: str, inputs: _Inputs, splits: tuple[Ints, Ints, Ints], order: Ints) -> tuple[Ints, Ints]:
    """What the chosen probe says of the held-out images, and of them with each other's inputs."""
    y_train, y_val, _ = splits
    best, best_accuracy = None, -1.0
    for strength in _STRENGTHS[kind] if len(y_val) else (_DEFAULT_STRENGTH,):
        probe = _probe(kind, strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # validation images judge what came out
            probe.fit(inputs.train, y_train)
        accuracy = float((probe.predict(inputs.val) == y_val).mean()) if len(y_val) else 0.0
        if accuracy > best_accuracy:
            best, best_accuracy = probe, accuracy
    if best is None:
        raise AssertionError("one strength is always tried")
    said = best.predict(inputs.held_out).astype(np.int64)
    return said, said[order]


def _probe(kind: str, strength: float) -> Any:
    if kind == LINEAR:
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
    return make_pipeline(StandardScaler(), SVC(C=strength, kernel="rbf", gamma="scale"))
