"""Training of all seeds: data set in, trained networks out. The epoch is chosen on validation images only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import nn

from data_contracts.concepts import Vocabulary
from data_contracts.dataset import AlignedDataset
from data_contracts.errors import ConfigurationError, InputRefused
from data_contracts.ports import Advance, PixelReader, ignore_progress
from data_contracts.tables import Split
from model.augment import augmentation_for
from model.backbones import Backbone, build_backbone
from model.config import TrainConfig
from model.devices import reproducible, resolve_device
from model.loop import Fitted, Loop, OnEpoch, OnStep
from model.network import Sizes
from model.parallel import Processes, require_processes
from model.prepare import NOT_FINITE, InputOptions, Prepared, prepare
from model.resume import StateFile, state_file, training_key
from model.systems.finish import finished
from model.systems.registry import build_network

logger = logging.getLogger(__name__)


class Watch(NamedTuple):
    """Who hears of the progress."""

    advance: Advance = ignore_progress
    """Counts images as their features are made."""
    on_epoch: OnEpoch | None = None
    """Hears of every epoch."""
    on_step: OnStep | None = None
    """Hears now and then where in an epoch the training is."""


NOBODY = Watch()


@dataclass(frozen=True)
class TrainedRun:
    """The networks of all seeds, and what they were trained on."""

    config: TrainConfig
    prepared: Prepared
    seeds: tuple[Fitted, ...]
    warnings: tuple[str, ...]
    """Sentences for people: classes without images, images left out."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Meaning and order of the concepts."""
        return self.prepared.dataset.vocabulary

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in order."""
        return self.prepared.dataset.class_names

    @property
    def best(self) -> Fitted:
        """The seed with the best validation result: the one a checkpoint keeps."""
        return max(self.seeds, key=lambda fitted: fitted.validation_rank)

    @property
    def history(self) -> pd.DataFrame:
        """The training curves of all seeds: one row a seed and epoch."""
        return pd.concat([fitted.history for fitted in self.seeds], ignore_index=True)


def train(
    dataset: AlignedDataset,
    read: PixelReader,
    config: TrainConfig,
    *,
    cache_dir: Path,
    modality: str = "",
    state_dir: Path | None = None,
    watch: Watch = NOBODY,
) -> TrainedRun:
    """One network per seed, each at the epoch that did best on the validation images; test images are not used.

    `modality`, in words, chooses the augmentation `auto`. With `state_dir` a killed training goes on from its last
    saved step, and finished seeds are not trained again; `resume.forget` clears it. Unusable images are left out with
    a warning. Raises `InputRefused` when fewer than two classes can be trained, `ConfigurationError` when the backbone,
    the device or an empty vocabulary cannot be used, and `StepFailed` when memory or a loss gives out.
    """
    prepared, backbone = prepare_for(
        [config], dataset, read, cache_dir=cache_dir, modality=modality, advance=watch.advance
    )
    return fit(prepared, backbone, config, state_dir=state_dir, watch=watch)


def prepare_for(
    configs: Sequence[TrainConfig],
    dataset: AlignedDataset,
    read: PixelReader,
    *,
    cache_dir: Path,
    modality: str = "",
    advance: Advance = ignore_progress,
) -> tuple[Prepared, Backbone]:
    """Inputs and backbone that serve all these configurations, which differ in what follows the backbone only.

    What cannot be built is refused here, before any image is read.
    """
    config = configs[0]
    augmentation = augmentation_for(config.augmentation, modality)
    device = resolve_device(config.device)
    with reproducible(config.seeds[0], device):
        backbone = build_backbone(config.backbone, size_px=config.image_size_px, pretrained=config.pretrained)
        for one in configs:
            build_network(Sizes(backbone.n_features, len(dataset.vocabulary), len(dataset.class_names)), one)
    prepared = prepare(
        dataset,
        read,
        backbone,
        frozen=config.freeze_backbone,
        cache_dir=cache_dir,
        device=device,
        options=InputOptions(config.decode_threads, augmentation, config.augmented_views, config.pixel_cache_gb),
        advance=advance,
    )
    return prepared, backbone


def fit(
    prepared: Prepared,
    backbone: Backbone,
    config: TrainConfig,
    *,
    state_dir: Path | None = None,
    watch: Watch = NOBODY,
) -> TrainedRun:
    """`train`, for a data set whose inputs are prepared: several systems can share one preparation."""
    processes = require_processes(config, is_trained=_all_finished(prepared, backbone, config, state_dir))
    warnings = check_splits(prepared) + check_concepts(prepared.dataset) + _about_augmentation(prepared, config)
    _require_batches(prepared, backbone, config)
    if processes.is_first:
        for warning in warnings:
            logger.warning("%s", warning)
    files = _state_files(prepared, backbone, config, state_dir)
    seeds = []
    for seed in config.seeds:
        loop = Loop(prepared, backbone, config, seed, state_file=files.get(seed))
        seeds.append(finished(loop.run(watch.on_epoch, watch.on_step), prepared, config))
    warnings += [_about_divergence(fitted) for fitted in seeds if fitted.diverged]
    return TrainedRun(config, prepared, tuple(seeds), tuple(warnings))


def _state_files(
    prepared: Prepared, backbone: Backbone, config: TrainConfig, state_dir: Path | None
) -> dict[int, StateFile]:
    if state_dir is None:
        return {}
    key = training_key(config, prepared.dataset, backbone, prepared.augmentation, resolve_device(config.device))
    return {seed: state_file(state_dir, key, seed) for seed in config.seeds}


def _all_finished(prepared: Prepared, backbone: Backbone, config: TrainConfig, state_dir: Path | None) -> bool:
    files = _state_files(prepared, backbone, config, state_dir) if config.processes > 1 else {}
    return bool(files) and all(file.is_finished for file in files.values())


def check_splits(prepared: Prepared) -> list[str]:
    """Sentences about what the splits lack; raises `InputRefused` when training makes no sense."""
    dataset = prepared.dataset
    y = dataset.class_index()
    counts = {split: np.bincount(y[dataset.rows(split)], minlength=len(dataset.class_names)) for split in Split}
    n_needed = 2 * Processes.current().n
    n_trainable = int((counts[Split.TRAIN] > 0).sum())
    if n_trainable < 2:
        raise InputRefused(
            f"training images: expected at least 2 classes, got {n_trainable} "
            f"({int(counts[Split.TRAIN].sum())} images); nothing was trained."
        )
    if counts[Split.TRAIN].sum() < n_needed:
        raise InputRefused(
            f"training images: expected at least {n_needed} for {n_needed // 2} processes, got "
            f"{int(counts[Split.TRAIN].sum())}; nothing was trained.",
            remedy="Use --set train.processes=1.",
        )
    warnings = [
        f"class {name!r} has no image in the {split} split; its {split} metrics are null."
        for split, count in counts.items()
        for name, n in zip(dataset.class_names, count, strict=True)
        if n == 0 and count.any()
    ]
    if not counts[Split.VAL].any():
        warnings.append("there are no validation images: the last epoch was kept, unchosen.")
    return warnings + _about_rejected(prepared)


def check_concepts(dataset: AlignedDataset) -> list[str]:
    """Sentences about concepts that the training images cannot teach: never labelled, or always the same."""
    rows = dataset.rows(Split.TRAIN)
    mask, present = dataset.mask[rows], dataset.concepts[rows] >= 0.5
    n_labelled, n_present = mask.sum(0), (present & mask).sum(0)
    unlabelled = n_labelled == 0
    constant = ~unlabelled & ((n_present == 0) | (n_present == n_labelled))
    names = [concept.name for concept in dataset.vocabulary.concepts]
    cases = (
        (unlabelled, "have no usable label in the training images and are not learnt"),
        (constant, "are the same in every labelled training image, which teaches nothing"),
    )
    return [
        f"{int(which.sum())} of {len(names)} concepts {what}: {_some([names[i] for i in np.flatnonzero(which)])}."
        for which, what in cases
        if which.any()
    ]


def _about_rejected(prepared: Prepared) -> list[str]:
    ids = {
        is_nan: [i for i, reason in prepared.rejected.items() if (reason == NOT_FINITE) == is_nan]
        for is_nan in (False, True)
    }
    sentences = []
    if ids[False]:
        sentences.append(f"{len(ids[False])} images could not be read and were left out.")
    if ids[True]:
        shown = _some([f"{image_id[:12]}…" for image_id in ids[True]])
        sentences.append(f"{len(ids[True])} images have features that are no numbers and were left out: {shown}.")
    return sentences


def _about_augmentation(prepared: Prepared, config: TrainConfig) -> list[str]:
    if not config.freeze_backbone or prepared.augmentation.changes_nothing or prepared.n_views:
        return []
    return [
        f"train.augmentation = {config.augmentation!r} has no effect on a frozen backbone, whose features are computed "
        "once; set train.augmented_views, or train.freeze_backbone = false."
    ]


def _about_divergence(fitted: Fitted) -> str:
    last = int(fitted.history["epoch"].max())
    return (
        f"seed {fitted.seed}: the loss was no number in epoch {last}, so training ended there; epoch {fitted.epoch} "
        "was kept. Lower train.learning_rate or train.backbone_learning_rate."
    )


def _require_batches(prepared: Prepared, backbone: Backbone, config: TrainConfig) -> None:
    if config.freeze_backbone or config.batch_size > 1:
        return
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.module.modules()):
        raise ConfigurationError(
            f"train.batch_size: backbone {config.backbone!r} normalises over a batch and cannot be trained on 1 image "
            "at a time; nothing was trained.",
            remedy="Use --set train.batch_size=2 or more, or freeze the backbone.",
        )


def _some(names: Sequence[str], n: int = 5) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
