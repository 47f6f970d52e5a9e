"""A label model: how reliable each witness is on each concept, learned from how witnesses fit together.

For concept k the unseen truth y has prior odds from the image, and witnesses err independently given it:

    logit P(y = 1 | z)  =  a_k z + b_k                   z: standardised alignment score
    P(vote = 1 | y = 1) =  sensitivity,   P(vote = 0 | y = 0) = specificity      per witness and concept

fitted by expectation maximisation with Beta priors on the rates (learning from crowds, Raykar et al., JMLR 2010).
Without a score, a_k z + b_k is the logit of the prevalence and this is Dawid and Skene's model. Three things are added:

- *Witnesses that err together.* The correlation of two witnesses' errors is measured (see `_dependence`) and a
  vote's log-odds divided by 1 + the sum of its correlations: n copies of one judge weigh as much as one.
- *Good judges.* P(vote | z) that levels off at its ends can mean that the judge errs or that the score does. Unless
  most concepts, or experts, show the judge to err, it is taken to be right nearly always (`TRUSTED_RATE`), so that a
  score that knows little cannot talk down good answers.
- *Experts.* What they settled also corrects the factors of score and votes and the offset of the sum, concept by
  concept, drawn to what all concepts have in common.

**Alignment fitted on the votes is not an independent witness.** Cross-fitting keeps a vote's own noise out of the
score of its image, so chance errors are independent and can be told apart. Errors that follow image content (a
judge that takes every dark image for X) are learned by the head too and look like agreement; nothing but an expert
shows them. That is why the score's part is capped, and why `annotation.trust.audit` exists.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

from annotation.trust.correction import MAX_FACTOR, pooled_correction
from annotation.trust.cuts import otsu_cut

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
_DEPENDENCE_PRIOR = 3.0
_UNSETTLED_CELLS = 200.0
_TOLERANCE = 1e-4
_DOUBT_COST = 2.0
"""Log-likelihood that two learned rates must gain on a concept (Akaike's price)."""
TRUSTED_RATE = 0.98
"""Sensitivity and specificity of witnesses whose errors nothing shows."""
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
    dependence: Array
    """(J, J) residual correlation of each pair's errors, given the truth, over all concepts; 0 on the diagonal."""
    correction: Array
    """(J + 2, K) what experts taught: factors of the score's and of each vote's log-odds, then an offset."""

    def log_odds(self, evidence: Evidence) -> Array:
        """(N, K) log-odds of presence from score and votes together; settled cells are not looked at."""
        score, votes = self.parts(evidence)
        return score + votes.sum(0)

    def parts(self, evidence: Evidence) -> tuple[Array, Array]:
        """(N, K) log-odds from prevalence and score, and (J, N, K) what each vote adds, as experts corrected them."""
        score = self.correction[0] * self.prior_log_odds(evidence.score) + self.correction[-1]
        return score, self.correction[1:-1, None] * self.vote_log_odds(evidence.value, evidence.weight)

    def prior_log_odds(self, score: npt.NDArray[np.floating]) -> Array:
        """(N, K) log-odds of presence from the score alone; the prevalence's where there is no score."""
        standard = (score - self.centre) / self.scale
        log_odds = np.clip(self.slope * standard + self.intercept, -MAX_SCORE_LOG_ODDS, MAX_SCORE_LOG_ODDS)
        return np.where(np.isnan(standard), logit(self.prevalence), log_odds)

    def vote_log_odds(self, value: npt.NDArray[np.floating], weight: npt.NDArray[np.floating]) -> Array:
        """(J, N, K) what each vote adds to the log-odds; nothing where the witness was silent."""
        present = np.log(self.sensitivity / (1 - self.specificity))[:, None]
        absent = np.log((1 - self.sensitivity) / self.specificity)[:, None]
        # Witnesses that err together count together: n copies of one judge weigh as one.
        crowd = 1 + np.einsum("jl,lnk->jnk", self.dependence, weight)
        return weight / crowd * (value * present + (1 - value) * absent)


def fit_label_model(evidence: Evidence) -> LabelModel:
    """The label model of the evidence, by expectation maximisation from cautious starting values.

    Several witnesses are first taken for one (none outvotes the score), then counted as far as their errors differ.
    Witnesses are believed nearly always right on a concept unless the evidence says otherwise. What experts settled
    corrects the result.
    """
    n_witnesses = len(evidence.value)
    dependence = 1 - np.eye(n_witnesses)
    if n_witnesses > 1:
        dependence = _dependence(_fitted(evidence, dependence), evidence)
    doubting = _fitted(evidence, dependence)
    trusting = _fitted(evidence, dependence, trusting=True)
    gain = _log_likelihood(doubting, evidence) - _log_likelihood(trusting, evidence)
    doubted = _doubted(gain, np.isfinite(evidence.decided)) | ~_learnable(evidence)
    return _corrected(_chosen(doubted, doubting, trusting), evidence)


def _learnable(evidence: Evidence) -> npt.NDArray[np.bool_]:
    """(K,) whether there is anything to hold a witness against; else its rates stay what the prior says."""
    n_voters = (evidence.weight > 0).any(1).sum(0)
    return n_voters + np.isfinite(evidence.score).any(0) + np.isfinite(evidence.decided).any(0) >= 2


def _fitted(evidence: Evidence, dependence: Array, *, trusting: bool = False) -> LabelModel:
    """Maximum a posteriori; with `trusting`, the witnesses' rates are not learned but those of a trusted witness."""
    learnable = _learnable(evidence) & (not trusting)
    expected = SENSITIVITY_PRIOR[0] / sum(SENSITIVITY_PRIOR), SPECIFICITY_PRIOR[0] / sum(SPECIFICITY_PRIOR)
    model = _start(evidence, dependence, (TRUSTED_RATE, TRUSTED_RATE) if trusting else expected)
    taught = (evidence.weight > 0).any((0, 1)) | np.isfinite(evidence.decided).any(0)
    untaught_intercept = -_UNTAUGHT_SLOPE * _cuts(model, evidence)
    for _ in range(_N_STEPS if taught.any() else 1):
        fitted = _maximised(model, evidence, _posterior(model, evidence), learnable)
        fitted = fitted._replace(
            slope=np.where(taught, fitted.slope, _UNTAUGHT_SLOPE),
            intercept=np.where(taught, fitted.intercept, untaught_intercept),
        )
        moved = max(float(np.abs(a - b).max(initial=0)) for a, b in zip(fitted, model, strict=True))
        model = fitted
        if moved < _TOLERANCE:
            break
    return model


def _log_likelihood(model: LabelModel, evidence: Evidence) -> Array:
    """(N, K) of the votes given the score, and given the truth where it is settled."""
    crowd = 1 + np.einsum("jl,lnk->jnk", model.dependence, evidence.weight)
    weight = evidence.weight * np.abs(2 * evidence.value - 1) / crowd
    said = evidence.value > 0.5
    hit, miss = np.log(model.sensitivity)[:, None], np.log(1 - model.sensitivity)[:, None]
    reject, alarm = np.log(model.specificity)[:, None], np.log(1 - model.specificity)[:, None]
    if_present = (weight * np.where(said, hit, miss)).sum(0)
    if_absent = (weight * np.where(said, alarm, reject)).sum(0)
    prior = model.prior_log_odds(evidence.score)
    mixed = np.logaddexp(if_present - np.logaddexp(0, -prior), if_absent - np.logaddexp(0, prior))
    settled = np.where(evidence.decided > 0.5, if_present, if_absent)
    return np.where(np.isnan(evidence.decided), mixed, settled)


def _doubted(gain: Array, settled: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(K,) where witnesses are better taken for fallible, given the log-likelihood (N, K) gained by that.

    Votes that do not follow an extreme score can mean that the judge errs or that the score does; one concept cannot
    tell. So judges are doubted on all concepts where most concepts speak for it, or experts on more than one; and
    singly where experts speak for it.
    """
    of_most = float(np.median(gain.sum(0))) if gain.shape[1] else 0.0
    shown = np.where(settled, gain, 0.0).sum(0)
    everywhere = of_most > _DOUBT_COST or np.minimum(shown, _DOUBT_COST).sum() > _DOUBT_COST
    return (shown > _DOUBT_COST) | everywhere


def _chosen(first: npt.NDArray[np.bool_], model: LabelModel, other: LabelModel) -> LabelModel:
    """`model` for the concepts in `first`, `other` for the rest; dependence is the same in both."""
    columns = {
        name: np.where(first, getattr(model, name), getattr(other, name))
        for name in model._fields
        if name != "dependence"
    }
    return model._replace(**columns)


def _corrected(model: LabelModel, evidence: Evidence) -> LabelModel:
    """The model with the factors and offsets that make it agree with settled cells, drawn to leaving it as it is.

    Errors that score and votes share show in these cells only.
    """
    row, concept = np.nonzero(np.isfinite(evidence.decided))
    if not len(row):
        return model
    truth = evidence.decided[row, concept].astype(np.float64)
    score, votes = model.parts(evidence)
    parts = np.stack([score[row, concept], *votes[:, row, concept]], 1)
    change = pooled_correction(parts, truth, concept, score.shape[1]).T
    factors = np.clip(model.correction[:-1] + change[:-1], 0, MAX_FACTOR)
    return model._replace(correction=np.concatenate([factors, model.correction[-1:] + change[-1:]]))


def _start(evidence: Evidence, dependence: Array, rates: tuple[float, float]) -> LabelModel:
    n_witnesses, _, n_concepts = evidence.value.shape
    centre, scale = _moments(evidence.score)
    shape = (n_witnesses, n_concepts)
    model = LabelModel(
        np.full(shape, rates[0]),
        np.full(shape, rates[1]),
        np.zeros(n_concepts),
        np.zeros(n_concepts),
        np.full(n_concepts, 0.5),
        centre,
        scale,
        dependence,
        _uncorrected(n_witnesses, n_concepts),
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
    return np.where(np.isnan(evidence.decided), expit(model.log_odds(evidence)), evidence.decided)


def _maximised(model: LabelModel, evidence: Evidence, truth: Array, learnable: npt.NDArray[np.bool_]) -> LabelModel:
    # What is said half-heartedly tells less about the judge, and is no half a lie.
    weight = evidence.weight * np.abs(2 * evidence.value - 1)
    said = evidence.value > 0.5
    present, absent = weight * truth, weight * (1 - truth)
    sensitivity = _rate((present * said).sum(1), present.sum(1), SENSITIVITY_PRIOR)
    specificity = _rate((absent * ~said).sum(1), absent.sum(1), SPECIFICITY_PRIOR)
    # A witness worse than chance has no say; it is never read backwards.
    specificity = np.maximum(specificity, 1 - sensitivity + _TINY)
    model = model._replace(
        sensitivity=np.where(learnable, sensitivity, model.sensitivity),
        specificity=np.where(learnable, specificity, model.specificity),
        prevalence=np.clip((truth.sum(0) + 1) / (len(truth) + 2), 0.005, 0.995),
    )
    return _newton(model, evidence, truth)


def _dependence(model: LabelModel, evidence: Evidence) -> Array:
    """(J, J) correlation of errors given the truth; negative ones count as none.

    The truth is taken from experts, elsewhere from the score alone: it is cross-fitted, so a vote's chance error is
    not in it. (Inferred from the votes themselves, whatever two of them agree on would look true.) Moments are exact
    for an uncertain truth: E[v v'] = P(y = 1) E[v v' | y = 1] + P(y = 0) E[v v' | y = 0]. A few hundred settled
    cells outweigh any number of others, and without either errors are taken for independent.
    """
    settled = np.isfinite(evidence.decided)
    truth = np.where(settled, evidence.decided, expit(model.prior_log_odds(evidence.score)))
    known = settled | np.isfinite(evidence.score)
    cells = np.where(settled, 1.0, _UNSETTLED_CELLS / max(int((known & ~settled).sum()), _UNSETTLED_CELLS)) * known
    said = (evidence.value > 0.5).astype(np.float64)
    n_witnesses = len(said)
    covariance, variance = np.zeros((2, n_witnesses, n_witnesses))
    for pair in combinations(range(n_witnesses), 2):
        one, other = pair
        both = cells * (evidence.weight[list(pair)] > 0).all(0)
        hit, alarm = model.sensitivity[list(pair)], 1 - model.specificity[list(pair)]
        excess = said[one] * said[other] - truth * hit.prod(0) - (1 - truth) * alarm.prod(0)
        spread = truth * np.sqrt((hit * (1 - hit)).prod(0)) + (1 - truth) * np.sqrt((alarm * (1 - alarm)).prod(0))
        covariance[one, other] = covariance[other, one] = (both * excess).sum()
        variance[one, other] = variance[other, one] = (both * spread).sum()
    return np.clip(covariance / (variance + _DEPENDENCE_PRIOR), 0, 1)


def _uncorrected(n_witnesses: int, n_concepts: int) -> Array:
    return np.repeat([[1.0]] * (n_witnesses + 1) + [[0.0]], n_concepts, axis=1)


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
    # Full steps overshoot where the curve is nearly a stair.
    slope = model.slope + np.clip((ii * gradient[0] - si * gradient[1]) / determinant, -1, 1)
    intercept = model.intercept + np.clip((ss * gradient[1] - si * gradient[0]) / determinant, -1, 1)
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
