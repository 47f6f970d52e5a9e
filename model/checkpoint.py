"""A trained classifier as a folder: safetensors and JSON, every file hashed, nothing that can run code.

config.json           how it was trained, classes, backbone, and the sha256 of every other file and of itself
vocabulary.json       meaning and order of the concepts
weights.safetensors   the head (`head.…`), and the backbone (`backbone.…`) unless a package has it
metrics.json          as measured
curves.csv            one row a seed and epoch
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from data_contracts.concepts import Vocabulary
from data_contracts.errors import CheckpointRefused, MedMicnError
from data_contracts.files import sha256_of_file, storage_error, write_bytes, write_text
from model.backbones import Backbone, Preprocessing, build_backbone
from model.config import EMBEDDED, TrainConfig
from model.devices import resolve_device
from model.fit import TrainedRun
from model.loop import Fitted
from model.network import Head, Sizes
from model.predict import Classifier
from model.systems.registry import build_network

FORMAT = "medmicn-model/1"

CONFIG, VOCABULARY, WEIGHTS, METRICS, CURVES = (
    "config.json",
    "vocabulary.json",
    "weights.safetensors",
    "metrics.json",
    "curves.csv",
)

_FILES = (VOCABULARY, WEIGHTS, METRICS, CURVES)
_STAGED = ".new"

_REMEDY = "Train again with `medmicn train`, or restore the folder from where it was made."


def save_run(folder: Path, run: TrainedRun, metrics: dict[str, Any] | None = None) -> Fitted:
    """Write the run's best seed (by validation) with its vocabulary, metrics and curves; returns that seed.

    All of it is on the disk beside the old files before the first of these is replaced, and `config.json` is the
    last one: a write that is interrupted leaves the old checkpoint, or one that `load` refuses, never a mixture.
    Raises `StorageError`.
    """
    fitted = run.best
    staged = folder / _STAGED
    write_text(staged / VOCABULARY, run.vocabulary.to_json())
    write_bytes(staged / WEIGHTS, save(_tensors(run.config, fitted)))
    write_text(staged / METRICS, json.dumps(metrics or {}, indent=2, allow_nan=False))
    write_text(staged / CURVES, run.history.to_csv(index=False))
    files = {name: sha256_of_file(staged / name) for name in _FILES}
    write_text(staged / CONFIG, json.dumps(_signed(_description(run, fitted) | {"files": files}), indent=2))
    try:
        for name in (*_FILES, CONFIG):
            (staged / name).replace(folder / name)
        shutil.rmtree(staged)
    except OSError as error:
        raise storage_error(folder, error) from error
    return fitted


def load(folder: Path, *, vocabulary: Vocabulary | None = None, device: str = "cpu") -> Classifier:
    """The classifier of a folder that `save_run` wrote; needs no network.

    With `vocabulary`, the classifier must be for exactly these concepts. Raises `VocabularyMismatch` when it is not,
    `CheckpointRefused` when a file is missing, altered or of another format, `ConfigurationError` when the package
    that holds the backbone's weights is missing.
    """
    content = _read_config(folder)
    _verify_files(folder, content.get("files"))
    stored = Vocabulary.from_json((folder / VOCABULARY).read_text("utf-8"), str(folder / VOCABULARY))
    if vocabulary is not None:
        vocabulary.require(stored.sha256, str(folder / VOCABULARY))
    try:
        config = TrainConfig.model_validate(content["train"])
        backbone, head = _networks(content, config, stored, _read_tensors(folder))
        class_names, seed = tuple(content["class_names"]), int(content["seed"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ValidationError) as error:
        raise _refused(folder, f"{CONFIG} and {WEIGHTS} do not fit together ({str(error)[:200]})") from error
    return Classifier(backbone, head, stored, class_names, config, seed, resolve_device(device))


def _tensors(config: TrainConfig, fitted: Fitted) -> dict[str, Tensor]:
    tensors = {f"head.{key}": value for key, value in fitted.network.state_dict().items()}
    if _stores_backbone(config):
        tensors |= {f"backbone.{key}": value for key, value in fitted.backbone.module.state_dict().items()}
    # Tied weights are stored twice rather than refused; a view is stored as what it shows.
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def _stores_backbone(config: TrainConfig) -> bool:
    """Only the frozen embedded backbone can be had again without a network."""
    return not (config.freeze_backbone and config.backbone == EMBEDDED)


def _description(run: TrainedRun, fitted: Fitted) -> dict[str, Any]:
    backbone = fitted.backbone
    return {
        "format": FORMAT,
        "train": run.config.model_dump(mode="json"),
        "class_names": list(run.class_names),
        "vocabulary_sha256": run.vocabulary.sha256,
        "seed": fitted.seed,
        "epoch": fitted.epoch,
        "backbone": {
            "name": backbone.name,
            "stored": _stores_backbone(run.config),
            "initial_weights": backbone.source,
            "initial_weights_sha256": backbone.fingerprint,
            "n_features": backbone.n_features,
            "preprocess": asdict(backbone.preprocess),
        },
    }


def _signed(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "sha256": _hash_of(content)}


def _hash_of(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise _refused(folder, f"{CONFIG} is missing; expected a folder that `medmicn train` wrote")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise _refused(folder, f"{CONFIG} is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise _refused(folder, f"{CONFIG}: expected format {FORMAT}, found {found}")
    if content.get("sha256") != _hash_of(content):
        raise _refused(folder, f"{CONFIG} was altered: its own sha256 does not hold")
    return content


def _verify_files(folder: Path, files: object) -> None:
    if not isinstance(files, dict):
        raise _refused(folder, f"{CONFIG}: expected the sha256 of every file under 'files', got {files!r}")
    for name in _FILES:
        if not (folder / name).is_file():
            raise _refused(folder, f"{name} is missing")
        found = sha256_of_file(folder / name)
        if found != files.get(name):
            raise _refused(
                folder, f"{name} was altered: expected sha256 {str(files.get(name))[:12]}…, found {found[:12]}…"
            )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS, device="cpu")
    except (SafetensorError, OSError) as error:
        raise _refused(folder, f"{WEIGHTS} cannot be read ({error})") from error


def _networks(
    content: dict[str, Any], config: TrainConfig, vocabulary: Vocabulary, tensors: dict[str, Tensor]
) -> tuple[Backbone, Head]:
    described = content["backbone"]
    backbone = _backbone(described, tensors)
    head = build_network(Sizes(backbone.n_features, len(vocabulary), len(content["class_names"])), config)
    head.load_state_dict(_part(tensors, "head."), strict=True)
    return backbone, head.eval()


def _backbone(described: dict[str, Any], tensors: dict[str, Tensor]) -> Backbone:
    preprocess = Preprocessing(**described["preprocess"])
    stored = bool(described["stored"])
    built = build_backbone(described["name"], size_px=preprocess.size_px, pretrained=not stored)
    if stored:
        built.module.load_state_dict(_part(tensors, "backbone."), strict=True)
    elif built.fingerprint != described["initial_weights_sha256"]:
        raise ValueError(f"backbone weights: expected {described['initial_weights_sha256']}, got {built.fingerprint}")
    return Backbone(
        built.name,
        built.module,
        built.n_features,
        preprocess,
        described["initial_weights_sha256"],
        described["initial_weights"],
    )


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _refused(folder: Path, what: str) -> MedMicnError:
    return CheckpointRefused(f"{folder}: {what}; nothing was loaded.", remedy=_REMEDY)
