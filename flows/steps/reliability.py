"""How far a classifier can be relied on: calibration, a reject option, subgroups, robustness. All on held-out images.

The temperature and the reject threshold come from validation images; here they are measured on the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from data_contracts.dataset import AlignedDataset
from data_contracts.errors import InputRefused
from data_contracts.spreadsheet import read_csv, write_csv
from data_contracts.tables import IMAGES, Split
from flows.chain import Context, StepResult
from flows.steps.prepared import prepared_for

if TYPE_CHECKING:
    from model.fit import TrainedRun
    from model.outputs import Outputs
    from model.predict import Classifier

INTERVALS_FILE = "intervals.csv"
CALIBRATION_FILE = "calibration.csv"
REJECT_FILE = "reject.csv"
SUBGROUPS_FILE = "subgroups.csv"

_N_RESAMPLES = 1000
_NOT_A_SUBGROUP = {*IMAGES.column_names, "fingerprint"}


class HeldOut(NamedTuple):
    """Images of one split that can be read, and what the network says of them, not calibrated."""

    dataset: AlignedDataset
    outputs: Outputs


def calibrate(folder: Path, run: TrainedRun) -> list[str]:
    """Fit the temperature of the seed that `folder` keeps to validation images and store it there; warnings."""
    from model.evaluate import outputs_of

    dataset = run.prepared.dataset
    rows = dataset.rows(Split.VAL)
    return _fit(folder, dataset.take(rows), outputs_of(run, run.best, rows))


def calibrated(context: Context, classifier: Classifier, val: HeldOut) -> tuple[Classifier, list[str]]:
    """The classifier with its calibration, which is fitted now where training left none; warnings."""
    from model.calibration import load_calibration

    folder = context.run.model_dir
    found = load_calibration(folder)
    warnings: list[str] = []
    if found is None:
        warnings = _fit(folder, *val)
        found = load_calibration(folder)
    return replace(classifier, calibration=found), warnings


def held_out(context: Context, classifier: Classifier, dataset: AlignedDataset) -> dict[str, HeldOut]:
    """Validation images and those of `explain.split`, by split."""
    from model.outputs import collect

    frozen = classifier.config.freeze_backbone
    splits = dict.fromkeys([str(Split.VAL), str(context.settings.explain.split)])
    rows = np.concatenate([dataset.rows(split) for split in splits])
    prepared = prepared_for(context, classifier, dataset.take(rows), "reading held-out images")
    network = classifier.network if frozen else classifier.image_network
    readable = prepared.dataset
    return {
        split: HeldOut(
            readable.take(readable.rows(split)),
            collect(network, prepared.inputs, readable.rows(split), classifier.device),
        )
        for split in splits
    }


def write_reliability(context: Context, classifier: Classifier, splits: Mapping[str, HeldOut]) -> StepResult:
    """`intervals.csv`, `calibration.csv`, `reject.csv`, and `subgroups.csv` where there is a column to group by."""
    split = str(context.settings.explain.split)
    measured = splits[split]
    result = StepResult()
    folder = context.run.explanations_dir
    tables = {INTERVALS_FILE: _intervals_table(measured)}
    if classifier.calibration is not None:
        tables[CALIBRATION_FILE] = _calibration_table(classifier, measured, split)
        tables[REJECT_FILE] = _reject_table(context, classifier, splits)
    for name, table in tables.items():
        write_csv(folder / name, table.round(5))
        result.outputs.append(folder / name)
    columns = subgroup_columns(context, measured.dataset)
    (folder / SUBGROUPS_FILE).unlink(missing_ok=True)
    if columns is not None:
        from model.subgroups import subgroup_metrics

        found = subgroup_metrics(measured.dataset, measured.outputs, columns)
        write_csv(folder / SUBGROUPS_FILE, found.table.round(5))
        result.outputs.append(folder / SUBGROUPS_FILE)
        result.counts["subgroups"] = found.table.groupby(["column", "value"]).ngroups
        result.warnings += [*found.warnings, *_small_groups(found.table)]
    return result


def subgroup_columns(context: Context, dataset: AlignedDataset) -> pd.DataFrame | None:
    """Columns to group by, one row an image of `dataset`: of `explain.subgroups`, and further ones of the images table.

    Raises `InputRefused` for a file that cannot be matched with the images.
    """
    images = context.run.read_images().drop_duplicates("image_id").set_index("image_id")
    extra = images[[c for c in images.columns if c not in _NOT_A_SUBGROUP]].reindex(dataset.frame["image_id"])
    file = context.settings.explain.subgroups
    parts = [extra.reset_index(drop=True)]
    if file is not None:
        parts.append(_matched(file, dataset))
    columns = pd.concat(parts, axis=1)
    return columns if len(columns.columns) else None


def _fit(folder: Path, val: AlignedDataset, outputs: Outputs) -> list[str]:
    from model.calibration import CALIBRATION, fit_calibration, save_calibration

    (folder / CALIBRATION).unlink(missing_ok=True)
    if not len(val):
        return ["there are no validation images: probabilities are not calibrated, and there is no reject option."]
    save_calibration(folder, fit_calibration(outputs.class_probabilities, val.class_index()))
    return []


def _intervals_table(measured: HeldOut) -> pd.DataFrame:
    """metric, estimate, low, high of the kept model: the percentile bootstrap that `medmicn compare` uses.

    Patients are drawn whole where they are known, within each class, so that no class goes missing.
    """
    from model.resampling import clusters_of, metrics_of, resamples, values_of

    dataset, outputs = measured
    columns = ["metric", "estimate", "low", "high", "n"]
    if not len(dataset):
        return pd.DataFrame(columns=columns)
    drawn = list(resamples(clusters_of(dataset), dataset.class_index(), _N_RESAMPLES))
    rows = []
    # A resample repeats images, which makes bins of confidence look worse: that error has no interval here.
    metrics = {name: metric for name, metric in metrics_of(dataset, outputs).items() if name != "ece"}
    for name, metric in metrics.items():
        values = np.concatenate([values_of(metric, weights) for weights in drawn])
        known = values[np.isfinite(values)]
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
        estimate = float(values_of(metric, np.ones((1, len(dataset))))[0])
        rows.append((name, estimate, float(low), float(high), len(dataset)))
    return pd.DataFrame(rows, columns=columns)


def _calibration_table(classifier: Classifier, measured: HeldOut, split: str) -> pd.DataFrame:
    """measure, before, after: with intervals where the measure is a mean over images."""
    from model import metrics as m
    from model.calibration import negative_log_likelihood
    from model.intervals import bootstrap

    y, groups = measured.dataset.class_index(), _patients(measured.dataset)
    before = measured.outputs.class_probabilities
    after = classifier.calibrated(measured.outputs).class_probabilities
    rows = []
    for name, measure in (("nll", negative_log_likelihood), ("brier", m.brier)):
        row: dict[str, object] = {"measure": name}
        for when, p in (("before", before), ("after", after)):
            found = bootstrap(lambda drawn, p=p, measure=measure: measure(y[drawn], p[drawn]), len(y), groups=groups)
            row |= {when: found.value, f"{when}_low": found.low, f"{when}_high": found.high}
        rows.append(row)
    # Without an interval, as above.
    ece = {
        when: m.expected_calibration_error(m.reliability(y, p)) for when, p in (("before", before), ("after", after))
    }
    calibration = classifier.calibration
    assert calibration is not None
    table = pd.DataFrame([{"measure": "ece", **ece}, *rows])
    return table.assign(split=split, n=len(y), temperature=calibration.temperature, fitted_on=calibration.n_images)


def _reject_table(context: Context, classifier: Classifier, splits: Mapping[str, HeldOut]) -> pd.DataFrame:
    """Coverage and risk on both splits; the rows of the threshold in use are marked."""
    from model.reject import at_threshold, choose_reject, coverage_risk

    settings = context.settings.explain
    reject = choose_reject(classifier.calibration, coverage=settings.reject_coverage, max_risk=settings.reject_max_risk)
    parts = []
    for split, held in splits.items():
        probabilities = classifier.calibrated(held.outputs).class_probabilities
        confidence, right = probabilities.max(1), held.outputs.predicted == held.dataset.class_index()
        parts.append(coverage_risk(confidence, right, split).assign(in_use=False))
        if reject is not None:
            parts.append(at_threshold(confidence, right, reject.threshold, split).assign(in_use=True))
    return pd.concat(parts, ignore_index=True)


def _matched(file: Path, dataset: AlignedDataset) -> pd.DataFrame:
    if not file.is_file():
        raise InputRefused(f"explain.subgroups: expected a CSV file, found none at {file}; no subgroup was measured.")
    table = read_csv(file)
    key = next((name for name in ("image_id", "path") if name in table.columns), None)
    if key is None:
        raise InputRefused(
            f"explain.subgroups {file}: expected a column 'path' or 'image_id', got {', '.join(table.columns)}."
        )
    if table[key].duplicated().any():
        twice = table.loc[table[key].duplicated(), key].iloc[0]
        raise InputRefused(f"explain.subgroups {file}: expected one row an image, {key} {twice!r} occurs twice.")
    matched = table.drop(columns=[c for c in ("image_id", "path") if c in table]).set_index(table[key])
    wanted = dataset.frame[key]
    if not matched.index.isin(wanted).any():
        raise InputRefused(
            f"explain.subgroups {file}: expected {key}s of the images, none of its {len(table)} rows is one of the "
            f"{len(wanted)} held-out images (such as {wanted.iloc[0]!r}).",
            remedy="Paths are relative to SOURCE, with '/'.",
        )
    return matched.reindex(wanted).reset_index(drop=True)


def _small_groups(table: pd.DataFrame) -> list[str]:
    small = table[table["note"] != ""].drop_duplicates(["column", "value"])
    return [f"subgroup {row.column} = {row.value}: {row.note}." for row in small.itertuples()]


def _patients(dataset: AlignedDataset) -> list[object]:
    return dataset.frame["group_id"].fillna(dataset.frame["image_id"]).tolist()
