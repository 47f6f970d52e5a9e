"""How well two sources of answers agree, per concept, with 95 % intervals."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from annotation.votes import ImageIds, alignment_scores, latest, matrix, votes_of
from data_contracts.concepts import Vocabulary
from data_contracts.tables import State, Witness

Answers = npt.NDArray[np.floating]
"""1 present, 0 absent, NaN for no answer."""

FUSED = "fused"
"""Name under which the machine's fused labels stand beside witnesses."""
Z_95 = float(norm.ppf(0.975))
"""Half the width of a 95 % interval in standard deviations."""
_MUCH_APART = 0.3


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


UNDEFINED = Interval(float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True)
class Agreement:
    """How one source's answers stand to a reference's."""

    n: int
    """Cells that both answered."""
    prevalence: float
    """Share of presence in the reference."""
    said_fraction: float
    """Share of presence in the answers: at 0 or 1 kappa is 0 whatever the reference says."""
    pabak: float
    """Prevalence-adjusted, bias-adjusted kappa: twice the observed agreement, less 1."""
    kappa: Interval
    sensitivity: Interval
    specificity: Interval
    ppv: Interval
    npv: Interval
    auroc: Interval
    """Of the score where there is one, else of the answers."""

    def flat(self) -> dict[str, float]:
        """One table row: each number with `_low` and `_high`."""
        row: dict[str, float] = {
            "n": self.n,
            "prevalence": self.prevalence,
            "said_fraction": self.said_fraction,
            "pabak": self.pabak,
        }
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                row |= {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
        return row


class Source(NamedTuple):
    """One source's answers and what it ranks by, both (N, K)."""

    answers: Answers
    score: Answers


def agreement(
    answers: Answers, reference: Answers, score: Answers | None = None, weight: Answers | None = None
) -> Agreement:
    """Agreement of (n,) answers with (n,) reference answers; cells without either are left out.

    Proportions have Wilson's interval, kappa that of Fleiss, Cohen and Everitt (1969), AUROC that of Hanley and
    McNeil (1982). With weights, numbers are weighted and intervals use Kish's effective number of cells.

    Args:
        answers: 1, 0 or NaN.
        reference: 1, 0 or NaN.
        score: Any number that grows with the belief in presence, for the AUROC; the answers themselves if None.
        weight: How many cells each one stands for (1 / inclusion probability); 1 if None.
    """
    weights = np.ones(len(reference)) if weight is None else np.asarray(weight, np.float64)
    both = np.isfinite(answers) & np.isfinite(reference)
    said, true, effective = answers[both] > 0.5, reference[both] > 0.5, _effective(weights[both])
    tp, fp = effective[said & true].sum(), effective[said & ~true].sum()
    fn, tn = effective[~said & true].sum(), effective[~said & ~true].sum()
    return Agreement(
        n=int(both.sum()),
        prevalence=proportion(tp + fn, effective.sum()).value,
        said_fraction=proportion(tp + fp, effective.sum()).value,
        pabak=pabak_of(tp, fp, fn, tn),
        kappa=kappa_interval(tp, fp, fn, tn),
        sensitivity=proportion(tp, tp + fn),
        specificity=proportion(tn, tn + fp),
        ppv=proportion(tp, tp + fp),
        npv=proportion(tn, tn + fn),
        auroc=auroc_interval(answers if score is None else score, reference, weights),
    )


def witness_agreement(
    judgements: pd.DataFrame,
    alignment: pd.DataFrame | pa.Table | None,
    labels: pd.DataFrame | None,
    vocabulary: Vocabulary,
    *,
    reference: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """One row per pair of witnesses and concept: n, prevalence, kappa, sensitivity, …, each with `_low`, `_high`.

    Every pair stands once, the more trusted of the two as the reference: experts, then given labels, VLMs, alignment;
    `fused` last. With `reference` (judgements, such as an answer sheet) every witness is held against that alone.
    Cells that a person decided do not count for `fused`: it would be compared with itself. `note` says in words why a
    kappa means little.
    """
    standing = latest(judgements)
    image_ids = _image_ids(standing, alignment, labels)
    sources = sources_of(standing, alignment, labels, image_ids, vocabulary)
    if reference is None:
        pairs = list(combinations(sources, 2))
        references = {name: source.answers for name, source in sources.items()}
    else:
        pairs = [("reference", name) for name in sources]
        references = {"reference": _judged(latest(reference), image_ids, vocabulary).answers}
    rows = []
    for against, name in pairs:
        source, true = sources[name], references[against]
        for k, concept_id in enumerate(vocabulary.ids):
            found = agreement(source.answers[:, k], true[:, k], source.score[:, k])
            row = {"witness": name, "reference": against, "concept_id": concept_id}
            rows.append(row | found.flat() | {"note": note_of(found)})
    numbers = agreement(*[np.zeros(0)] * 2).flat()
    return pd.DataFrame(rows, columns=["witness", "reference", "concept_id", *numbers, "note"])


def note_of(found: Agreement) -> str:
    """Why a kappa means little, in words; empty where it means what it says."""
    if not found.n:
        return "no cell that both answered"
    sides = (("the witness", found.said_fraction), ("the reference", found.prevalence))
    constant = [f"{who} says {'present' if x else 'absent'} of every cell" for who, x in sides if x in (0, 1)]
    if constant:
        return f"{' and '.join(constant)}: kappa tells nothing, read pabak"
    if found.pabak - found.kappa.value > _MUCH_APART:
        return "one answer is rare: kappa is low although most cells agree, read pabak beside it"
    return ""


def sources_of(
    standing: pd.DataFrame,
    alignment: pd.DataFrame | pa.Table | None,
    labels: pd.DataFrame | None,
    image_ids: ImageIds,
    vocabulary: Vocabulary,
) -> dict[str, Source]:
    """`witness:model` → its answers and scores, experts first; then `alignment` and `fused` where given."""
    rank = {str(Witness.EXPERT): 0, str(Witness.GIVEN): 1}
    pairs = sorted(standing.groupby(["witness", "witness_model"], sort=False), key=lambda pair: rank.get(pair[0][0], 2))
    found = {f"{witness}:{model}": _judged(rows, image_ids, vocabulary) for (witness, model), rows in pairs}
    if alignment is not None:
        found[str(Witness.ALIGNMENT)] = _aligned(alignment_scores(alignment), image_ids, vocabulary)
    if labels is not None:
        machine = labels[~labels["decided_by"].isin([Witness.EXPERT, Witness.GIVEN])]
        answers = matrix(machine, "present", image_ids, vocabulary)
        found[FUSED] = Source(answers, matrix(machine, "probability", image_ids, vocabulary))
    return found


def proportion(hits: float, total: float) -> Interval:
    """Hits / total with Wilson's interval; counts may be fractional (effective cells)."""
    if total <= 0:
        return UNDEFINED
    share, z2 = hits / total, Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    reach = Z_95 / (1 + z2 / total) * np.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return Interval(float(share), float(max(centre - reach, 0)), float(min(centre + reach, 1)))


def pabak_of(tp: float, fp: float, fn: float, tn: float) -> float:
    """Kappa as it would be were presence and absence equally frequent for both (Byrt, Bishop and Carlin, 1993)."""
    total = tp + fp + fn + tn
    return float(2 * (tp + tn) / total - 1) if total > 0 else float("nan")


def kappa_interval(tp: float, fp: float, fn: float, tn: float) -> Interval:
    """Cohen's kappa of a 2 × 2 table with its large-sample interval; undefined when both use one answer only."""
    n = tp + fp + fn + tn
    if n <= 0:
        return UNDEFINED
    p = np.array([[tp, fp], [fn, tn]], np.float64) / n
    rows, columns = p.sum(1), p.sum(0)
    observed, expected = float(np.trace(p)), float(rows @ columns)
    if expected >= 1:
        return UNDEFINED
    kappa = (observed - expected) / (1 - expected)
    # Fleiss, Cohen and Everitt (1969): the standard error of an observed kappa.
    agreeing = (np.diag(p) * (1 - (rows + columns) * (1 - kappa)) ** 2).sum()
    crossed = (1 - kappa) ** 2 * (p[0, 1] * (columns[0] + rows[1]) ** 2 + p[1, 0] * (columns[1] + rows[0]) ** 2)
    variance = (agreeing + crossed - (kappa - expected * (1 - kappa)) ** 2) / (n * (1 - expected) ** 2)
    reach = Z_95 * np.sqrt(max(variance, 0.0))
    return Interval(kappa, float(max(kappa - reach, -1)), float(min(kappa + reach, 1)))


def auroc_interval(score: Answers, reference: Answers, weight: Answers | None = None) -> Interval:
    """Area under the ROC curve with Hanley and McNeil's interval; undefined when the reference has one answer only."""
    both = np.isfinite(score) & np.isfinite(reference)
    weights = np.ones(both.sum()) if weight is None else weight[both]
    true = reference[both] > 0.5
    if true.all() or not true.any():
        return UNDEFINED
    area = float(roc_auc_score(true, score[both], sample_weight=weights))
    n_present, n_absent = _effective(weights[true]).sum(), _effective(weights[~true]).sum()
    reach = Z_95 * np.sqrt(max(hanley_mcneil_variance(area, n_present, n_absent), 0.0))
    return Interval(area, float(max(area - reach, 0)), float(min(area + reach, 1)))


def hanley_mcneil_variance(area: float, n_present: float, n_absent: float) -> float:
    """Sampling variance of an area under the ROC curve (Hanley and McNeil, 1982)."""
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (n_present - 1) * (q1 - area**2) + (n_absent - 1) * (q2 - area**2)
    return float(spread / (n_present * n_absent))


def _effective(weights: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Weights scaled so that they sum to the effective number of cells (Kish): n for equal ones."""
    total = weights.sum()
    return np.asarray(weights * total / (weights**2).sum() if total > 0 else weights, np.float64)


def _judged(rows: pd.DataFrame, image_ids: ImageIds, vocabulary: Vocabulary) -> Source:
    """Decided answers of one witness; an uncertain one is no answer, but its probability still ranks."""
    votes = votes_of(rows, image_ids, vocabulary)
    answers = np.where(votes.weight == 1, votes.value > 0.5, np.nan)
    assessed = matrix(rows.assign(assessed=rows["state"] != State.NOT_ASSESSED), "assessed", image_ids, vocabulary)
    return Source(answers, np.where(assessed == 1, votes.value, np.nan))


def _aligned(scores: pd.DataFrame, image_ids: ImageIds, vocabulary: Vocabulary) -> Source:
    """Alignment answers by its fitted probability; a bare similarity has no threshold of its own and only ranks."""
    probability = matrix(scores, "probability", image_ids, vocabulary)
    score = np.where(np.isfinite(probability).any(0), probability, matrix(scores, "similarity", image_ids, vocabulary))
    return Source(np.where(np.isfinite(probability), probability > 0.5, np.nan), score)


def _image_ids(*tables: pd.DataFrame | pa.Table | None) -> npt.NDArray[np.object_]:
    """Every image id of the tables, in order of appearance."""
    columns = [pd.Series(t["image_id"].to_numpy()) for t in tables if t is not None]
    return np.asarray(pd.unique(pd.concat(columns, ignore_index=True)), object)
