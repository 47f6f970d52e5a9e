"""The steps after the labels: the aligned data set, the trained classifier, its explanations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_contracts.dataset import AlignedDataset
from data_contracts.files import sha256_of_file, write_bytes, write_text
from data_contracts.tables import CONCEPTS, IMAGES, LABELS, Split
from flows.chain import Context, ShardRunner, Step, StepResult
from flows.devices import resolve_device
from flows.steps.evidence import write_evidence, write_seed_rules
from flows.steps.localisation import regions_fingerprint
from flows.steps.maps import write_map_evidence, write_maps, write_region_overlap
from flows.steps.reliability import calibrate, calibrated, held_out, write_reliability
from flows.steps.robustness import write_robustness
from flows.steps.training import state_dir, train_networks
from pipeline.assemble import assemble

if TYPE_CHECKING:
    from model.fit import TrainedRun
    from model.predict import Classifier

DATASET_FILE = "dataset.parquet"


# ---- data set ------------------------------------------------------------------------------------------------


def _dataset_inputs(context: Context) -> Mapping[str, Any]:
    tables = (context.run.table_path(table) for table in (IMAGES, CONCEPTS, LABELS))
    return {path.name: sha256_of_file(path) for path in tables if path.is_file()}


def _assemble(context: Context, _shards: ShardRunner) -> StepResult:
    run = context.run
    dataset = assemble(run.read_images(), run.read_labels(), run.vocabulary())
    run.write_dataset(dataset)
    usable = float(dataset.mask.mean()) if dataset.mask.size else 0.0
    counts = {
        "images": len(dataset),
        "concepts": len(dataset.vocabulary),
        "classes": len(dataset.class_names),
        "usable_targets_fraction": round(usable, 3),
    }
    return StepResult([run.path / DATASET_FILE], counts)


# ---- training ------------------------------------------------------------------------------------------------


_WITHOUT_EFFECT = {"device", "decode_threads", "save_every_s", "logger", "pixel_cache_gb"}


def _train_inputs(context: Context) -> Mapping[str, Any]:
    dataset = context.run.path / DATASET_FILE
    return {
        "dataset": sha256_of_file(dataset) if dataset.is_file() else None,
        # Where and how fast it is computed does not change what is learned.
        "settings": context.settings.train.model_dump(mode="json", exclude=_WITHOUT_EFFECT),
    }


def _train(context: Context, _shards: ShardRunner) -> StepResult:
    from model.checkpoint import save_run
    from model.evaluate import evaluate, metrics_json
    from model.resume import forget

    run = context.run
    trained = train_networks(context)
    # The test split is touched here, once, after every choice was made on the validation split.
    test, val = evaluate(trained, Split.TEST), evaluate(trained, Split.VAL)
    metrics = metrics_json(trained, test, val) | {"augmentation": trained.prepared.augmentation.describe()}
    save_run(run.model_dir, trained, metrics)
    write_seed_rules(run.model_dir, trained)
    uncalibrated = calibrate(run.model_dir, trained)
    _draw_curves(run.model_dir, trained)
    forget(state_dir(context))
    outputs = sorted(path for path in run.model_dir.iterdir() if path.is_file())
    warnings = [*trained.warnings, *test.of(trained.best.seed).warnings, *uncalibrated]
    return StepResult(outputs, _train_counts(trained, metrics["test"]), warnings)


def _train_counts(trained: TrainedRun, test: Mapping[str, Any]) -> dict[str, float]:
    counts: dict[str, float] = {"seeds": len(trained.seeds), "epochs": len(trained.history)}
    for name in ("accuracy", "macro_f1", "concept_auroc"):
        mean = test["over_seeds"].get(name, {}).get("mean")
        if mean is not None:
            counts[f"test_{name}"] = round(mean, 4)
    return counts


def _draw_curves(folder: Path, trained: TrainedRun) -> None:
    from pipeline.report.plots import training_curves, training_curves_png

    chosen = {fitted.seed: fitted.epoch for fitted in trained.seeds}
    write_text(folder / "curves.svg", training_curves(trained.history, chosen))
    write_bytes(folder / "curves.png", training_curves_png(trained.history, chosen))


# ---- explanations --------------------------------------------------------------------------------------------


def _explain_inputs(context: Context) -> Mapping[str, Any]:
    model = context.run.model_dir
    files = (
        sorted(path for path in model.glob("*") if path.suffix in {".safetensors", ".json"}) if model.is_dir() else []
    )
    return {
        "model": {path.name: sha256_of_file(path) for path in files},
        "dataset": _train_inputs(context)["dataset"],
        "settings": context.settings.explain.model_dump(mode="json"),
        "regions": regions_fingerprint(context),
        # By name: a run folder may be moved.
        "subgroups": {path.name: sha256_of_file(path) for path in _subgroup_files(context) if path.is_file()},
    }


def _subgroup_files(context: Context) -> list[Path]:
    """Where columns that images are grouped by come from."""
    given = context.settings.explain.subgroups
    return [context.run.table_path(IMAGES), *([] if given is None else [given])]


def _explain(context: Context, _shards: ShardRunner) -> StepResult:
    from model.checkpoint import load

    run = context.run
    dataset = run.read_dataset()
    classifier = load(
        run.model_dir, vocabulary=dataset.vocabulary, device=resolve_device(context.settings.train.device)
    )
    results = [write_evidence(context, classifier, dataset), *_further_evidence(context, classifier, dataset)]
    return StepResult(
        [path for result in results for path in result.outputs],
        {name: value for result in results for name, value in result.counts.items()},
        [warning for result in results for warning in result.warnings],
    )


def _further_evidence(context: Context, classifier: Classifier, dataset: AlignedDataset) -> list[StepResult]:
    """Maps and what they are worth, calibration, subgroups, robustness: each its files, counts and warnings."""
    splits = held_out(context, classifier, dataset)
    ready, uncalibrated = calibrated(context, classifier, splits[str(Split.VAL)])
    return [
        StepResult(warnings=uncalibrated),
        write_reliability(context, ready, splits),
        write_maps(context, ready),
        write_map_evidence(context, ready),
        write_region_overlap(context, ready),
        write_robustness(context, ready, dataset),
    ]


DATASET = Step("dataset", "Assembling the data set", _dataset_inputs, _assemble)
TRAIN = Step("train", "Training", _train_inputs, _train)
EXPLAIN = Step("explain", "Explaining", _explain_inputs, _explain)
