"""How well experts agree among themselves: Cohen's kappa by pair, Krippendorff's alpha over all, disputed cells."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from annotation.trust.agreement import UNDEFINED, Z_95, Interval
from annotation.votes import latest
from data_contracts.concepts import Vocabulary
from data_contracts.tables import State, Witness

Scale = Literal["linear", "quadratic"]
Values = npt.NDArray[np.float64]

_N_BOOTSTRAP = 1000
_DECIDED = {str(State.PRESENT): 1.0, str(State.ABSENT): 0.0}
ALL_CONCEPTS = "(all)"
"""`subject` of the rows over all concepts."""


def expert_agreement(
    judgements: pd.DataFrame, vocabulary: Vocabulary, ordinal: Mapping[str, Scale] | None = None
) -> pd.DataFrame:
    """One row per subject, pair of experts and statistic: subject, first, second, statistic, n, value, low, high.

    Subjects are all concepts together, each concept, and each exclusive group as one categorical answer. Groups named
    in `ordinal` are compared by weighted kappa; the order of their values is the vocabulary's. Cells that an expert
    could not decide count for neither.
    """
    standing = latest(judgements[judgements["witness"] == Witness.EXPERT])
    names = list(pd.unique(standing["witness_model"]))
    rows = []
    for subject, units, weights in _subjects(standing, vocabulary, ordinal or {}):
        for first, second in combinations(names, 2):
            both = units[[first, second]].dropna().to_numpy(np.float64)
            statistic = f"cohen_kappa_{weights}" if weights else "cohen_kappa"
            interval = cohen_kappa(both[:, 0], both[:, 1], weights=weights)
            rows.append((subject, first, second, statistic, len(both), interval.value, interval.low, interval.high))
        if len(names) > 1:
            level: Literal["nominal", "ordinal"] = "ordinal" if weights else "nominal"
            alpha = krippendorff_alpha(units.to_numpy(np.float64).T, level)
            n_units = int((units.notna().sum(axis=1) > 1).sum())
            rows.append((subject, "", "", "krippendorff_alpha", n_units, alpha.value, alpha.low, alpha.high))
    return pd.DataFrame(rows, columns=["subject", "first", "second", "statistic", "n", "value", "low", "high"])


def disputed_cells(judgements: pd.DataFrame) -> pd.DataFrame:
    """image_id, concept_id and `answers` (`name: state; …`) of every cell that experts decided differently."""
    standing = latest(judgements[judgements["witness"] == Witness.EXPERT])
    decided = standing[standing["state"].isin(list(_DECIDED))]
    kinds = decided.groupby(["image_id", "concept_id"])["state"].transform("nunique")
    opposed = decided[kinds > 1]
    said = opposed.assign(answers=opposed["witness_model"] + ": " + opposed["state"])
    return said.groupby(["image_id", "concept_id"], sort=False, as_index=False)["answers"].agg("; ".join)


def cohen_kappa(first: Values, second: Values, *, weights: Scale | None = None) -> Interval:
    """Cohen's kappa by scikit-learn, weighted for ordinal values, with its large-sample interval.

    The interval is that of Fleiss, Cohen and Everitt (1969). Values are category numbers; undefined where both use
    one and the same only.
    """
    values = np.unique(np.concatenate([first, second]))
    if len(values) < 2:
        return UNDEFINED
    # Every number in between is a category too: on a scale, 0 and 2 are two steps apart though nobody said 1.
    labels = np.arange(int(values.min()), int(values.max()) + 1)
    kappa = float(cohen_kappa_score(first, second, labels=labels, weights=weights))
    p = confusion_matrix(first, second, labels=labels) / len(first)
    distance = np.abs(labels[:, None] - labels[None, :]) / (len(labels) - 1)
    credit = {None: np.eye(len(labels)), "linear": 1 - distance, "quadratic": 1 - distance**2}[weights]
    rows, columns = p.sum(1), p.sum(0)
    observed, expected = float((credit * p).sum()), float(rows @ credit @ columns)
    margins = (credit @ columns)[:, None] + (rows @ credit)[None, :]
    spread = (p * (credit * (1 - expected) - margins * (1 - observed)) ** 2).sum()
    variance = spread - (observed * expected - 2 * expected + observed) ** 2
    reach = Z_95 * np.sqrt(max(float(variance), 0.0) / len(first)) / (1 - expected) ** 2
    return Interval(kappa, float(max(kappa - reach, -1)), float(min(kappa + reach, 1)))


def krippendorff_alpha(ratings: Values, level: Literal["nominal", "ordinal"] = "nominal", seed: int = 0) -> Interval:
    """Krippendorff's alpha of (raters, units) category numbers, NaN where not rated; interval by bootstrap over units.

    After Krippendorff, *Content Analysis* (2004), 11.3: 1 - observed / expected disagreement of the coincidences.
    Undefined where fewer than two units are rated twice, or all ratings are the same.
    """
    categories = np.unique(ratings[np.isfinite(ratings)])
    counts = np.stack([(ratings == c).sum(0) for c in categories], axis=1) if len(categories) else np.zeros((0, 0))
    counts = counts[counts.sum(1) > 1]
    if len(counts) < 2 or len(categories) < 2:
        return UNDEFINED
    alpha = _alpha(counts, level)
    rng = np.random.default_rng(seed)
    drawn = [_alpha(counts[rng.integers(0, len(counts), len(counts))], level) for _ in range(_N_BOOTSTRAP)]
    known = np.asarray(drawn)[np.isfinite(drawn)]
    if not len(known) or not np.isfinite(alpha):
        return UNDEFINED
    low, high = np.quantile(known, (0.025, 0.975))
    return Interval(alpha, float(low), float(high))


def _alpha(counts: npt.NDArray[np.integer], level: str) -> float:
    """Alpha of (units, categories) counts of ratings; each unit has at least two."""
    per_unit = counts.sum(1, keepdims=True)
    pairs = (counts[:, :, None] * (counts[:, None, :] - np.eye(counts.shape[1])) / (per_unit[:, :, None] - 1)).sum(0)
    totals = pairs.sum(1)
    n = totals.sum()
    distance = 1 - np.eye(len(totals))
    if level == "ordinal":
        upto = np.cumsum(totals) - totals / 2
        distance = (upto[:, None] - upto[None, :]) ** 2
    expected = (np.outer(totals, totals) * distance).sum() / (n - 1)
    return float(1 - (pairs * distance).sum() / expected) if expected > 0 else float("nan")


def _subjects(
    standing: pd.DataFrame, vocabulary: Vocabulary, ordinal: Mapping[str, Scale]
) -> Sequence[tuple[str, pd.DataFrame, Scale | None]]:
    """(subject, units × experts, weights)."""
    decided = standing[standing["state"].isin(list(_DECIDED)) & standing["concept_id"].isin(vocabulary.ids)]
    values = decided.assign(value=decided["state"].map(_DECIDED).astype("float64"))
    names = pd.unique(standing["witness_model"])
    cells = values.pivot(index=["image_id", "concept_id"], columns="witness_model", values="value")
    cells = cells.reindex(columns=names)
    by_concept = cells.index.get_level_values("concept_id")
    found: list[tuple[str, pd.DataFrame, Scale | None]] = [(ALL_CONCEPTS, cells, None)]
    found += [(concept_id, cells[by_concept == concept_id], None) for concept_id in vocabulary.ids]
    for group, members in vocabulary.groups.items():
        found.append((f"group: {group}", _chosen(values, members, names), ordinal.get(group)))
    return found


def _chosen(values: pd.DataFrame, members: Sequence[str], names: Collection[str]) -> pd.DataFrame:
    """Images × experts: the number of the one member of a group that an expert called present, else NaN."""
    present = values[values["concept_id"].isin(members) & (values["value"] == 1)]
    number = present.assign(number=present["concept_id"].map({m: float(i) for i, m in enumerate(members)}))
    single = number.drop_duplicates(["image_id", "witness_model"], keep=False)
    return single.pivot(index="image_id", columns="witness_model", values="number").reindex(columns=list(names))
