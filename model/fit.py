"""Training of all seeds: data set in, trained networks out. The epoch is chosen on validation images only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.dataset import AlignedDataset
from data_contracts.errors import InputRefused
from data_contracts.ports import Advance, PixelReader, ignore_progress
from data_contracts.tables import Split
from model.backbones import Backbone, build_backbone
from model.config import TrainConfig
from model.data import Prepared, prepare
from model.devices import reproducible, resolve_device
from model.loop import Fitted, Loop, OnEpoch
from model.network import Sizes
from model.systems.registry import build_network

logger = logging.getLogger(__name__)


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
    advance: Advance = ignore_progress,
    on_epoch: OnEpoch | None = None,
) -> TrainedRun:
    """One network per seed, each at the epoch that did best on the validation images; test images are not used.

    `advance` counts images as their features are made, `on_epoch` hears of every epoch. Unreadable images are
    left out with a warning. Raises `InputRefused` when fewer than two classes can be trained, and
    `ConfigurationError` when the backbone, the device or an empty vocabulary cannot be used.
    """
    prepared, backbone = prepare_for([config], dataset, read, cache_dir=cache_dir, advance=advance)
    return fit(prepared, backbone, config, on_epoch=on_epoch)


def prepare_for(
    configs: Sequence[TrainConfig],
    dataset: AlignedDataset,
    read: PixelReader,
    *,
    cache_dir: Path,
    advance: Advance = ignore_progress,
) -> tuple[Prepared, Backbone]:
    """Inputs and backbone that serve all these configurations, which differ in what follows the backbone only.

    What cannot be built is refused here, before any image is read.
    """
    config = configs[0]
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
        n_threads=config.decode_threads,
        advance=advance,
    )
    return prepared, backbone


def fit(prepared: Prepared, backbone: Backbone, config: TrainConfig, *, on_epoch: OnEpoch | None = None) -> TrainedRun:
    """`train`, for a data set whose inputs are prepared: several systems can share one preparation."""
    warnings = check_splits(prepared)
    for warning in warnings:
        logger.warning("%s", warning)
    seeds = tuple(Loop(prepared, backbone, config, seed).run(on_epoch) for seed in config.seeds)
    return TrainedRun(config, prepared, seeds, tuple(warnings))


def check_splits(prepared: Prepared) -> list[str]:
    """Sentences about what the splits lack; raises `InputRefused` when training makes no sense."""
    dataset = prepared.dataset
    y = dataset.class_index()
    counts = {split: np.bincount(y[dataset.rows(split)], minlength=len(dataset.class_names)) for split in Split}
    n_trainable = int((counts[Split.TRAIN] > 0).sum())
    if n_trainable < 2:
        raise InputRefused(
            f"training images: expected at least 2 classes, got {n_trainable} "
            f"({int(counts[Split.TRAIN].sum())} images); nothing was trained."
        )
    warnings = [
        f"class {name!r} has no image in the {split} split; its {split} metrics are null."
        for split, count in counts.items()
        for name, n in zip(dataset.class_names, count, strict=True)
        if n == 0 and count.any()
    ]
    if not counts[Split.VAL].any():
        warnings.append("there are no validation images: the last epoch was kept, unchosen.")
    if prepared.rejected:
        warnings.append(f"{len(prepared.rejected)} images could not be read and were left out.")
    return warnings
