"""The fuse step: one label per image and concept from all witnesses, and tables that say how far to trust it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from data_contracts.files import sha256_of_file
from data_contracts.spreadsheet import write_csv
from data_contracts.tables import CONCEPTS, IMAGES, LABELS, Split
from flows.chain import Context, ShardRunner, Step, StepResult
from flows.steps.honesty import REFUSED_CSV, refused_of
from flows.steps.images import accepted
from pipeline.export import wide_labels

AGREEMENT_CSV = "agreement.csv"
LEAKS_CSV = "leaks.csv"
THRESHOLDS_CSV = "thresholds.csv"


def _inputs(context: Context) -> Mapping[str, Any]:
    run = context.run
    tables = [run.table_path(CONCEPTS), run.table_path(IMAGES), *run.alignment_parts()]
    tables += [path for path in [run.path / REFUSED_CSV] if path.is_file()]
    return {
        "tables": {path.name: sha256_of_file(path) for path in tables},
        "ledger": sorted(path.name for path in run.judgements_dir.glob("part-*.parquet")),
        "settings": context.settings.labels.model_dump(mode="json"),
    }


def _work(context: Context, _shards: ShardRunner) -> StepResult:
    from annotation.trust.fuse import FuseOptions, fuse
    from annotation.trust.refuse import silenced

    run, settings = context.run, context.settings.labels
    images, vocabulary = accepted(run.read_images()), run.vocabulary()
    # Images and concepts that left the run stay in the ledger, but get no label.
    judgements = _of_this_run(run.read_judgements(), images, vocabulary.ids)
    scores = _of_this_run(run.read_alignment_scores(), images, vocabulary.ids)
    heard, heard_scores = silenced(judgements, scores, refused_of(run))
    outputs = [run.table_path(LABELS), run.labels_csv_path]
    thresholds = None
    if settings.threshold != "none":
        thresholds = _thresholds(context, heard_scores, heard, images)
        write_csv(run.path / THRESHOLDS_CSV, thresholds)
        outputs.append(run.path / THRESHOLDS_CSV)
    options = FuseOptions(abstain_low=settings.abstain_low, abstain_high=settings.abstain_high)
    learn_from = _outside_test(images)["image_id"].tolist()
    labels = fuse(heard, heard_scores, vocabulary, options, thresholds=thresholds, learn_from=learn_from)
    run.write_labels(labels, wide_labels(images, labels, vocabulary))
    trust_files, leaks = _write_trust(context, labels, judgements, scores, images)
    abstained = float(labels["present"].isna().mean()) if len(labels) else 0.0
    counts = {"labels": len(labels), "concepts": len(vocabulary), "abstained_fraction": round(abstained, 3)}
    return StepResult(outputs + trust_files, counts, _constant_concepts(labels) + leaks)


def _of_this_run(table: pd.DataFrame, images: pd.DataFrame, concept_ids: tuple[str, ...]) -> pd.DataFrame:
    here = table["image_id"].isin(images["image_id"]) & table["concept_id"].isin(concept_ids)
    return table[here].reset_index(drop=True)


def _thresholds(context: Context, scores: pd.DataFrame, judgements: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    from annotation.trust.thresholds import ThresholdMethod, ThresholdOptions, fit_thresholds

    settings = context.settings.labels
    options = ThresholdOptions(method=ThresholdMethod(settings.threshold), fixed=settings.fixed_threshold)
    seen = scores[scores["image_id"].isin(_outside_test(images)["image_id"])]
    return fit_thresholds(seen, judgements, options)


def _write_trust(
    context: Context, labels: pd.DataFrame, judgements: pd.DataFrame, scores: pd.DataFrame, images: pd.DataFrame
) -> tuple[list[Path], list[str]]:
    """Write how witnesses agree, and how well the class alone predicts each concept; returns files and warnings."""
    from annotation.trust.agreement import witness_agreement
    from annotation.trust.leaks import class_leak

    run = context.run
    agreement = witness_agreement(judgements, scores, labels, run.vocabulary())
    write_csv(run.path / AGREEMENT_CSV, agreement)
    written = [run.path / AGREEMENT_CSV]
    if _outside_test(images)["label"].nunique() < 2:
        return written, []
    leaks = class_leak(labels, images)
    write_csv(run.path / LEAKS_CSV, leaks)
    flagged = leaks[
        leaks["class_constant"].astype(bool) | (leaks["flagged"].astype(bool) & ~leaks["constant"].astype(bool))
    ]
    return [*written, run.path / LEAKS_CSV], [
        f"concept {row.concept_id!r}: the class alone predicts it (AUROC {row.auroc:.2f}); it may be the diagnosis "
        "in other words"
        for row in flagged.itertuples()
    ]


def _outside_test(images: pd.DataFrame) -> pd.DataFrame:
    return images[images["split"].isna() | (images["split"] != Split.TEST)]


def _constant_concepts(labels: pd.DataFrame) -> list[str]:
    decided = labels.dropna(subset=["present"])
    n_values = decided.groupby("concept_id")["present"].nunique()
    return [
        f"concept {name!r} has the same label on every image: it tells nothing" for name in n_values[n_values < 2].index
    ]


FUSE = Step("fuse", "Fusing witnesses into labels", _inputs, _work)
