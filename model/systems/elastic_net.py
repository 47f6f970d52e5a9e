"""Multinomial logistic regression with an elastic net, along a path of penalties: convex, so without a seed.

    minimise over W, b:  mean_i w_i · CE(W·x_i + b, y_i) + λ · ( α·|W|₁ + (1 − α)/2 · |W|² )

Solved by accelerated proximal gradient steps (FISTA; Beck and Teboulle, 2009) with restarts, each λ starting from the
solution of the one before. The intercept b is not penalised.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_SMALLEST_RATIO = 1e-3
"""α below this counts as this where the path's largest λ is computed; a ridge alone has none."""


_ABOVE = 1.0001
"""The path starts this much above the λ at which the first weight appears, where rounding would decide."""


class LinearClasses(NamedTuple):
    """A linear class layer."""

    weights: Floats  # (C, K)
    intercept: Floats  # (C,)
    penalty: float
    """λ"""

    def logits(self, x: Floats) -> Floats:
        """(n, K) → (n, C)."""
        return x @ self.weights.T + self.intercept

    @property
    def n_concepts_used(self) -> float:
        """Weights other than 0, per class."""
        return float((self.weights != 0).sum(1).mean())


def penalties(x: Floats, y: npt.NDArray[np.int64], sample_weights: Floats, n_classes: int, l1_ratio: float, *,
              n: int = 30, smallest_fraction: float = 1e-3) -> Floats:  # fmt: skip
    """(n,) λ from the smallest at which an elastic net uses no column, downwards in equal ratios."""
    gradient = (sample_weights[:, None] * (_shares(y, sample_weights, n_classes) - np.eye(n_classes)[y])).T @ x / len(y)
    largest = _ABOVE * max(float(np.abs(gradient).max()), 1e-9) / max(l1_ratio, _SMALLEST_RATIO)
    return largest * np.geomspace(1, smallest_fraction, n)


def elastic_net_path(
    x: Floats,
    y: npt.NDArray[np.int64],
    sample_weights: Floats,
    n_classes: int,
    *,
    l1_ratio: float,
    path: Floats | None = None,
    tolerance: float = 1e-5,
    max_steps: int = 500,
) -> list[LinearClasses]:
    """The layer for each λ of the path (default `penalties`), from (n, K) columns of similar scale and (n,) classes."""
    lambdas = penalties(x, y, sample_weights, n_classes, l1_ratio) if path is None else path
    padded = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    truth = np.eye(n_classes)[y]
    # Half the largest curvature of the softmax bounds the step (Böhning, 1992).
    curvature = 0.5 * float(np.linalg.norm(padded * np.sqrt(sample_weights)[:, None], 2)) ** 2 / len(x)
    solved: list[LinearClasses] = []
    start = np.zeros((n_classes, padded.shape[1]))
    start[:, -1] = np.log(np.maximum(_shares(y, sample_weights, n_classes), _SMALLEST_RATIO))
    for penalty in lambdas:
        problem = _Problem(padded, truth, sample_weights, float(penalty), l1_ratio, curvature)
        start = problem.solve(start, tolerance, max_steps)
        solved.append(LinearClasses(start[:, :-1].copy(), start[:, -1].copy(), float(penalty)))
    return solved


def _shares(y: npt.NDArray[np.int64], sample_weights: Floats, n_classes: int) -> Floats:
    """(C,) weighted share of each class."""
    return np.bincount(y, sample_weights, n_classes) / sample_weights.sum()


class _Problem(NamedTuple):
    x: Floats  # (n, K + 1), the last column 1
    truth: Floats  # (n, C)
    sample_weights: Floats
    penalty: float
    l1_ratio: float
    curvature: float

    def solve(self, start: Floats, tolerance: float, max_steps: int) -> Floats:
        """(C, K + 1) the minimum, reached when no entry moves by more than `tolerance` in a step."""
        here, ahead, momentum = start, start, 1.0
        for _ in range(max_steps):
            following = self._step(ahead)
            moved = following - here
            if np.abs(moved).max() < tolerance:
                return following
            if ((ahead - following) * moved).sum() > 0:  # the momentum points uphill: start it anew
                momentum = 1.0
            next_momentum = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            ahead = following + (momentum - 1) / next_momentum * moved
            here, momentum = following, next_momentum
        return here

    def _step(self, w: Floats) -> Floats:
        logits = self.x @ w.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = (self.sample_weights[:, None] * (p - self.truth)).T @ self.x / len(self.x)
        moved = w - gradient / self.curvature
        size = self.penalty / self.curvature
        shrunk = np.sign(moved) * np.maximum(np.abs(moved) - size * self.l1_ratio, 0) / (1 + size * (1 - self.l1_ratio))
        shrunk[:, -1] = moved[:, -1]
        return shrunk
