"""Comparisons by name: the tables and ablations of the Med-MICN paper (NeurIPS 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_contracts.dataset import AlignedDataset
from data_contracts.errors import ConfigurationError, InputRefused
from data_contracts.ports import Advance, PixelReader, ignore_progress
from model.compare import Design, Row, prepared_rows, require_design
from model.config import TrainConfig
from model.data import Rows
from model.systems.registry import SYSTEMS, System

_PAPER_LAMBDA = 0.1
_PAPER_STEP_SIZES = {"resnet50": 5e-5, "vgg19": 5e-6, "densenet169": 1e-4}
"""The published backbones and their step sizes."""

_AS_PUBLISHED: dict[str, Any] = {
    "pretrained": True,
    "freeze_backbone": False,
    "epochs": 100,
    "batch_size": 32,
    "image_size_px": 224,
    "patience": 100,
    "lambda_neural": _PAPER_LAMBDA,
}


@dataclass(frozen=True)
class Preset:
    """A comparison by name."""

    name: str
    sentence: str
    systems: tuple[System, ...]
    protocol: str = "clean"
    """`clean`, `paper` or `both`."""


def _ablated(name: str, sentence: str, lambda_concept: float, lambda_neural: float) -> System:
    overrides = {"family": "med-micn", "lambda_concept": lambda_concept, "lambda_neural": lambda_neural}
    return System(name, sentence, overrides)


def _published(backbone: str, step_size: float) -> tuple[System, ...]:
    """The rows of the paper's table on one backbone; λ1 is 0.1 for Med-MICN alone, whose paper says so."""
    common = _AS_PUBLISHED | {"backbone": backbone, "backbone_learning_rate": step_size}
    published = {name: dict(SYSTEMS[name].overrides) | common for name in ("black-box", "label-free-cbm", "dcr")}
    published["med-micn-dcr"] = dict(SYSTEMS["med-micn-dcr"].overrides) | common | {"lambda_concept": _PAPER_LAMBDA}
    return tuple(System(f"{name} {backbone}", SYSTEMS[name].sentence, its) for name, its in published.items())


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "loss-ablation",
            "Loss terms of Med-MICN, λ = 0.1 as published",
            (
                _ablated("no extra loss", "Classes alone.", 0.0, 0.0),
                _ablated("concept loss", "λ1 = 0.1.", _PAPER_LAMBDA, 0.0),
                _ablated("neural loss", "λ2 = 0.1.", 0.0, _PAPER_LAMBDA),
                _ablated("both losses", "λ1 = λ2 = 0.1.", _PAPER_LAMBDA, _PAPER_LAMBDA),
            ),
        ),
        Preset(
            "filter-ablation",
            "Concepts that the filters kept, against all that were proposed",
            (SYSTEMS["black-box"], SYSTEMS["med-micn-paper"], SYSTEMS["med-micn-dcr"]),
        ),
        Preset(
            "fusion",
            "What Med-MICN's class layer may read",
            (
                SYSTEMS["black-box"],
                *(
                    System(f"med-micn {fusion}", f"Fusion {fusion}.", {"family": "med-micn", "fusion": fusion})
                    for fusion in ("concat", "residual", "bottleneck")
                ),
            ),
        ),
        Preset(
            "paper-table",
            "The paper's table: fine-tuned backbones, 100 epochs",
            tuple(one for backbone, size in _PAPER_STEP_SIZES.items() for one in _published(backbone, size)),
            "both",
        ),
    )
}
"""What `medmicn compare --preset` offers."""


def preset_named(name: str) -> Preset:
    """The preset of that name; raises `ConfigurationError` for others."""
    if name not in PRESETS:
        raise ConfigurationError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}; nothing was trained.")
    return PRESETS[name]


def filter_rows(
    kept: AlignedDataset,
    unfiltered: AlignedDataset,
    read: PixelReader,
    config: TrainConfig,
    design: Design,
    *,
    cache_dir: Path,
    modality: str = "",
    advance: Advance = ignore_progress,
) -> list[Row]:
    """Every system of the design on the kept and on all concepts of the same images; one without concepts once.

    The rows of the first data set carry ` (kept K)`, those of the second ` (all N)`. Raises `InputRefused` where the
    two data sets have other images, classes or splits.
    """
    _require_alike(kept, unfiltered)
    aligned = unfiltered.take(_rows_of(unfiltered, kept.image_ids))
    without = [one for one in design.rows() if one.overrides.get("family") == "black-box"]
    with_concepts = [one for one in design.rows() if one not in without]
    variants = [(kept, without)] + [
        (data, [replace(one, name=f"{one.name} ({words} {len(data.vocabulary)})") for one in with_concepts])
        for data, words in ((kept, "kept"), (aligned, "all"))
    ]
    require_design(design, [one.name for _, systems in variants for one in systems], kept)
    rows: list[Row] = []
    for dataset, systems in variants:
        rows += prepared_rows(systems, dataset, read, config, cache_dir, modality, advance)
    return rows


def _rows_of(dataset: AlignedDataset, image_ids: list[str]) -> Rows:
    position = {image_id: n for n, image_id in enumerate(dataset.image_ids)}
    return np.array([position[image_id] for image_id in image_ids], dtype=np.int64)


def _require_alike(kept: AlignedDataset, unfiltered: AlignedDataset) -> None:
    columns = ["image_id", "label", "split"]
    ours, theirs = (data.frame[columns].sort_values("image_id").reset_index(drop=True) for data in (kept, unfiltered))
    if not ours.astype(str).equals(theirs.astype(str)) or kept.class_names != unfiltered.class_names:
        raise InputRefused(
            "filter ablation: expected two data sets of the same images with the same classes and splits, got "
            f"{len(ours)} and {len(theirs)} images that differ; nothing was trained.",
            remedy="Make the second run from the same SOURCE with the same source.seed.",
        )
