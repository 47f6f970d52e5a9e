"""What a run holds, as small plain values: for `--json`, the closing lines and the Prefect UI."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from data_contracts.errors import InputRefused
from data_contracts.store import RunFolder
from data_contracts.tables import IMAGES, LABELS, ConceptStatus


def run_overview(run: RunFolder) -> dict[str, Any]:
    """Run folder, counts, rejected images by reason, metrics and files, as far as there are any."""
    overview: dict[str, Any] = {"run": str(run.path), "counts": {}, "rejected": {}, "metrics": metrics_of(run)}
    if run.table_path(IMAGES).is_file():
        images = run.read_images()
        overview["counts"] = image_counts(images)
        overview["rejected"] = {str(k): int(v) for k, v in images["rejected"].value_counts().items()}
    if (run.path / "concepts.parquet").is_file():
        concepts = run.read_concepts()
        overview["counts"]["concepts"] = int((concepts["status"] == ConceptStatus.KEPT).sum())
        overview["counts"]["concepts_dropped"] = int((concepts["status"] == ConceptStatus.DROPPED).sum())
    overview["files"] = {name: str(path) for name, path in _files(run).items() if path.exists()}
    if run.exists:
        overview["warnings"] = [w for warnings in run.read_manifest().warnings.values() for w in warnings]
    return overview


def image_counts(images: pd.DataFrame) -> dict[str, int]:
    """Accepted and rejected images, and accepted ones by split."""
    accepted = images[images["rejected"].isna()]
    by_split = {f"images_{name}": int(n) for name, n in accepted["split"].value_counts().items()}
    return {"images": len(accepted), "images_rejected": len(images) - len(accepted)} | by_split


def metrics_of(run: RunFolder) -> dict[str, Any]:
    """`model/metrics.json`, or nothing where no model was trained."""
    path = run.model_dir / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def label_table(run: RunFolder) -> list[dict[str, Any]]:
    """Per concept: how often it is present, absent, abstained, and how much witnesses disagree."""
    try:
        labels, vocabulary = run.read_labels(), run.vocabulary()
    except InputRefused:
        return []
    if not run.table_path(LABELS).is_file():
        return []
    rows = []
    for concept_id, group in labels.groupby("concept_id", sort=False):
        present = group["present"]
        rows.append(
            {
                "concept": vocabulary[str(concept_id)].name if concept_id in vocabulary else str(concept_id),
                "present": int(present.fillna(False).astype(bool).sum()),
                "absent": int((~present.fillna(True).astype(bool)).sum()),
                "abstained": int(present.isna().sum()),
                "mean_disagreement": round(float(group["disagreement"].mean()), 3),
            }
        )
    return rows


def metric_table(run: RunFolder) -> list[dict[str, Any]]:
    """Scalar metrics on the test split: mean and standard deviation over seeds."""
    spread = metrics_of(run).get("test", {}).get("over_seeds", {})
    return [
        {"metric": name, "mean": round(value["mean"], 4), "sd": None if value["sd"] is None else round(value["sd"], 4)}
        for name, value in spread.items()
        if value["mean"] is not None
    ]


def _files(run: RunFolder) -> dict[str, Any]:
    return {
        "report": run.report_path,
        "labels": run.labels_csv_path,
        "concepts": run.path / "concepts.csv",
        "dataset": run.path / "dataset.parquet",
        "model": run.model_dir,
        "rules": run.explanations_dir / "rules.csv",
        "manifest": run.manifest_path,
    }
