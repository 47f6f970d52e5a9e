"""Measuring a trained run on one split; call it once for the test split, after everything is chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.dataset import AlignedDataset
from data_contracts.tables import Split
from model import metrics as m
from model.data import Rows
from model.devices import resolve_device
from model.fit import TrainedRun
from model.loop import Fitted
from model.network import ImageNetwork
from model.outputs import Outputs, Side, collect_with_side


@dataclass(frozen=True)
class Evaluation:
    """One network on one split. Undefined metrics are NaN here and null in JSON."""

    seed: int
    split: str
    n_images: int
    metrics: dict[str, float]
    per_class: pd.DataFrame
    """class, support, precision, recall, f1, auroc."""
    confusion: pd.DataFrame
    """Rows are true classes, columns predicted ones."""
    per_concept: pd.DataFrame
    """concept_id, concept, n, prevalence, auroc, f1, accuracy, against targets ≥ 0.5 where the mask allows."""
    calibration: pd.DataFrame
    """Bins of confidence: n, confidence, accuracy."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class RunEvaluation:
    """All seeds on one split."""

    evaluations: tuple[Evaluation, ...]

    @property
    def summary(self) -> pd.DataFrame:
        """metric, mean, sd (over seeds, n − 1; NaN for one seed), n_seeds."""
        table = pd.DataFrame([e.metrics for e in self.evaluations])
        return pd.DataFrame(
            {
                "metric": table.columns,
                "mean": table.mean().to_numpy(),
                "sd": table.std().to_numpy(),
                "n_seeds": len(table),
            }
        )

    def of(self, seed: int) -> Evaluation:
        """The evaluation of one seed."""
        return next(e for e in self.evaluations if e.seed == seed)

    def to_json(self, saved_seed: int) -> dict[str, Any]:
        """All seeds' metrics, and the tables of the seed that is kept, as JSON-ready data; NaN is None."""
        kept = self.of(saved_seed)
        table = {name: [e.metrics[name] for e in self.evaluations] for name in kept.metrics}
        summary = self.summary.set_index("metric")
        return {
            "n_images": kept.n_images,
            "over_seeds": {
                name: {
                    "mean": _null(summary.at[name, "mean"]),
                    "sd": _null(summary.at[name, "sd"]),
                    "values": [_null(value) for value in values],
                }
                for name, values in table.items()
            },
            "saved_seed": saved_seed,
            "per_class": _records(kept.per_class),
            "confusion": kept.confusion.to_numpy().tolist(),
            "calibration": _records(kept.calibration),
            "concepts": _records(kept.per_concept),
            "warnings": list(kept.warnings),
        }


def metrics_json(run: TrainedRun, *evaluations: RunEvaluation) -> dict[str, Any]:
    """What `metrics.json` holds: one entry a split, class names, and the epoch that each seed kept."""
    return {
        **{measured.evaluations[0].split: measured.to_json(run.best.seed) for measured in evaluations},
        "class_names": list(run.class_names),
        "chosen_epochs": {str(fitted.seed): fitted.epoch for fitted in run.seeds},
        "warnings": list(run.warnings),
    }


def evaluate(run: TrainedRun, split: Split | str = Split.TEST) -> RunEvaluation:
    """Metrics of every seed on one split of the data the run was trained on."""
    dataset = run.prepared.dataset
    rows = dataset.rows(split)
    shown = dataset.take(rows)
    found = []
    for fitted in run.seeds:
        outputs, side = outputs_with_side(run, fitted, rows)
        measured = measure(shown, outputs, fitted.seed, str(split))
        found.append(replace(measured, metrics=measured.metrics | side_metrics(shown.class_index(), side)))
    return RunEvaluation(tuple(found))


def outputs_of(run: TrainedRun, fitted: Fitted, rows: Rows) -> Outputs:
    """What one network of the run says about these rows of its data set."""
    return outputs_with_side(run, fitted, rows)[0]


def outputs_with_side(run: TrainedRun, fitted: Fitted, rows: Rows) -> tuple[Outputs, Side | None]:
    """`outputs_of`, and what passes the concepts by, for systems that can tell."""
    model = fitted.network if run.config.freeze_backbone else ImageNetwork(fitted.backbone.module, fitted.network)
    return collect_with_side(model, run.prepared.inputs, rows, resolve_device(run.config.device))


def side_metrics(y: npt.NDArray[np.int64], side: Side | None) -> dict[str, float]:
    """How much of the decision passes the concepts by, and how well the concepts' part decides without the rest."""
    if side is None or not len(y):
        return {}
    confusion = m.confusion_matrix(y, side.concepts_predict, side.logits.shape[1])
    return {
        "side_share": side.share,
        "concepts_only_accuracy": m.accuracy(confusion),
        "concepts_only_macro_f1": m.mean_defined(m.per_class(confusion).f1),
    }


def measure(dataset: AlignedDataset, outputs: Outputs, seed: int, split: str) -> Evaluation:
    """All metrics of these outputs for the images of `dataset`, in the same order."""
    y = dataset.class_index()
    confusion = m.confusion_matrix(y, outputs.predicted, len(dataset.class_names))
    classes = _per_class(dataset, y, outputs, confusion)
    concepts = _per_concept(dataset, outputs)
    bins = m.reliability(y, outputs.class_probabilities)
    metrics = {
        "accuracy": m.accuracy(confusion),
        "macro_precision": m.mean_defined(classes["precision"].to_numpy()),
        "macro_recall": m.mean_defined(classes["recall"].to_numpy()),
        "macro_f1": m.mean_defined(classes["f1"].to_numpy()),
        "auroc": m.mean_defined(classes["auroc"].to_numpy()),
        "ece": m.expected_calibration_error(bins),
        "brier": m.brier(y, outputs.class_probabilities),
        **(_concept_metrics(dataset, outputs, concepts) if outputs.has_concepts else {}),
        **_rule_metrics(y, outputs),
    }
    names = list(dataset.class_names)
    return Evaluation(
        seed,
        split,
        len(dataset),
        metrics,
        classes,
        pd.DataFrame(confusion, index=pd.Index(names, name="true"), columns=names),
        concepts,
        pd.DataFrame({"n": bins.n, "confidence": bins.confidence, "accuracy": bins.accuracy}),
        tuple(_absences(split, classes, concepts)),
    )


def _per_class(
    dataset: AlignedDataset, y: npt.NDArray[np.int64], outputs: Outputs, confusion: npt.NDArray[np.int64]
) -> pd.DataFrame:
    scores = m.per_class(confusion)
    return pd.DataFrame(
        {
            "class": dataset.class_names,
            "support": scores.support,
            "precision": scores.precision,
            "recall": scores.recall,
            "f1": scores.f1,
            "auroc": m.class_auroc(y, outputs.class_probabilities),
        }
    )


def _per_concept(dataset: AlignedDataset, outputs: Outputs) -> pd.DataFrame:
    kept = slice(None) if outputs.has_concepts else slice(0)
    c, mask, said = dataset.concepts[:, kept], dataset.mask[:, kept], outputs.concept_probabilities
    present = ((c >= 0.5) & mask).sum(0)
    n = mask.sum(0)
    return pd.DataFrame(
        {
            "concept_id": dataset.vocabulary.ids[kept],
            "concept": dataset.vocabulary.names[kept],
            "n": n,
            "prevalence": np.where(n > 0, present / np.maximum(n, 1), np.nan),
            "auroc": m.concept_auroc(c, mask, said),
            "f1": m.concept_f1(c, mask, said),
            "accuracy": m.concept_accuracy(c, mask, said),
        }
    )


def _concept_metrics(dataset: AlignedDataset, outputs: Outputs, concepts: pd.DataFrame) -> dict[str, float]:
    """Means over concepts; `concept_macro_f1` is the mean over attributes of the macro-F1 over their values."""
    attributes = m.attribute_macro_f1(
        dataset.concepts, dataset.mask, outputs.concept_probabilities, attributes_of(dataset.vocabulary)
    )
    means = {f"concept_{k}": m.mean_defined(concepts[k].to_numpy()) for k in ("auroc", "f1", "accuracy")}
    return means | {"concept_macro_f1": m.mean_defined(attributes)}


def attributes_of(vocabulary: Vocabulary) -> list[list[int]]:
    """Columns of each attribute: those of one exclusive group, or one concept that stands alone."""
    columns: dict[str, list[int]] = {}
    for k, concept in enumerate(vocabulary.concepts):
        columns.setdefault(f"group {concept.group}" if concept.group else f"concept {concept.concept_id}", []).append(k)
    return list(columns.values())


def _rule_metrics(y: npt.NDArray[np.int64], outputs: Outputs) -> dict[str, float]:
    """The rule deciding alone, by its highest truth value, and how often it says what the network says."""
    if not outputs.has_rules:
        return {}
    decided = outputs.rule_truth.argmax(1).astype(np.int64)
    confusion = m.confusion_matrix(y, decided, outputs.rule_truth.shape[1])
    return {
        "rule_accuracy": m.accuracy(confusion),
        "rule_macro_f1": m.mean_defined(m.per_class(confusion).f1),
        "rule_auroc": m.mean_defined(m.class_auroc(y, outputs.rule_truth)),
        "rule_agreement": m.mean_defined(decided == outputs.predicted),
    }


def _absences(split: str, classes: pd.DataFrame, concepts: pd.DataFrame) -> list[str]:
    absent = classes.loc[classes["support"] == 0, "class"]
    undefined = concepts.loc[concepts["auroc"].isna(), "concept_id"]
    found = [f"class {name!r} has no image in the {split} split: its metrics are null." for name in absent]
    if len(undefined):
        shown = ", ".join(undefined[:8])
        found.append(
            f"{len(undefined)} concepts are not both present and absent in the {split} split: "
            f"their AUROC is null ({shown})."
        )
    return found


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): _null(v) for k, v in row.items()} for row in frame.to_dict("records")]


def _null(value: Any) -> Any:
    """JSON has no NaN, and numpy scalars are no JSON."""
    plain = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(plain, float) and not np.isfinite(plain) else plain
