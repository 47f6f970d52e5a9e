"""A label model: how reliable each witness is on each concept, learned from how witnesses fit together.

For concept k the unseen truth y has prior odds from the image, and witnesses err independently given it:

    logit P(y = 1 | z)  =  a_k z + b_k                   z: standardised alignment score
    P(vote = 1 | y = 1) =  sensitivity,   P(vote = 0 | y = 0) = specificity      per witness and concept

fitted by expectation maximisation with Beta priors on the rates (learning from crowds, Raykar et al., JMLR 2010).
Without a score, a_k z + b_k is the logit of the prevalence and this is Dawid and Skene's model.

**Alignment fitted on the votes is not an independent witness.** Cross-fitting keeps a vote's own noise out of the
score of its image, so chance errors are independent and can be told apart. Errors that follow image content (a
judge that takes every dark image for X) are learned by the head too and look like agreement; nothing but an expert
shows them. That is why the score's part is capped, and why `annotation.trust.audit` exists.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

from annotation.trust.thresholds import otsu_cut

Array = npt.NDArray[np.float64]

SENSITIVITY_PRIOR = (8.5, 1.5)
"""Beta pseudo-counts (hits, misses): a judge is taken for decent until its answers say otherwise."""
SPECIFICITY_PRIOR = (8.0, 2.0)
_N_STEPS = 300
_N_START_STEPS = 15
_SLOPE_PENALTY = 0.5
_UNTAUGHT_SLOPE = 1.5
"""Slope of a score that no answer was ever held against: a soft threshold, not a calibration."""
_TINY = 1e-9
MAX_SCORE_LOG_ODDS = 5.0
"""No score alone says more than this (odds of about 150 to 1)."""


class Evidence(NamedTuple):
    """What is known of N images and K concepts, from J voting witnesses and one continuous score."""

    score: npt.NDArray[np.floating]
    """(N, K) alignment score; NaN where there is none."""
    value: npt.NDArray[np.floating]
    """(J, N, K) votes in [0, 1]."""
    weight: npt.NDArray[np.floating]
    """(J, N, K) weight of each vote in [0, 1]; 0 = silent."""
    decided: npt.NDArray[np.floating]
    """(N, K) 1 or 0 where an expert or a given label settles it, else NaN."""


class LabelModel(NamedTuple):
    """Fitted reliabilities."""

    sensitivity: Array
    """(J, K)"""
    specificity: Array
    """(J, K)"""
    slope: Array
    """(K,) of the standardised score."""
    intercept: Array
    """(K,)"""
    prevalence: Array
    """(K,)"""
    centre: Array
    """(K,) mean of the score."""
    scale: Array
    """(K,) standard deviation of the score."""

    def prior_log_odds(self, score: npt.NDArray[np.floating]) -> Array:
        """(N, K) log-odds of presence from the score alone; the prevalence's where there is no score."""
        standard = (score - self.centre) / self.scale
        log_odds = np.clip(self.slope * standard + self.intercept, -MAX_SCORE_LOG_ODDS, MAX_SCORE_LOG_ODDS)
        return np.where(np.isnan(standard), logit(self.prevalence), log_odds)

    def vote_log_odds(self, value: npt.NDArray[np.floating], weight: npt.NDArray[np.floating]) -> Array:
        """(J, N, K) what each vote adds to the log-odds; nothing where the witness was silent."""
        present = np.log(self.sensitivity / (1 - self.specificity))[:, None]
        absent = np.log((1 - self.sensitivity) / self.specificity)[:, None]
        return weight * (value * present + (1 - value) * absent)


def fit_label_model(evidence: Evidence) -> LabelModel:
    """The label model of the evidence, by expectation maximisation from cautious starting values."""
    model = _start(evidence)
    # With one witness and nothing to hold it against, its rates cannot be learned: the prior's stand.
    n_voters = (evidence.weight > 0).any(1).sum(0)
    learnable = n_voters + np.isfinite(evidence.score).any(0) + np.isfinite(evidence.decided).any(0) >= 2
    taught = (n_voters > 0) | np.isfinite(evidence.decided).any(0)
    untaught_intercept = -_UNTAUGHT_SLOPE * _cuts(model, evidence)
    for _ in range(_N_STEPS if taught.any() else 1):
        fitted = _maximised(model, evidence, _posterior(model, evidence), learnable)
        model = fitted._replace(
            slope=np.where(taught, fitted.slope, _UNTAUGHT_SLOPE),
            intercept=np.where(taught, fitted.intercept, untaught_intercept),
        )
    return model


def _start(evidence: Evidence) -> LabelModel:
    n_witnesses, _, n_concepts = evidence.value.shape
    centre, scale = _moments(evidence.score)
    shape = (n_witnesses, n_concepts)
    model = LabelModel(
        np.full(shape, SENSITIVITY_PRIOR[0] / sum(SENSITIVITY_PRIOR)),
        np.full(shape, SPECIFICITY_PRIOR[0] / sum(SPECIFICITY_PRIOR)),
        np.zeros(n_concepts),
        np.zeros(n_concepts),
        np.full(n_concepts, 0.5),
        centre,
        scale,
    )
    prevalence = _corrected_prevalence(model, evidence)
    model = model._replace(prevalence=prevalence, intercept=logit(prevalence))
    # The slope starts at what the votes say of the score: a score that they do not follow stays without a say.
    for _ in range(_N_START_STEPS):
        model = _newton(model, evidence, _posterior(model._replace(slope=model.slope * 0), evidence))
    return model


def _corrected_prevalence(model: LabelModel, evidence: Evidence) -> Array:
    """(K,) share of presence after taking the prior's false answers off the votes (Rogan and Gladen, 1978)."""
    total = evidence.weight.sum((0, 1))
    votes = np.divide(
        (evidence.weight * evidence.value).sum((0, 1)), total, out=np.full(len(total), 0.5), where=total > 0
    )
    if len(model.sensitivity):
        false = 1 - model.specificity[0]
        votes = np.where(total > 0, (votes - false) / (model.sensitivity[0] - false), votes)
    return np.clip(votes, 0.02, 0.98)


def _posterior(model: LabelModel, evidence: Evidence) -> Array:
    log_odds = model.prior_log_odds(evidence.score) + model.vote_log_odds(evidence.value, evidence.weight).sum(0)
    return np.where(np.isnan(evidence.decided), expit(log_odds), evidence.decided)


def _maximised(model: LabelModel, evidence: Evidence, truth: Array, learnable: npt.NDArray[np.bool_]) -> LabelModel:
    present, absent = evidence.weight * truth, evidence.weight * (1 - truth)
    sensitivity = _rate((present * evidence.value).sum(1), present.sum(1), SENSITIVITY_PRIOR)
    specificity = _rate((absent * (1 - evidence.value)).sum(1), absent.sum(1), SPECIFICITY_PRIOR)
    # A witness worse than chance has no say; it is never read backwards.
    specificity = np.maximum(specificity, 1 - sensitivity + _TINY)
    model = model._replace(
        sensitivity=np.where(learnable, sensitivity, model.sensitivity),
        specificity=np.where(learnable, specificity, model.specificity),
        prevalence=np.clip((truth.sum(0) + 1) / (len(truth) + 2), 0.005, 0.995),
    )
    return _newton(model, evidence, truth)


def _rate(hits: Array, total: Array, prior: tuple[float, float]) -> Array:
    return np.clip((hits + prior[0]) / (total + sum(prior)), 0.01, 0.99)


def _newton(model: LabelModel, evidence: Evidence, truth: Array) -> LabelModel:
    """One Newton step of every concept's logistic curve from score to truth, slope drawn to 0 and kept ≥ 0."""
    standard = (evidence.score - model.centre) / model.scale
    seen = np.isfinite(standard)
    standard = np.where(seen, standard, 0.0)
    fitted = expit(model.slope * standard + model.intercept)
    residual = np.where(seen, truth - fitted, 0.0)
    curvature = np.where(seen, fitted * (1 - fitted), 0.0)
    gradient = (residual * standard).sum(0) - _SLOPE_PENALTY * model.slope, residual.sum(0)
    ss = (curvature * standard**2).sum(0) + _SLOPE_PENALTY
    si, ii = (curvature * standard).sum(0), curvature.sum(0) + 1e-3
    determinant = ss * ii - si**2
    slope = model.slope + (ii * gradient[0] - si * gradient[1]) / determinant
    intercept = model.intercept + (ss * gradient[1] - si * gradient[0]) / determinant
    return model._replace(slope=np.clip(slope, 0, 8), intercept=np.clip(intercept, -12, 12))


def _cuts(model: LabelModel, evidence: Evidence) -> Array:
    """(K,) Otsu's cut between the two modes of each standardised score; 0 where there is no score."""
    standard = (evidence.score - model.centre) / model.scale
    finite = [column[np.isfinite(column)] for column in standard.T]
    return np.array([otsu_cut(c) if len(c) else 0.0 for c in finite])


def _moments(score: npt.NDArray[np.floating]) -> tuple[Array, Array]:
    """(K,) mean and standard deviation of the finite scores; 0 and 1 where there are none."""
    seen = np.isfinite(score)
    n = np.maximum(seen.sum(0), 1)
    centre = np.where(seen, score, 0).sum(0, dtype=np.float64) / n
    variance = (np.where(seen, score - centre, 0) ** 2).sum(0, dtype=np.float64) / n
    return centre, np.where(variance > 0, np.sqrt(variance), 1.0)
