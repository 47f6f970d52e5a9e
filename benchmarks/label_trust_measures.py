"""What `label_trust.py` measures of labels against an answer sheet."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import cohen_kappa_score, roc_auc_score

N_BINS = 10


def measures(
    true: np.ndarray, score: np.ndarray, called: np.ndarray, probability: np.ndarray | None = None
) -> dict[str, float]:
    """AUROC and kappa as means over concepts; precision of calls of presence, coverage and ECE over cells.

    Args:
        true: (n, K) 1 or 0.
        score: (n, K) what is ranked by.
        called: (n, K) 1, 0, or NaN for an abstention.
        probability: (n, K), where there is one.
    """
    spoken = np.isfinite(called)
    kappas = [kappa(t[s], c[s]) for t, c, s in zip(true.T, called.T, spoken.T, strict=True)]
    found = {
        "AUROC": float(np.mean([roc_auc_score(t, s) for t, s in zip(true.T, score.T, strict=True)])),
        "kappa": float(np.mean(kappas)),
        "precision": float(true[called == 1].mean()),
        "coverage": float(spoken.mean()),
    }
    if probability is not None:
        found["ECE"] = expected_calibration_error(probability.ravel(), true.ravel())
    return found


def kappa(true: np.ndarray, called: np.ndarray) -> float:
    """Cohen's kappa; 0 where nothing was called, or only one thing was said."""
    if not len(called) or (np.ptp(true) == 0 and np.ptp(called) == 0):
        return 0.0
    return float(cohen_kappa_score(true, called))


def expected_calibration_error(probability: np.ndarray, true: np.ndarray) -> float:
    bins = np.minimum((probability * N_BINS).astype(int), N_BINS - 1)
    gaps = [abs(probability[bins == b].mean() - true[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(np.sum(gaps))
