"""The step that lets a new model take over: not worse on the same test images, by a stated margin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data_contracts.dataset import AlignedDataset
from data_contracts.files import sha256_of_file
from data_contracts.store import RunFolder
from data_contracts.tables import Split
from flows import promotion
from flows.candidate import unfinished
from flows.chain import Context, ShardRunner, Step, StepResult
from flows.devices import resolve_device
from flows.steps.prepared import prepared_for

if TYPE_CHECKING:
    from model.intervals import Interval

_LEAST_IMAGES = 10
"""Of fewer test images nothing can be said."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Verdict:
    """Whether a new model may take over, and why."""

    promoted: bool
    sentence: str
    n_images: int = 0


def not_worse(old_f1: float, difference: Interval, max_loss: float, n_images: int) -> Verdict:
    """The verdict on the difference of macro-F1, new minus old: it takes over if the interval lies above −max_loss.

    That is a test of non-inferiority: a test set too small to show it keeps the old model.
    """
    measured = (
        f"macro-F1 {old_f1 + difference.value:.3f} against {old_f1:.3f} on {n_images} test images that both know, "
        f"difference {difference.value:+.3f} (95 % interval {difference.low:+.3f} to {difference.high:+.3f})"
    )
    if difference.low > -max_loss:
        return Verdict(True, f"not worse than the model before by {max_loss:g}: {measured}", n_images)
    found = "worse" if difference.high < 0 else "not shown to be as good"
    return Verdict(False, f"{found} (margin {max_loss:g}): {measured}; the model before stays in use", n_images)


def paired_difference(y: Ints, old: Ints, new: Ints, groups: Sequence[object] | None = None) -> Interval:
    """Macro-F1 of `new` minus that of `old` for the same images, with its paired bootstrap interval.

    The same resamples of images, of patients where `groups` gives them, are seen by both, so that what is hard for
    both does not widen the interval. Class indices are on one scale.
    """
    from model.intervals import bootstrap

    n_classes = int(max(y.max(), old.max(), new.max())) + 1
    return bootstrap(
        lambda rows: macro_f1(y[rows], new[rows], n_classes) - macro_f1(y[rows], old[rows], n_classes),
        len(y),
        groups=groups,
    )


def macro_f1(y: Ints, predicted: Ints, n_classes: int) -> float:
    """Mean F1 over the classes that occur."""
    from model import metrics

    return metrics.mean_defined(metrics.per_class(metrics.confusion_matrix(y, predicted, n_classes)).f1)


def common_test_rows(run: RunFolder, dataset: AlignedDataset) -> Ints:
    """Rows of the test split that the model in use was also tested with, and so neither has ever learned from."""
    before = promotion.trained_on(run)
    tested = set(before.loc[before["split"] == str(Split.TEST), "image_id"])
    rows = dataset.rows(Split.TEST)
    return rows[[dataset.image_ids[row] in tested for row in rows]] if len(rows) else rows


def compare(context: Context, folder: Path) -> Verdict:
    """What comes of the model in `folder` against the one in use."""
    run = context.run
    dataset = run.read_dataset()
    shared = dataset.take(common_test_rows(run, dataset))
    if len(shared) < _LEAST_IMAGES:
        return Verdict(
            False,
            f"both models know {len(shared)} of the same test images, too few to compare (at least {_LEAST_IMAGES}); "
            "the model before stays in use",
        )
    old, new = (_predicted(context, path, shared) for path in (run.model_dir, folder))
    rows = [n for n, name in enumerate(shared.image_ids) if name in old and name in new]
    names = sorted({*old.values(), *new.values(), *shared.frame["label"]})
    index = {name: number for number, name in enumerate(names)}
    ids, labels = shared.image_ids, shared.frame["label"].tolist()
    y, said_old, said_new = (
        np.array([index[name] for name in said], np.int64)
        for said in ([labels[n] for n in rows], [old[ids[n]] for n in rows], [new[ids[n]] for n in rows])
    )
    groups = shared.frame["group_id"].fillna(shared.frame["image_id"]).iloc[rows].tolist()
    difference = paired_difference(y, said_old, said_new, groups)
    return not_worse(macro_f1(y, said_old, len(names)), difference, context.settings.schedule.max_loss, len(rows))


def _predicted(context: Context, folder: Path, dataset: AlignedDataset) -> dict[str, str]:
    """The class that the model in `folder` gives each image that can be read."""
    from model.checkpoint import load
    from model.outputs import collect

    classifier = load(folder, device=resolve_device(context.settings.train.device))
    frozen = classifier.config.freeze_backbone
    prepared = prepared_for(context, classifier, dataset, "comparing models")
    network = classifier.network if frozen else classifier.image_network
    readable = prepared.dataset
    outputs = collect(network, prepared.inputs, np.arange(len(readable), dtype=np.int64), classifier.device)
    said = [classifier.class_names[number] for number in outputs.predicted]
    return dict(zip(readable.image_ids, said, strict=True))


def _inputs(context: Context) -> Mapping[str, Any]:
    waiting = unfinished(context.run)
    return {"candidate": None if waiting is None else sha256_of_file(waiting / "config.json")}


def _work(context: Context, _shards: ShardRunner) -> StepResult:
    run, folder = context.run, unfinished(context.run)
    if folder is None:
        return StepResult()
    in_use = promotion.current(run)
    verdict = compare(context, folder) if in_use is not None else Verdict(True, "the first model of this run")
    number = promotion.settle(context, folder, verdict=verdict.sentence, promoted=verdict.promoted)
    said = f"model {number} is in use: {verdict.sentence}"
    if not verdict.promoted:
        said = f"model {number} is kept, not used: {verdict.sentence}; `medmicn rollback --to {number}` uses it."
    context.console.say(f"  {said}")
    counts: dict[str, float] = {"model": number, "promoted": float(verdict.promoted), "test_images": verdict.n_images}
    return StepResult([], counts, [] if verdict.promoted else [said])


PROMOTE = Step("promote", "Comparing with the model in use", _inputs, _work)
