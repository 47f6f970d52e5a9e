"""Systems side by side: one data set, one preparation, the same splits and seeds, one trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from data_contracts.dataset import AlignedDataset
from data_contracts.ports import Advance, PixelReader, ignore_progress
from data_contracts.tables import Split
from model.config import TrainConfig
from model.evaluate import evaluate
from model.fit import fit, prepare_for
from model.systems.registry import SYSTEMS, system

METRICS = (
    "accuracy",
    "macro_f1",
    "auroc",
    "ece",
    "concept_auroc",
    "concept_f1",
    "rule_accuracy",
    "rule_macro_f1",
    "rule_agreement",
)
"""Columns of the comparison, each as mean and sd over seeds; empty for a system that has no such part."""


def compare(
    dataset: AlignedDataset,
    read: PixelReader,
    config: TrainConfig,
    *,
    cache_dir: Path,
    systems: Sequence[str] = tuple(SYSTEMS),
    split: Split | str = Split.TEST,
    advance: Advance = ignore_progress,
) -> pd.DataFrame:
    """One row a system: `system`, `n_seeds`, then `<metric>` (mean) and `<metric>_sd` over the configured seeds.

    Paired: the i-th seed of every system draws the same shuffles of the same images. Systems that need concepts
    raise `InputRefused` on an empty vocabulary, unknown names `ConfigurationError`, both before training.
    """
    chosen = [system(name) for name in systems]
    configs = [one.config(config) for one in chosen]
    prepared, backbone = prepare_for(configs, dataset, read, cache_dir=cache_dir, advance=advance)
    rows = []
    for one, its_config in zip(chosen, configs, strict=True):
        measured = evaluate(fit(prepared, backbone, its_config), split).summary.set_index("metric")
        row: dict[str, object] = {"system": one.name, "n_seeds": len(config.seeds)}
        for metric in METRICS:
            known = metric in measured.index
            row[metric] = measured.at[metric, "mean"] if known else float("nan")
            row[f"{metric}_sd"] = measured.at[metric, "sd"] if known else float("nan")
        rows.append(row)
    return pd.DataFrame(rows)
