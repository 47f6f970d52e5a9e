"""What a handful of expert answers teaches: a correction for every concept, drawn to what all have in common."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit

Array = npt.NDArray[np.float64]

MAX_FACTOR = 3.0
"""No part of a log-odds is made more than so many times what it was."""
_COST = ((4.0, 1.0), (20.0, 2.0))
"""What a change of a factor and of an offset costs: common to all concepts, and of one concept."""


def pooled_correction(
    parts: Array,
    truth: Array,
    concept: npt.NDArray[np.integer],
    n_concepts: int,
    weight: Array | None = None,
    *,
    firmness: float = 1.0,
) -> Array:
    """(n_concepts, P + 1) changes of the factors of P parts of a log-odds, and an offset, that make it fit the truth.

    The log-odds of cell i become Σ_p (1 + change_p) part_ip + offset. A concept has few answered cells, so the
    changes of each are those of all concepts together and its own, both drawn to none: a logistic regression with
    random slopes, at its mode. With no cell, or none that says otherwise, nothing changes.

    Args:
        parts: (n, P) what the log-odds of each cell is the sum of.
        truth: (n,) 1 or 0.
        concept: (n,) column of each cell.
        n_concepts: Columns in all.
        weight: (n,) how many cells each one counts for; 1 if None.
        firmness: How much dearer than usual a change is: as many times the answers are needed for the same.
    """
    design = np.column_stack([parts, np.ones(len(parts))])
    n_parts = design.shape[1]
    base = parts.sum(1)
    counts = np.ones(len(parts)) if weight is None else weight
    common_cost, own_cost = (firmness * np.r_[np.full(n_parts - 1, slope), offset] for slope, offset in _COST)

    def cost(flat: Array) -> tuple[float, Array]:
        common, own = flat[:n_parts], flat[n_parts:].reshape(n_concepts, n_parts)
        log_odds = base + (design * (common + own[concept])).sum(1)
        loss = counts * (np.logaddexp(0, log_odds) - truth * log_odds)
        pull = design * (counts * (expit(log_odds) - truth))[:, None]
        gradient = np.zeros_like(own)
        np.add.at(gradient, concept, pull)
        total = loss.sum() + (common_cost * common**2).sum() / 2 + (own_cost * own**2).sum() / 2
        return total, np.r_[pull.sum(0) + common_cost * common, (gradient + own_cost * own).ravel()]

    found = minimize(cost, np.zeros(n_parts * (n_concepts + 1)), jac=True, method="L-BFGS-B").x
    return np.asarray(found[:n_parts] + found[n_parts:].reshape(n_concepts, n_parts), np.float64)
