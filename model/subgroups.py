"""Is the classifier as good for everyone? Metrics of each subgroup, with intervals, against the rest of the images.

A subgroup is one value of a column that says something of an image: skin tone, site, sex, device, age. Many are
looked at, so P values are corrected for their number (Holm). A small group is reported and said to be too small: that
nothing was found there does not mean that nothing is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_contracts.dataset import AlignedDataset
from model import metrics as m
from model.intervals import Interval, bootstrap, holm
from model.outputs import Outputs

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Statistic = Callable[[Ints], float]
"""Rows → metric."""

SMALLEST_GROUP = 20
"""Images below which a group is not compared."""
MOST_VALUES = 20
"""Different values above which a column of words is no grouping; numbers are cut into quarters."""
_N_PERMUTATIONS = 2000
_N_RESAMPLES = 500

COLUMNS = (
    *("column", "value", "n", "n_groups", "metric", "estimate", "low", "high"),
    *("rest", "difference", "difference_low", "difference_high", "p", "p_holm", "note"),
)


@dataclass(frozen=True)
class Subgroups:
    """Metrics by subgroup."""

    table: pd.DataFrame
    """`COLUMNS`, one row a column, value and metric."""
    warnings: tuple[str, ...]
    """Columns that are no grouping, as sentences."""


def subgroup_metrics(dataset: AlignedDataset, outputs: Outputs, columns: pd.DataFrame, *, seed: int = 0) -> Subgroups:
    """Accuracy, macro-F1 and concept accuracy of every value of every column, on the images of `dataset`.

    Args:
        dataset: held-out images, in the order of `outputs`.
        outputs: what the classifier says of them.
        columns: one row an image, in the same order; a missing value belongs to no group.
        seed: of resamples and permutations.

    Intervals are bootstrapped over patients where `group_id` names them. P values come from permuting who is in the
    group: whole patients, where each lies on one side.
    """
    statistics = _statistics(dataset, outputs)
    patients = dataset.frame["group_id"].fillna(dataset.frame["image_id"]).tolist()
    rows: list[dict[str, object]] = []
    warnings: list[str] = []
    for column in columns.columns:
        values, problem = _grouping(columns[column])
        if values is None:
            warnings.append(f"subgroups: column {column!r} {problem}; it was left out.")
            continue
        for value in sorted(set(values.dropna())):
            inside, outside = ((test & values.notna()).to_numpy() for test in (values == value, values != value))
            rows += [
                {"column": str(column), "value": str(value), "metric": name}
                | _compared(statistic, inside, outside, patients, seed)
                for name, statistic in statistics.items()
            ]
    for row, corrected in zip(rows, holm([float(str(row["p"])) for row in rows]), strict=True):
        row["p_holm"] = corrected
    return Subgroups(pd.DataFrame(rows, columns=list(COLUMNS)), tuple(warnings))


def _statistics(dataset: AlignedDataset, outputs: Outputs) -> dict[str, Statistic]:
    y, n_classes = dataset.class_index(), len(dataset.class_names)
    right = (outputs.predicted == y).astype(np.float64)

    def macro_f1(rows: Ints) -> float:
        return m.mean_defined(m.per_class(m.confusion_matrix(y[rows], outputs.predicted[rows], n_classes)).f1)

    found: dict[str, Statistic] = {"accuracy": lambda rows: float(right[rows].mean()), "macro_f1": macro_f1}
    if outputs.has_concepts:
        agrees = (dataset.concepts >= 0.5) == (outputs.concept_probabilities >= 0.5)
        hits, usable = (agrees & dataset.mask).sum(1), dataset.mask.sum(1)
        found["concept_accuracy"] = lambda rows: _ratio(int(hits[rows].sum()), int(usable[rows].sum()))
    return found


def _grouping(column: pd.Series) -> tuple[pd.Series | None, str]:
    """The column as groups, or None and why it is no grouping."""
    known = column.dropna()
    n_values = known.nunique()
    if n_values < 2:
        return None, f"has {n_values} different value(s)"
    if pd.api.types.is_numeric_dtype(known) and not pd.api.types.is_bool_dtype(known) and n_values > 10:
        quarters = pd.qcut(known.astype(float), 4, duplicates="drop")
        names = [f"{quarter.left:g} to {quarter.right:g}" for quarter in quarters]
        return pd.Series(names, index=known.index, dtype=object).reindex(column.index), ""
    if n_values > MOST_VALUES:
        return None, f"has {n_values} different values, which is no grouping (at most {MOST_VALUES})"
    return known.map(str).astype(object).reindex(column.index), ""


def _compared(
    statistic: Statistic, inside: Bools, outside: Bools, patients: Sequence[object], seed: int
) -> dict[str, object]:
    rows, rest = (np.flatnonzero(which).astype(np.int64) for which in (inside, outside))
    own = _interval(statistic, rows, patients, seed)
    n_groups = len({patients[int(n)] for n in rows})
    found: dict[str, object] = {
        "n": len(rows),
        "n_groups": n_groups,
        "estimate": own.value,
        "low": own.low,
        "high": own.high,
        "p": float("nan"),
        "note": "",
    }
    sizes = {"group": len(rows), "rest": len(rest)}
    small = [f"{name} too small: {n} images" for name, n in sizes.items() if n < SMALLEST_GROUP]
    if small:
        return found | {"note": f"{small[0]}, at least {SMALLEST_GROUP} are needed to compare"}
    difference = _difference_interval(statistic, rows, rest, patients, seed)
    return found | {
        "rest": statistic(rest),
        "difference": difference.value,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "p": _permutation_p(statistic, rows, rest, patients, seed),
    }


def _interval(statistic: Statistic, rows: Ints, patients: Sequence[object], seed: int) -> Interval:
    groups = [patients[int(n)] for n in rows]
    return bootstrap(
        lambda drawn: statistic(rows[drawn]), len(rows), groups=groups, n_resamples=_N_RESAMPLES, seed=seed
    )


def _difference_interval(
    statistic: Statistic, rows: Ints, rest: Ints, patients: Sequence[object], seed: int
) -> Interval:
    both = np.concatenate([rows, rest])
    is_inside = np.arange(len(both)) < len(rows)

    def difference(drawn: Ints) -> float:
        inside = is_inside[drawn]
        if inside.all() or not inside.any():
            return float("nan")
        return statistic(both[drawn[inside]]) - statistic(both[drawn[~inside]])

    groups = [patients[int(n)] for n in both]
    return bootstrap(difference, len(both), groups=groups, n_resamples=_N_RESAMPLES, seed=seed)


def _permutation_p(statistic: Statistic, rows: Ints, rest: Ints, patients: Sequence[object], seed: int) -> float:
    """Two-sided: how often a difference as large arises when who is in the group is drawn at random."""
    both = np.concatenate([rows, rest])
    observed = abs(statistic(rows) - statistic(rest))
    unit, n_units, unit_inside = _units(both, len(rows), patients)
    rng = np.random.default_rng(seed)
    n_as_large = 0
    for _ in range(_N_PERMUTATIONS):
        inside = unit_inside[rng.permutation(n_units)][unit]
        # A unit can be several images, so that a side may come out without any.
        if inside.all() or not inside.any():
            continue
        n_as_large += abs(statistic(both[inside]) - statistic(both[~inside])) >= observed - 1e-12
    return (n_as_large + 1) / (_N_PERMUTATIONS + 1)


def _units(both: Ints, n_inside: int, patients: Sequence[object]) -> tuple[Ints, int, Bools]:
    """Unit of each row, their number, and which are in the group: patients, or images where a patient is on both."""
    is_inside = np.arange(len(both)) < n_inside
    names = [patients[int(n)] for n in both]
    sides: dict[object, set[bool]] = {}
    for name, side in zip(names, is_inside, strict=True):
        sides.setdefault(name, set()).add(bool(side))
    if any(len(side) > 1 for side in sides.values()):
        return np.arange(len(both)), len(both), is_inside
    number = {name: n for n, name in enumerate(sides)}
    return np.array([number[name] for name in names]), len(sides), np.array([next(iter(s)) for s in sides.values()])


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else float("nan")
