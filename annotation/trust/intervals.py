"""Honest intervals for small, stratified, weighted samples of a witness's answers against an expert's.

A witness's table has three proportions: how often it says present, and how often the expert says present where it did
and where it did not. Each gets a Beta posterior whose number of cells is Kish's effective one (weights) over a design
effect (stratification), and whose weak prior is the mean of all concepts: so five cells that happen to agree do not
make a certainty. Kappa, sensitivity, specificity and predictive values are functions of the three, and their
intervals the 2.5th and 97.5th percentiles of the same posterior. Design effects are pooled over concepts, because a
handful of cells cannot tell its own. `benchmarks/audit_coverage.py` holds this against the usual alternatives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

from annotation.trust.agreement import UNDEFINED, Z_95, Agreement, Interval, hanley_mcneil_variance, pabak_of

Floats = npt.NDArray[np.float64]

PRIOR_CELLS = 1.25
"""Weight of the pooled prior on the expert's answer, in cells; chosen by measured coverage."""
_PRIOR_CELLS_SAID = 1.0
_UNSTRATIFIED_FREEDOM = 10.0
"""Degrees of freedom at which the measured design effect counts as much as none at all: in a handful of cells all
answers of a stratum may happen to be alike, which is no proof that strata leave nothing open."""
_N_DRAWS = 2000
_TINY = 1e-3


class Sample(NamedTuple):
    """The answered cells of one witness and concept; all (n,)."""

    said: Floats
    """1 or 0 by the witness."""
    true: Floats
    """1 or 0 by the expert."""
    weight: Floats
    """Cells of the population that each one stands for."""
    stratum: npt.NDArray[np.int64]
    """Number of the stratum and round it was drawn in."""
    open_fraction: Floats
    """1 - inclusion probability: nothing is uncertain where everything was asked."""
    score: Floats
    """What the witness ranks by, NaN where it has none."""


class _Proportion(NamedTuple):
    """One weighted proportion of one concept, and what its variance is by design and as if unstratified."""

    share: float
    n_effective: float
    designed: float
    plain: float
    freedom: int
    """Cells less their strata: how much is known of the variance by design."""


def audited(samples: Sequence[Sample]) -> list[Agreement]:
    """The agreement of one witness with the expert for each concept, with 95 % intervals; samples may be empty."""
    prior = _pooled(samples)
    parts = [_proportions(sample, prior) for sample in samples]
    effects = [_design_effect([p[i] for p in parts]) for i in range(3)]
    return [_agreement(s, p, prior, effects) for s, p in zip(samples, parts, strict=True)]


def weighted_table(sample: Sample) -> tuple[float, float, float, float]:
    """(tp, fp, fn, tn) in cells of the population."""
    said, true = sample.said > 0.5, sample.true > 0.5
    kinds = (said & true, said & ~true, ~said & true, ~said & ~true)
    return tuple(float(sample.weight[kind].sum()) for kind in kinds)  # type: ignore[return-value]


def table_numbers(tp: Floats, fp: Floats, fn: Floats, tn: Floats) -> dict[str, Floats]:
    """Kappa, sensitivity, specificity, predictive values and prevalence of tables; NaN where undefined."""
    total = tp + fp + fn + tn
    chance = ((tp + fp) * (tp + fn) + (fn + tn) * (fp + tn)) / np.where(total > 0, total, np.nan)
    return {
        "kappa": _ratio(tp + tn - chance, total - chance),
        "sensitivity": _ratio(tp, tp + fn),
        "specificity": _ratio(tn, tn + fp),
        "ppv": _ratio(tp, tp + fp),
        "npv": _ratio(tn, tn + fn),
        "prevalence": _ratio(tp + fn, total),
    }


def weighted_auroc(sample: Sample) -> Interval:
    """Area under the ROC curve of the witness's score, with Hanley and McNeil's error on the scale of log-odds.

    The error is that of an area drawn half a pair towards chance: else a perfect ranking of six cells would be certain.
    """
    ranked = np.isfinite(sample.score)
    true, weight = sample.true[ranked] > 0.5, sample.weight[ranked]
    if true.all() or not true.any():
        return UNDEFINED
    area = float(roc_auc_score(true, sample.score[ranked], sample_weight=weight))
    n_present, n_absent = _kish(weight[true]), _kish(weight[~true])
    pairs = n_present * n_absent
    drawn_in = (area * pairs + 0.5) / (pairs + 1)
    variance = hanley_mcneil_variance(drawn_in, n_present, n_absent)
    open_fraction = float(np.average(sample.open_fraction[ranked], weights=weight))
    reach = Z_95 * np.sqrt(max(variance * open_fraction, 0.0)) / (drawn_in * (1 - drawn_in))
    low, high = expit(logit(drawn_in) + np.array([-reach, reach]))
    return Interval(area, float(min(low, area)), float(max(high, area)))


def _agreement(
    sample: Sample, parts: tuple[_Proportion, ...], prior: tuple[float, ...], effects: Sequence[float]
) -> Agreement:
    table = np.asarray(weighted_table(sample))
    point = {name: float(value) for name, value in table_numbers(*table).items()}
    draws = _posterior(parts, prior, effects)
    found = {name: _interval(point[name], values) for name, values in draws.items()}
    total = table.sum()
    return Agreement(
        n=len(sample.said),
        prevalence=point["prevalence"],
        said_fraction=float((table[0] + table[1]) / total) if total else float("nan"),
        pabak=pabak_of(*table),
        kappa=found["kappa"],
        sensitivity=found["sensitivity"],
        specificity=found["specificity"],
        ppv=found["ppv"],
        npv=found["npv"],
        auroc=weighted_auroc(sample),
    )


def _posterior(
    parts: tuple[_Proportion, ...], prior: tuple[float, ...], effects: Sequence[float]
) -> Mapping[str, Floats]:
    rng = np.random.default_rng(0)  # the same cells give the same interval
    drawn = []
    for part, expected, effect, weight in zip(
        parts, prior, effects, (_PRIOR_CELLS_SAID, PRIOR_CELLS, PRIOR_CELLS), strict=True
    ):
        n = part.n_effective / effect
        present = part.share * n + weight * expected + _TINY
        drawn.append(rng.beta(present, (1 - part.share) * n + weight * (1 - expected) + _TINY, _N_DRAWS))
    said, ppv, missed = drawn
    return table_numbers(said * ppv, said * (1 - ppv), (1 - said) * missed, (1 - said) * (1 - missed))


def _pooled(samples: Sequence[Sample]) -> tuple[float, float, float]:
    """The three proportions in the mean table of all concepts, each concept counting once.

    One even table is among them: a few concepts that happen to agree everywhere must not make each other certain.
    """
    tables = [np.asarray(weighted_table(s)) / s.weight.sum() for s in samples if s.weight.sum() > 0]
    tp, fp, fn, tn = np.mean([*tables, np.full(4, 0.25)], axis=0)
    return float(tp + fp), float(tp / (tp + fp)), float(fn / (fn + tn))


def _proportions(sample: Sample, prior: tuple[float, ...]) -> tuple[_Proportion, ...]:
    said, true = sample.said > 0.5, sample.true > 0.5
    everywhere = np.ones(len(said), bool)
    domains = ((everywhere, said), (said, true), (~said, true))
    return tuple(_proportion(sample, d, hit, p) for (d, hit), p in zip(domains, prior, strict=True))


def _proportion(
    sample: Sample, domain: npt.NDArray[np.bool_], hit: npt.NDArray[np.bool_], expected: float
) -> _Proportion:
    weight = np.where(domain, sample.weight, 0.0)
    total = weight.sum()
    if total <= 0:
        return _Proportion(expected, 0.0, 0.0, 0.0, 0)
    # Where everything was asked nothing is left open: as if there were endless cells.
    open_fraction = max(float((weight * sample.open_fraction).sum() / total), 1e-6)
    n = _kish(weight[domain]) / open_fraction
    share = float(weight[hit].sum() / total)
    smooth = (share * n + expected) / (n + 1)
    residual = weight * (hit - smooth) / total
    freedom = int(domain.sum()) - len(np.unique(sample.stratum[domain]))
    return _Proportion(share, n, _stratified_variance(residual, sample), smooth * (1 - smooth) / n, freedom)


def _stratified_variance(residual: Floats, sample: Sample) -> float:
    """Variance of a sum of residuals over strata; a stratum of one cell counts with its whole residual."""
    variance = 0.0
    for stratum in np.unique(sample.stratum):
        here = sample.stratum == stratum
        values, n = residual[here], int(here.sum())
        spread = n * values.var(ddof=1) if n > 1 else values[0] ** 2
        variance += float(sample.open_fraction[here].mean() * spread)
    return variance


def _design_effect(parts: Sequence[_Proportion]) -> float:
    """Variance by design over variance as if unstratified, pooled over concepts, each by its cells, drawn towards 1."""
    designed = sum(p.designed * p.n_effective for p in parts)
    plain = sum(p.plain * p.n_effective for p in parts)
    freedom = sum(p.freedom for p in parts)
    found = designed / plain if plain > 0 else 1.0
    return (freedom * found + _UNSTRATIFIED_FREEDOM) / (freedom + _UNSTRATIFIED_FREEDOM)


def _interval(value: float, draws: Floats) -> Interval:
    """Central 95 % of the draws, widened to hold the estimate itself."""
    low, high = np.quantile(draws[np.isfinite(draws)], (0.025, 0.975)) if np.isfinite(draws).any() else (np.nan,) * 2
    return Interval(value, float(np.fmin(low, value)), float(np.fmax(high, value)))


def _kish(weight: Floats) -> float:
    return float(weight.sum() ** 2 / (weight**2).sum()) if len(weight) else 0.0


def _ratio(part: Floats, whole: Floats) -> Floats:
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), np.nan)
