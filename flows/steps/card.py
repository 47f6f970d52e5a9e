"""Model card and data sheet of a run, written from its tables beside the report."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from data_contracts.errors import InputRefused
from data_contracts.files import sha256_of_file, write_text
from data_contracts.spreadsheet import read_csv
from data_contracts.store import RunFolder
from flows.chain import Context
from flows.steps.fuse import AGREEMENT_CSV
from flows.summary import metrics_of
from pipeline.report.card import CardContent, data_sheet, model_card
from pipeline.report.views import pairs_view

MODEL_CARD, DATA_SHEET = "model_card.md", "data_sheet.md"
CONCEPT_USE_FILE = "concept_use.csv"

READ = (
    "images.parquet",
    "concepts.parquet",
    "labels.parquet",
    AGREEMENT_CSV,
    "refused.csv",
    "model/config.json",
    "model/metrics.json",
    *(
        f"explanations/{name}.csv"
        for name in ("intervals", "calibration", "reject", "subgroups", "robustness", "map_evidence", "concept_use")
    ),
)
"""Files that the two texts are made of."""

_HASHED = (
    *("images.parquet", "concepts.parquet", "labels.parquet", "dataset.parquet"),
    *("model/config.json", "model/weights.safetensors", "model/vocabulary.json", "model/calibration.json"),
)


def write_cards(context: Context) -> list[Path]:
    """Write `data_sheet.md`, and `model_card.md` where a model was trained; returns their paths."""
    content = gather_card(context)
    run = context.run
    texts = {DATA_SHEET: data_sheet(content)} | ({MODEL_CARD: model_card(content)} if content.model else {})
    for name, text in texts.items():
        write_text(run.path / name, text)
    return [run.path / name for name in texts]


def gather_card(context: Context) -> CardContent:
    """What the run's tables say; parts that it lacks stay empty."""
    run, manifest = context.run, context.run.read_manifest()
    test = metrics_of(run).get("test", {})
    labels = _optional(run.read_labels)
    agreement = _csv(run.path / AGREEMENT_CSV)
    explained = run.explanations_dir
    return CardContent(
        name=manifest.name,
        made_at=datetime.now(UTC),
        modality=context.settings.source.modality,
        synthetic=manifest.synthetic,
        manifest=manifest.model_dump(mode="json"),
        images=_optional(run.read_images),
        concepts=_optional(run.read_concepts),
        witnesses=_witnesses(run),
        decided_by={} if labels is None else {str(k): int(n) for k, n in labels["decided_by"].value_counts().items()},
        abstained_fraction=None if labels is None or labels.empty else float(labels["present"].isna().mean()),
        agreement=None if agreement is None else pd.DataFrame(pairs_view(agreement)),
        refused=_csv(run.path / "refused.csv"),
        model=_json(run.model_dir / "config.json"),
        metrics={k: v for k, v in test.get("over_seeds", {}).items() if v.get("mean") is not None},
        n_test=test.get("n_images"),
        per_class=pd.DataFrame(test["per_class"]) if test.get("per_class") else None,
        intervals=_csv(explained / "intervals.csv"),
        calibration=_csv(explained / "calibration.csv"),
        reject=_csv(explained / "reject.csv"),
        subgroups=_csv(explained / "subgroups.csv"),
        robustness=_csv(explained / "robustness.csv"),
        maps=_csv(explained / "map_evidence.csv"),
        concept_use=_csv(explained / CONCEPT_USE_FILE),
        hashes={name: sha256_of_file(run.path / name) for name in _HASHED if (run.path / name).is_file()},
    )


def _witnesses(run: RunFolder) -> dict[str, int]:
    """Rows of the ledger by who said them; part by part, since a ledger can be large."""
    counts: dict[str, int] = {}
    for part in run.iterate_judgements(["witness", "witness_model"]):
        for (witness, model), n in part.to_pandas().value_counts(dropna=False).items():
            name = f"{witness}: {model}"
            counts[name] = counts.get(name, 0) + int(n)
    return counts


def _csv(path: Path) -> pd.DataFrame | None:
    return read_csv(path) if path.is_file() else None


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _optional(read: Any) -> pd.DataFrame | None:
    try:
        return read()
    except InputRefused:
        return None
