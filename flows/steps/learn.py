"""The steps after the labels: the aligned data set, the trained classifier, its explanations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from data_contracts.dataset import AlignedDataset
from data_contracts.errors import ImageRejected, StepFailed
from data_contracts.files import sha256_of_file, write_bytes, write_text
from data_contracts.pixels import encode
from data_contracts.ports import Pixels
from data_contracts.spreadsheet import write_csv
from data_contracts.tables import CONCEPTS, IMAGES, LABELS, Split
from flows.chain import Context, ShardRunner, Step, StepResult
from flows.devices import resolve_device
from flows.steps.images import image_reader
from pipeline.assemble import assemble

if TYPE_CHECKING:
    from model.fit import TrainedRun
    from model.predict import Classifier

DATASET_FILE = "dataset.parquet"
RULES_FILE = "rules.csv"
IMAGE_RULES_FILE = "image_rules.csv"
MAPS_FILE = "maps.csv"
MAP_SIDE_PX = 448


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


def _train_inputs(context: Context) -> Mapping[str, Any]:
    dataset = context.run.path / DATASET_FILE
    return {
        "dataset": sha256_of_file(dataset) if dataset.is_file() else None,
        # Where and how fast it is computed does not change what is learned.
        "settings": context.settings.train.model_dump(mode="json", exclude={"device", "decode_threads"}),
    }


def _train(context: Context, _shards: ShardRunner) -> StepResult:
    from model.checkpoint import save_run
    from model.evaluate import evaluate, metrics_json
    from model.fit import train

    run, config = context.run, context.settings.train
    dataset = run.read_dataset()
    with context.console.bar("reading features", len(dataset)) as advance:
        trained = train(dataset, image_reader(context), config, cache_dir=run.cache_dir, advance=advance)
    # The test split is touched here, once, after every choice was made on the validation split.
    test, val = evaluate(trained, Split.TEST), evaluate(trained, Split.VAL)
    metrics = metrics_json(trained, test, val)
    save_run(run.model_dir, trained, metrics)
    _draw_curves(run.model_dir / "curves.svg", trained)
    outputs = sorted(path for path in run.model_dir.iterdir() if path.is_file())
    warnings = [*trained.warnings, *test.of(trained.best.seed).warnings]
    return StepResult(outputs, _train_counts(trained, metrics["test"]), warnings)


def _train_counts(trained: TrainedRun, test: Mapping[str, Any]) -> dict[str, float]:
    counts: dict[str, float] = {"seeds": len(trained.seeds), "epochs": len(trained.history)}
    for name in ("accuracy", "macro_f1", "concept_auroc"):
        mean = test["over_seeds"].get(name, {}).get("mean")
        if mean is not None:
            counts[f"test_{name}"] = round(mean, 4)
    return counts


def _draw_curves(path: Path, trained: TrainedRun) -> None:
    from pipeline.report.plots import training_curves

    write_text(path, training_curves(trained.history, {fitted.seed: fitted.epoch for fitted in trained.seeds}))


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
    }


def _explain(context: Context, _shards: ShardRunner) -> StepResult:
    from model.checkpoint import load

    run, settings = context.run, context.settings.explain
    dataset = run.read_dataset()
    classifier = load(
        run.model_dir, vocabulary=dataset.vocabulary, device=resolve_device(context.settings.train.device)
    )
    outputs, counts, warnings = _write_rules(context, classifier, dataset)
    maps, map_warnings = _draw_maps(context, classifier, settings.n_maps_per_class)
    write_csv(run.explanations_dir / MAPS_FILE, maps)
    outputs += [run.explanations_dir / MAPS_FILE, *(run.explanations_dir / name for name in maps["file"])]
    return StepResult(outputs, counts | {"maps": len(maps)}, warnings + map_warnings)


def _write_rules(
    context: Context, classifier: Classifier, dataset: AlignedDataset
) -> tuple[list[Path], dict[str, float], list[str]]:
    """Rules of the classes, read on training images and measured over a whole held-out split; rules of its images."""
    from model.data import prepare
    from model.explain.rules import class_rules, image_rules, read_class_rules
    from model.outputs import collect

    frozen, run = classifier.config.freeze_backbone, context.run
    with context.console.bar("reading rules", len(dataset)) as advance:
        prepared = prepare(
            dataset,
            image_reader(context),
            classifier.backbone,
            frozen=frozen,
            cache_dir=run.cache_dir,
            device=classifier.device,
            advance=advance,
        )
        network = classifier.network if frozen else classifier.image_network
        readable = prepared.dataset
        seen, held_out = (
            collect(network, prepared.inputs, readable.rows(split), classifier.device)
            for split in (Split.TRAIN, context.settings.explain.split)
        )
    if not held_out.has_rules:
        return [], {}, ["this system forms no rules; maps are drawn all the same"]
    names, vocabulary = readable.class_names, readable.vocabulary
    shown = readable.take(readable.rows(context.settings.explain.split))
    tables = {
        RULES_FILE: class_rules(
            read_class_rules(seen, vocabulary, names), held_out, shown.class_index(), vocabulary, names
        ),
        IMAGE_RULES_FILE: image_rules(held_out, shown.image_ids, vocabulary, names),
    }
    for name, table in tables.items():
        write_csv(run.explanations_dir / name, table)
    counts: dict[str, float] = {"class_rules": len(tables[RULES_FILE]), "image_rules": len(tables[IMAGE_RULES_FILE])}
    return [run.explanations_dir / name for name in tables], counts, []


def _draw_maps(context: Context, classifier: Classifier, n_per_class: int) -> tuple[pd.DataFrame, list[str]]:
    """Maps as PNG for a few held-out images of each class, and warnings."""
    rows: list[dict[str, str]] = []
    warnings: list[str] = []
    chosen = _chosen_images(context, n_per_class)
    read = image_reader(context)
    with context.console.bar("drawing maps", len(chosen)) as advance:
        for image_id in chosen:
            try:
                rows += draw_maps(classifier, image_id, read(image_id), context.run.explanations_dir)
            except ImageRejected as error:
                warnings.append(f"image {image_id[:12]} has no map: {error.reason}")
            advance(1)
    return pd.DataFrame(rows, columns=["image_id", "target", "file", "caption"]), warnings


def draw_maps(classifier: Classifier, image_id: str, pixels: Pixels, folder: Path) -> list[dict[str, str]]:
    """Write the class map and the leading concepts' maps to `folder/maps`; one row a map: what it is, and where."""
    from model.explain.saliency import overlay

    prediction = classifier.predict([pixels], maps=True)[0]
    class_name = prediction.class_name
    titles = {"class": f"{class_name} ({prediction.class_probabilities[class_name]:.2f})"} | {
        concept_id: f"{classifier.vocabulary[concept_id].name} ({prediction.concept_probabilities[concept_id]:.2f})"
        for concept_id in prediction.concept_maps
    }
    maps = dict(prediction.concept_maps)
    if prediction.class_map is not None:
        maps["class"] = prediction.class_map
    rows = []
    for target, heat in maps.items():
        name = f"maps/{image_id[:16].replace('#', '_')}-{target}.png"
        write_bytes(folder / name, encode(overlay(pixels, heat), MAP_SIDE_PX))
        rows.append({"image_id": image_id, "target": target, "file": name, "caption": titles[target]})
    return rows


def _chosen_images(context: Context, n_per_class: int) -> list[str]:
    frame = context.run.read_dataset().frame
    held_out = frame[frame["split"] == context.settings.explain.split]
    if held_out.empty:
        raise StepFailed(
            f"Explanations: expected images in the {context.settings.explain.split} split, found none.",
            remedy="Choose the other one: --set explain.split=val.",
        )
    # By id, so that the same images are drawn every time.
    return held_out.sort_values("image_id").groupby("label")["image_id"].head(n_per_class).tolist()


DATASET = Step("dataset", "Assembling the data set", _dataset_inputs, _assemble)
TRAIN = Step("train", "Training", _train_inputs, _train)
EXPLAIN = Step("explain", "Explaining", _explain_inputs, _explain)
