"""Two protocols by name: how a network is trained, chosen and measured.

clean   the epoch is chosen on validation images, test images are looked at once, no patient is on two sides
paper   as published with Med-MICN: no validation (its images are trained on too), and the epoch with the best accuracy
        on the test images is the one whose test accuracy is reported

A number of the second kind is too good, because it is the best of many looks at the same images. How much too good can
be told from the same networks: choose the epoch on a random half of the test images, measure it on the other half, and
the other way round. The difference between the published and this cross-fitted number is its optimism; it stands beside
every such number, and without it none is written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_contracts.dataset import AlignedDataset
from data_contracts.errors import ContractViolation, InputRefused
from data_contracts.tables import Split
from model.backbones import Backbone
from model.config import TrainConfig
from model.data import Rows
from model.devices import resolve_device
from model.evaluate import outputs_with_side, side_metrics
from model.fit import NOBODY, Watch, check_splits, fit
from model.loop import Fitted, Loop
from model.metrics import confusion_matrix, mean_defined, per_class
from model.network import ImageNetwork
from model.outputs import Outputs, Side, collect_with_side, forwarded
from model.prepare import Prepared
from model.resampling import strata_of
from model.systems.finish import class_path, set_class_layer
from model.systems.fitted_classes import FittedClasses

Protocol = Literal["clean", "paper"]
PROTOCOLS: tuple[Protocol, ...] = ("clean", "paper")

OPTIMISM = ("optimism_accuracy", "optimism_macro_f1")
"""Columns that mark a number of the paper's protocol."""

_N_HALVINGS = 200

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Trial(NamedTuple):
    """One network of one system and seed on the test images."""

    outputs: Outputs
    facts: dict[str, float]
    """Kept epoch, numbers of parameters and of concepts used, share of the side channel."""
    candidates: Ints
    """(E, N) the class that each of the networks says among which the test images chose; (0, N) where they did not."""


def clean_trial(
    prepared: Prepared,
    backbone: Backbone,
    config: TrainConfig,
    *,
    split: Split | str = Split.TEST,
    state_dir: Path | None = None,
    watch: Watch = NOBODY,
) -> Trial:
    """The configuration's one seed, its epoch chosen on validation images; raises `InputRefused` if patients leak."""
    require_separate_patients(prepared.dataset)
    run = fit(prepared, backbone, config, state_dir=state_dir, watch=watch)
    rows = prepared.dataset.rows(split)
    outputs, side = outputs_with_side(run, run.seeds[0], rows)
    y = prepared.dataset.class_index()[rows]
    return Trial(outputs, _facts(run.seeds[0], side, y), np.zeros((0, len(rows)), np.int64))


def paper_trial(prepared: Prepared, backbone: Backbone, config: TrainConfig, *, watch: Watch = NOBODY) -> Trial:
    """The configuration's one seed as published: trained on all but the test images, chosen on those.

    Systems whose class layer is fitted afterwards have one network for each penalty to choose from; all others have one
    for each epoch.
    """
    published = replace(prepared, dataset=as_published(prepared.dataset))
    check_splits(published)
    loop = Loop(published, backbone, config, config.seeds[0])
    noted = _Noted(published)

    def note(seed: int, row: dict[str, float]) -> None:
        noted.note(loop, int(row["epoch"]))
        if watch.on_epoch is not None:
            watch.on_epoch(seed, row)

    fitted = loop.run(note, watch.on_step)
    if isinstance(fitted.network, FittedClasses):
        noted = _along_penalties(fitted, published, config)
    return Trial(noted.best, _facts(fitted, noted.side, noted.y) | {"epoch": noted.epoch}, np.stack(noted.said))


def as_published(dataset: AlignedDataset) -> AlignedDataset:
    """The data set with its validation images among the training images."""
    merged = dataset.frame["split"].replace({str(Split.VAL): str(Split.TRAIN)})
    return replace(dataset, frame=dataset.frame.assign(split=merged))


def require_separate_patients(dataset: AlignedDataset) -> None:
    """Raise `InputRefused` where a patient has images in two splits: no number would be a clean one."""
    grouped = dataset.frame.dropna(subset=["group_id", "split"])
    n_splits = grouped.groupby("group_id")["split"].nunique()
    if (n_splits > 1).any():
        raise InputRefused(
            f"protocol 'clean': {int((n_splits > 1).sum())} of {len(n_splits)} patients have images in more than one "
            "split, so test images are known in part; nothing was trained.",
            remedy="Split the images by patient (leave `split` out of the CSV), or use --protocol paper, which says "
            "how far its numbers can be trusted.",
        )


def optimism(candidates: Ints, y: Ints, clusters: Ints, n_classes: int, seed: int = 0) -> dict[str, float]:
    """How much choosing on the test images adds to accuracy and macro-F1, by cross-fitted choice on the same networks.

    Halves are made of whole clusters, within classes; the mean over many halvings is taken. A half chooses a little
    worse than all, so the optimism is overstated rather than understated. NaN where there is nothing to halve.
    """
    strata = strata_of(clusters, y)
    if len(candidates) == 0 or len(strata) < 2:
        return dict.fromkeys(OPTIMISM, float("nan"))
    rng = np.random.default_rng(seed)
    right = candidates == y
    published = candidates[right.mean(1).argmax()]
    found = []
    for _ in range(_N_HALVINGS):
        first = _half(strata, rng)[clusters]
        chosen = [int(right[:, half].sum(1).argmax()) for half in (first, ~first)]
        said = np.where(first, candidates[chosen[1]], candidates[chosen[0]])
        found.append(_scores(y, said, n_classes))
    fair = np.mean(found, axis=0)
    return dict(zip(OPTIMISM, (np.array(_scores(y, published, n_classes)) - fair).tolist(), strict=True))


def require_marks(table: pd.DataFrame) -> None:
    """Raise `ContractViolation` where a number of the paper's protocol would be written without its optimism."""
    rows = table[table["protocol"] == "paper"]
    unmarked = rows[rows.reindex(columns=list(OPTIMISM)).isna().any(axis=1)]
    if len(unmarked):
        raise ContractViolation(
            "comparison",
            [
                f"{name}: expected the optimism beside a number chosen on test images, got none"
                for name in unmarked["system"]
            ],
        )


class _Noted:
    """What each epoch's network says of the test images, and the whole output of the best one."""

    def __init__(self, prepared: Prepared) -> None:
        self.rows: Rows = prepared.dataset.rows(Split.TEST)
        self.y = prepared.dataset.class_index()[self.rows]
        self.inputs = prepared.inputs
        self.said: list[Ints] = []
        self.epoch = 0
        self.best: Outputs
        self.side: Side | None = None
        self._accuracy = -1.0
        if len(self.rows) == 0:
            raise InputRefused("protocol 'paper': expected test images to choose the epoch on, got none.")

    def note(self, loop: Loop, epoch: int) -> None:
        device = loop.learner.device
        logits = [
            output.class_logits.float().cpu().numpy()
            for output in forwarded(loop.learner.model, self.inputs, self.rows, device)
        ]
        if not self._is_better(np.concatenate(logits).argmax(1).astype(np.int64)):
            return
        self.epoch = epoch
        self.best, self.side = collect_with_side(loop.learner.model, self.inputs, self.rows, device, keep_device=True)

    def note_outputs(self, outputs: Outputs, epoch: int) -> None:
        if self._is_better(outputs.predicted):
            self.best, self.epoch = outputs, epoch

    def _is_better(self, said: Ints) -> bool:
        self.said.append(said)
        accuracy = float((said == self.y).mean())
        better = accuracy > self._accuracy
        self._accuracy = max(accuracy, self._accuracy)
        return better


def _along_penalties(fitted: Fitted, published: Prepared, config: TrainConfig) -> _Noted:
    """The systems that are fitted afterwards: one network for each penalty, all with the concepts of the last epoch."""
    noted = _Noted(published)
    network, device = fitted.network, resolve_device(config.device)
    assert isinstance(network, FittedClasses)
    for layer in class_path(fitted, published, config).layers:
        set_class_layer(network, layer)
        model = network if config.freeze_backbone else ImageNetwork(fitted.backbone.module, network)
        noted.note_outputs(collect_with_side(model, published.inputs, noted.rows, device)[0], fitted.epoch)
    return noted


def _facts(fitted: Fitted, side: Side | None, y: Ints) -> dict[str, float]:
    network = fitted.network
    facts = {
        "epoch": float(fitted.epoch),
        "head_parameters": float(sum(p.numel() for p in network.parameters())),
        "seconds": float(fitted.history["seconds"].sum()),
        "val_macro_f1": fitted.val_macro_f1,
    }
    if isinstance(network, FittedClasses):
        facts["concepts_per_class"] = float((network.classes.weight != 0).sum(1).float().mean())
    return facts | side_metrics(y, side)


def _half(strata: Ints, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """(number of clusters,) whether each is in the first half: half of each class's clusters, odd ones by chance."""
    chosen = np.zeros(len(strata), bool)
    for stratum in np.unique(strata):
        members = rng.permutation(np.flatnonzero(strata == stratum))
        chosen[members[: (len(members) + int(rng.integers(2))) // 2]] = True
    return chosen


def _scores(y: Ints, said: Ints, n_classes: int) -> tuple[float, float]:
    confusion = confusion_matrix(y, said, n_classes)
    return float((said == y).mean()), mean_defined(per_class(confusion).f1)
