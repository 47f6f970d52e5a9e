"""The model of a run on new images: a table, and maps as PNG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from data_contracts.errors import ImageRejected, InputRefused
from data_contracts.files import sha256_of_file, write_with
from data_contracts.spreadsheet import write_csv
from flows.chain import Context
from flows.devices import resolve_device
from flows.steps.learn import draw_maps
from model.checkpoint import load
from model.predict import Classifier, Prediction
from pipeline.decode import read_pixels
from pipeline.layouts import is_image_file
from pipeline.paths import table_path, walk

_TOP_CONCEPTS = 3


@dataclass
class Predicted:
    """What came of some files."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """path, class, probability, rule, and every concept's probability, one row an image."""
    rejected: list[tuple[Path, str]] = field(default_factory=list)
    """Files that were left out, with the reason's code."""


def predict_files(context: Context, paths: Sequence[Path], out: Path, *, with_maps: bool) -> Predicted:
    """Predict every image among `paths` (files, or folders of images); writes CSV, Parquet and maps to `out`."""
    classifier = load(context.run.model_dir, device=resolve_device(context.settings.train.device))
    files = list(_files(paths))
    if not files:
        raise InputRefused(f"predict: expected images, found none in {', '.join(map(str, paths))}.")
    result = Predicted()
    with context.console.bar("predicting", len(files)) as advance:
        for path in files:
            try:
                result.rows.append(_row(classifier, path, out if with_maps else None, context))
            except ImageRejected as error:
                result.rejected.append((path, str(error.reason)))
            advance(1)
    if result.rows:
        table = pd.DataFrame([{k: v for k, v in row.items() if k != "top_concepts"} for row in result.rows])
        write_csv(out / "predictions.csv", table)
        write_with(out / "predictions.parquet", lambda file: table.to_parquet(file, index=False))
    return result


def _row(classifier: Classifier, path: Path, out: Path | None, context: Context) -> dict[str, Any]:
    pixels = read_pixels(path, max_pixels=context.settings.source.max_pixels)
    prediction = classifier.predict([pixels])[0]
    if out is not None:
        draw_maps(classifier, sha256_of_file(path), pixels, out)
    return {
        "path": table_path(str(path)),
        "image_id": sha256_of_file(path),
        "class": prediction.class_name,
        "probability": round(prediction.class_probabilities[prediction.class_name], 4),
        "rule": prediction.rule.text if prediction.rule else "",
        "rule_holds": prediction.rule.holds if prediction.rule else None,
        "top_concepts": _top_concepts(classifier, prediction),
    } | {concept_id: round(p, 4) for concept_id, p in prediction.concept_probabilities.items()}


def _top_concepts(classifier: Classifier, prediction: Prediction) -> list[str]:
    ranked = sorted(prediction.concept_probabilities.items(), key=lambda item: -item[1])[:_TOP_CONCEPTS]
    return [f"{classifier.vocabulary[concept_id].name} {p:.2f}" for concept_id, p in ranked]


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from (path / name for name in walk(path).files if is_image_file(path, name))
        else:
            yield path
