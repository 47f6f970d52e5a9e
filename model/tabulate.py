"""From the answers of all systems and seeds to the tables of a comparison: means, intervals, paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_contracts.dataset import AlignedDataset
from data_contracts.errors import InputRefused
from model import paired
from model.evaluate import measure
from model.intervals import holm
from model.protocols import OPTIMISM, Protocol, Trial, optimism
from model.resampling import clusters_of, metrics_of, resamples, values_of

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

METRICS = (
    "macro_f1",
    "accuracy",
    "auroc",
    "ece",
    "brier",
    "concept_auroc",
    "concept_macro_f1",
    "concept_f1",
    "concept_accuracy",
    "rule_accuracy",
    "rule_macro_f1",
    "rule_agreement",
)
"""Columns with mean, sd and interval; empty for a system that has no such part."""

FACTS = ("side_share", "concepts_only_macro_f1", "concepts_per_class", "head_parameters", "epoch", "val_macro_f1")
"""Columns with a mean over seeds."""

TESTED = ("macro_f1", "accuracy", "auroc")
"""Metrics whose difference to the reference is tested."""

N_RESAMPLES = 2000
N_RANKED_RESAMPLES = 400
"""Fewer for metrics that sort images anew for every concept."""

INTERVALS_IN_WORDS = (
    f"Mean ± standard deviation over seeds; in brackets the 95 % percentile interval of {N_RESAMPLES:,} bootstrap "
    f"resamples ({N_RANKED_RESAMPLES} for AUROC) of the test images, whole patients where they are known and within "
    "classes, and of the seeds. Resamples are the same for all systems, so differences are paired. p: two-sided, from "
    "the resampled differences, corrected for the number of systems by Holm's method."
)


@dataclass(frozen=True)
class Comparison:
    """What was measured, as tables."""

    table: pd.DataFrame
    """One row a system and protocol: system, protocol, n_seeds, `<metric>`, `<metric>_sd`, `_low`, `_high`, the
    optimism of the paper's protocol, and `FACTS`."""
    pairs: pd.DataFrame
    """system, reference, protocol, metric, difference, low, high, p, p_holm; mcnemar_p for accuracy: the
    median over seeds of McNemar's exact test."""
    n_images: int
    n_clusters: int
    """Patients, or images where none are known."""


class _Resampled(NamedTuple):
    """One metric of one system: each seed's value, and each seed's value in each resample."""

    values: Floats  # (S,)
    resampled: Floats  # (S, R)


def tabulate(
    datasets: Mapping[str, AlignedDataset],
    trials: Mapping[tuple[str, Protocol], list[Trial]],
    seeds: Sequence[int],
    reference: str,
) -> Comparison:
    """The tables, from each system's and protocol's trials (one a seed) on the measured images.

    `datasets` are those images with each system's own concepts; images, classes and their order are the same.
    """
    dataset = datasets[reference]
    if len(dataset) == 0:
        raise InputRefused("comparison: expected images in the split that is measured, got none.")
    clusters, y = clusters_of(dataset), dataset.class_index()
    measured = {row: _resample(datasets[row[0]], its, clusters, y) for row, its in trials.items()}
    drawn = paired.drawn_seeds(len(seeds), N_RESAMPLES)
    table = [
        {"system": name, "protocol": protocol, "n_seeds": len(seeds)}
        | _columns(measured[name, protocol], drawn)
        | _marks(its, y, clusters, len(dataset.class_names), protocol)
        | {fact: _mean([trial.facts.get(fact, float("nan")) for trial in its]) for fact in FACTS}
        for (name, protocol), its in trials.items()
    ]
    pairs = _pairs(measured, trials, y, drawn, reference)
    return Comparison(pd.DataFrame(table), pairs, len(dataset), int(clusters.max()) + 1)


def _resample(dataset: AlignedDataset, trials: list[Trial], clusters: Ints, y: Ints) -> dict[str, _Resampled]:
    plain = [measure(dataset, trial.outputs, 0, "").metrics for trial in trials]
    metrics = [metrics_of(dataset, trial.outputs) for trial in trials]
    parts: dict[str, list[Floats]] = {name: [] for name in metrics[0]}
    n_done = 0
    for weights in resamples(clusters, y, N_RESAMPLES):
        for name, blocks in parts.items():
            wanted = N_RANKED_RESAMPLES if metrics[0][name].is_ranked else N_RESAMPLES
            if (drawn := weights[: max(0, wanted - n_done)]).size:
                blocks.append(np.stack([values_of(its[name], drawn) for its in metrics]))
        n_done += len(weights)
    return {
        name: _Resampled(np.array([its[name] for its in plain]), np.concatenate(blocks, axis=1))
        for name, blocks in parts.items()
    }


def _columns(measured: dict[str, _Resampled], drawn: Ints) -> dict[str, float]:
    row: dict[str, float] = {}
    for metric in METRICS:
        found = measured.get(metric)
        if found is None:
            row |= {metric: float("nan")} | {f"{metric}_{part}": float("nan") for part in ("sd", "low", "high")}
            continue
        value = _mean(found.values.tolist())
        shown = paired.interval(value, _over_seeds(found.resampled, drawn))
        sd = float(np.std(found.values, ddof=1)) if len(found.values) > 1 else float("nan")
        row |= {metric: value, f"{metric}_sd": sd, f"{metric}_low": shown.low, f"{metric}_high": shown.high}
    return row


def _marks(
    trials: list[Trial],
    y: Ints,
    clusters: Ints,
    n_classes: int,
    protocol: Protocol,
) -> dict[str, float]:
    if protocol == "clean":
        return dict.fromkeys(OPTIMISM, float("nan"))
    found = [optimism(trial.candidates, y, clusters, n_classes) for trial in trials]
    return {name: _mean([one[name] for one in found]) for name in OPTIMISM}


def _pairs(
    measured: dict[tuple[str, Protocol], dict[str, _Resampled]],
    trials: Mapping[tuple[str, Protocol], list[Trial]],
    y: Ints,
    drawn: Ints,
    reference: str,
) -> pd.DataFrame:
    rows = []
    for (name, protocol), its in measured.items():
        if name == reference:
            continue
        base = measured[reference, protocol]
        for metric in TESTED:
            values = its[metric].values - base[metric].values
            resampled = _over_seeds(its[metric].resampled - base[metric].resampled, drawn)
            found = paired.difference(_mean(values.tolist()), resampled)
            rows.append(
                {"system": name, "reference": reference, "protocol": protocol, "metric": metric}
                | {"difference": found.value, "low": found.low, "high": found.high, "p": found.p}
                | {"mcnemar_p": _mcnemar(trials[name, protocol], trials[reference, protocol], y, metric)}
            )
    return _corrected(pd.DataFrame(rows))


def _corrected(pairs: pd.DataFrame) -> pd.DataFrame:
    """With `p_holm`, for each protocol and metric corrected over the systems."""
    if pairs.empty:
        return pd.DataFrame(
            columns=[
                "system",
                "reference",
                "protocol",
                "metric",
                "difference",
                "low",
                "high",
                "p",
                "p_holm",
                "mcnemar_p",
            ]
        )
    corrected = pd.Series(np.nan, pairs.index)
    for _, asked in pairs.groupby(["protocol", "metric"]):
        corrected.loc[asked.index] = holm(asked["p"].tolist())
    pairs.insert(pairs.columns.get_loc("p") + 1, "p_holm", corrected)
    return pairs


def _mcnemar(trials: list[Trial], reference: list[Trial], y: Ints, metric: str) -> float:
    if metric != "accuracy":
        return float("nan")
    return float(
        np.median(
            [
                paired.mcnemar(one.outputs.predicted == y, other.outputs.predicted == y)
                for one, other in zip(trials, reference, strict=True)
            ]
        )
    )


def _over_seeds(resampled: Floats, drawn: Ints) -> Floats:
    return paired.over_seeds(resampled, drawn[: resampled.shape[1]])


def _mean(values: Sequence[float]) -> float:
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if len(known) else float("nan")
