"""Light projections on frozen towers, fitted to noisy judgements without learning their noise.

The probe is a reduced-rank ridge regression from the mean cell feature to the judged concepts. Both brakes
matter: the penalty keeps single directions from memorising single wrong answers, and the rank makes concepts
share what they have in common, which independent errors do not. Penalty and rank are chosen by
cross-validation on the judgements alone. Every image is scored by a probe that never saw its group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from annotation.votes import Votes

Array = npt.NDArray[np.float64]

PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
"""Ridge penalties tried, as fractions of the features' total variance."""
RANKS = (1, 2, 3, 4, 5, 6, 8, 11, 16, 24, 32, 48)
"""Ranks tried, below the number of concepts; the full rank is always tried too."""

N_COMPONENTS = 256
"""Directions of largest feature variance kept; the penalties above leave nothing of the others."""
_N_FILL_STEPS = 6


@dataclass(frozen=True)
class Probe:
    """A linear reading of K concepts from F features, centred: 0 is the average image."""

    weight: Array
    """(K, F)"""
    centre: Array
    """(F,) mean feature it was fitted around."""
    penalty: float
    rank: int
    n_images: int
    """How many judged images it was fitted on; 0 means it knows nothing."""

    def __call__(self, features: npt.NDArray[np.floating]) -> Array:
        """(n, F) mean cell features → (n, K) scores."""
        return (features - self.centre) @ self.weight.T


class CrossFit(NamedTuple):
    """One probe and one calibration a fold; image i belongs to `folds[i]`, whose probe never saw it."""

    probes: tuple[Probe, ...]
    calibrations: tuple[Array, ...]
    """Per fold (2, K): slope and intercept of logit P(judged present); NaN where there was nothing to fit."""
    held_out: Array
    """(n, K) each image's scores from the probe of its own fold."""

    def probability(self, scores: Array, fold: int) -> Array:
        """Scores (n, K) of a fold's probe as calibrated probabilities of being judged present."""
        slope, intercept = self.calibrations[fold]
        return 1 / (1 + np.exp(-np.clip(scores * slope + intercept, -30, 30)))


def fold_of(groups: Iterable[str], n_folds: int, seed: int) -> npt.NDArray[np.int64]:
    """(n,) fold of each group by its hash: an image's fold never changes when others are added."""
    digests = (hashlib.sha256(f"{seed}:{group}".encode()).digest() for group in groups)
    return np.fromiter((int.from_bytes(d[:8], "big") % n_folds for d in digests), np.int64)


def cross_fit(features: npt.NDArray[np.floating], votes: Votes, folds: npt.NDArray[np.int64], n_folds: int) -> CrossFit:
    """Probes and calibrations for every fold, each from the other folds' judgements only.

    Args:
        features: (n, F) mean cell features.
        votes: (n, K) judgements of these images.
        folds: (n,) fold of each image.
        n_folds: Number of folds; images outside `features` may belong to any of them.
    """
    problem = _Problem(np.asarray(features, np.float64), votes, folds, n_folds)
    probes = tuple(problem.probe(fold) for fold in range(n_folds))
    held_out = np.zeros((len(features), votes.value.shape[1]))
    for fold, probe in enumerate(probes):
        held_out[folds == fold] = probe(problem.features[folds == fold])
    calibrations = tuple(_calibration(held_out[folds != f], _take(votes, folds != f)) for f in range(n_folds))
    return CrossFit(probes, calibrations, held_out)


class _Problem:
    """The data of one cross-fit, reduced once; folds are only ever left out."""

    def __init__(self, features: Array, votes: Votes, folds: npt.NDArray[np.int64], n_folds: int) -> None:
        self.features = features
        self.values = votes.value.astype(np.float64)
        self.weights = votes.weight.astype(np.float64)
        self.folds = folds
        self.n_folds = n_folds
        self.judged = self.weights.max(1, initial=0) > 0
        # The basis looks at no judgement: it only drops directions in which images hardly differ.
        self.basis = principal_directions(features)
        self.reduced = (features - features.mean(0)) @ self.basis
        self.variance = float(self.reduced.var(0).sum()) or 1.0

    def probe(self, fold: int) -> Probe:
        """The probe for images of `fold`, from all other folds."""
        rows = self.judged & (self.folds != fold)
        if not rows.any():
            zeros = np.zeros((self.values.shape[1], self.features.shape[1]))
            return Probe(zeros, self.features.mean(0), np.nan, 0, 0)
        penalty, rank = self._chosen(fold)
        fit = _Ridge(self.reduced[rows], self.values[rows], self.weights[rows])
        weight = _limited(fit.solve(penalty * self.variance), fit.centred, rank).T @ self.basis.T
        return Probe(weight, self.features[rows].mean(0), penalty, rank, int(rows.sum()))

    def _chosen(self, fold: int) -> tuple[float, int]:
        """(penalty, rank) of least held-out error on the folds other than `fold`."""
        errors = sum(
            (self._errors(frozenset((fold, inner)), inner) for inner in range(self.n_folds) if inner != fold),
            start=np.zeros((len(PENALTIES), len(self._ranks))),
        )
        if not errors.any():  # nothing to hold out: brake as hard as the grid allows
            return PENALTIES[-1], 1
        penalty, rank = np.unravel_index(int(errors.argmin()), errors.shape)
        return PENALTIES[penalty], self._ranks[rank]

    def _errors(self, left_out: frozenset[int], tested: int) -> Array:
        """(penalties, ranks) weighted squared error on fold `tested`, fitted without the folds `left_out`."""
        predictions = self._predictions[left_out]
        rows = self.judged & (self.folds == tested)
        if predictions is None or not rows.any():
            return np.zeros((len(PENALTIES), len(self._ranks)))
        return np.array(
            [
                [
                    (self.weights[rows] * (self.values[rows] - mean - self._shifted(rows, centre) @ weight) ** 2).sum()
                    for weight in by_rank
                ]
                for mean, centre, by_rank in predictions
            ]
        )

    def _shifted(self, rows: npt.NDArray[np.bool_], centre: Array) -> Array:
        return self.reduced[rows] - centre

    @cached_property
    def _ranks(self) -> tuple[int, ...]:
        n_concepts = self.values.shape[1]
        return (*(rank for rank in RANKS if rank < n_concepts), n_concepts)

    @cached_property
    def _predictions(self) -> dict[frozenset[int], list[tuple[Array, Array, list[Array]]] | None]:
        pairs = [frozenset(pair) for pair in combinations(range(self.n_folds), 2)]
        return {pair: self._fitted(pair) for pair in pairs}

    def _fitted(self, left_out: frozenset[int]) -> list[tuple[Array, Array, list[Array]]] | None:
        """Per penalty: concept means, feature centre and one weight a rank; None when nobody is left."""
        rows = self.judged & ~np.isin(self.folds, list(left_out))
        if not rows.any():
            return None
        fit = _Ridge(self.reduced[rows], self.values[rows], self.weights[rows])
        result = []
        for penalty in PENALTIES:
            weight = fit.solve(penalty * self.variance)
            result.append((fit.mean, fit.centre, [_limited(weight, fit.centred, rank) for rank in self._ranks]))
        return result


class _Ridge:
    """Ridge regression of weighted targets for many penalties from one decomposition."""

    def __init__(self, features: Array, values: Array, weights: Array) -> None:
        self.centre = features.mean(0)
        self.centred = features - self.centre
        total = weights.sum(0)
        self.mean = np.divide((weights * values).sum(0), total, out=np.full(len(total), 0.5), where=total > 0)
        self.targets = np.where(weights > 0, values - self.mean, 0.0)
        self.weights = weights
        self.eigenvalues, self.vectors = np.linalg.eigh(self.centred.T @ self.centred / len(features))

    def solve(self, penalty: float) -> Array:
        """(F, K) weights.

        Cells of less than full weight are filled with the current fit and refitted: each step minimises an
        upper bound of the weighted squared error, so a few are enough.
        """
        weight = self._plain(self.weights * self.targets, penalty)
        for _ in range(_N_FILL_STEPS if (self.weights < 1).any() else 0):
            fitted = self.centred @ weight
            weight = self._plain(self.weights * self.targets + (1 - self.weights) * fitted, penalty)
        return weight

    def _plain(self, targets: Array, penalty: float) -> Array:
        moment = self.vectors.T @ (self.centred.T @ targets) / len(targets)
        return self.vectors @ (moment / (np.maximum(self.eigenvalues, 0) + penalty)[:, None])


def _limited(weight: Array, features: Array, rank: int) -> Array:
    """`weight` (F, K) with its fitted values projected on their `rank` leading directions among concepts."""
    if rank >= weight.shape[1]:
        return weight
    fitted = features @ weight
    _, vectors = np.linalg.eigh(fitted.T @ fitted)
    leading = vectors[:, -rank:]
    return weight @ leading @ leading.T


def principal_directions(features: Array) -> Array:
    """(F, R) directions of largest variance, at most `N_COMPONENTS`."""
    centred = features - features.mean(0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return vectors[:, -min(N_COMPONENTS, features.shape[1]) :]


def _calibration(scores: Array, votes: Votes) -> Array:
    """(2, K) slope and intercept of a logistic curve from scores to judgements (Platt); NaN without both answers."""
    return np.stack([_platt(scores[:, k], votes.value[:, k], votes.weight[:, k]) for k in range(scores.shape[1])], 1)


def _platt(scores: Array, values: npt.NDArray[np.float32], weights: npt.NDArray[np.float32]) -> Array:
    targets = np.repeat([1, 0], len(scores))
    parts = np.concatenate([weights * values, weights * (1 - values)])
    used = parts > 0
    if len(np.unique(targets[used])) < 2 or not scores.any():
        return np.full(2, np.nan)
    scale = scores.std() or 1.0
    fit = LogisticRegression(C=100.0).fit((np.tile(scores, 2) / scale)[used, None], targets[used], parts[used])
    return np.array([fit.coef_[0, 0] / scale, fit.intercept_[0]])


def _take(votes: Votes, rows: npt.NDArray[np.bool_]) -> Votes:
    return Votes(votes.value[rows], votes.weight[rows])
