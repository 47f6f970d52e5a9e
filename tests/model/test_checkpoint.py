from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import CheckpointRefused, VocabularyMismatch
from model.checkpoint import load, save_run
from model.config import TrainConfig
from model.evaluate import evaluate, metrics_json, outputs_of
from model.fit import TrainedRun, train
from model.predict import Classifier


@pytest.fixture
def folder(trained: dict[str, TrainedRun], tmp_path: Path) -> Path:
    run = trained["dcr"]
    save_run(tmp_path / "model", run, metrics_json(run, evaluate(run)))
    return tmp_path / "model"


def test_a_loaded_classifier_says_what_the_trained_one_said(
    squares, folder: Path, trained: dict[str, TrainedRun]
) -> None:
    run = trained["dcr"]
    classifier = load(folder, vocabulary=run.vocabulary)
    rows = run.prepared.dataset.rows("test")[:6]
    images = [squares(run.prepared.dataset.image_ids[n]) for n in rows]
    expected = outputs_of(run, run.best, rows)
    for found, wanted in zip(classifier.outputs(images), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)
    assert classifier.class_names == run.class_names
    assert classifier.seed == run.best.seed


def test_the_best_seed_by_validation_is_kept(folder: Path, trained: dict[str, TrainedRun]) -> None:
    seeds = trained["dcr"].seeds
    best = max(seeds, key=lambda fitted: (fitted.val_macro_f1, -fitted.val_loss))
    assert json.loads((folder / "config.json").read_text())["seed"] == best.seed


def test_only_json_csv_and_safetensors_are_written_and_the_frozen_backbone_is_not(folder: Path) -> None:
    assert {path.suffix for path in folder.iterdir()} == {".json", ".csv", ".safetensors"}
    content = json.loads((folder / "config.json").read_text())
    assert content["backbone"]["stored"] is False
    assert "efficientnet-lite0" in content["backbone"]["initial_weights"]
    assert (folder / "weights.safetensors").stat().st_size < 1_000_000


@pytest.mark.parametrize("name", ["vocabulary.json", "weights.safetensors", "metrics.json", "curves.csv"])
def test_an_altered_or_missing_file_is_refused_by_name(folder: Path, name: str) -> None:
    path = folder / name
    damaged = bytearray(path.read_bytes())
    damaged[-2] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(CheckpointRefused, match=name):
        load(folder)
    path.unlink()
    with pytest.raises(CheckpointRefused, match=f"{name} is missing"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("class_names", ["red", "blue", "striped"]), ("format", "medmicn-model/99"), ("files", {})]
)
def test_an_altered_configuration_is_refused(folder: Path, key: str, value: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointRefused, match=r"config\.json"):
        load(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "{"])
def test_a_configuration_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointRefused):
        load(folder)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointRefused, match="config"):
        load(tmp_path)


def test_other_concepts_or_another_order_are_refused(folder: Path, trained: dict[str, TrainedRun]) -> None:
    concepts = trained["dcr"].vocabulary.concepts
    for other in (Vocabulary.of(reversed(concepts)), Vocabulary.of([*concepts, Concept("new", "new")])):
        with pytest.raises(VocabularyMismatch):
            load(folder, vocabulary=other)


def test_a_fine_tuned_backbone_is_stored_and_loads_without_a_network(squares, tmp_path: Path) -> None:
    config = TrainConfig(
        backbone="resnet10t", pretrained=False, freeze_backbone=False, epochs=1, seeds=(0,), image_size_px=32
    )
    run = train(squares.dataset().take(np.arange(36)), squares, config, cache_dir=tmp_path / "cache")
    save_run(tmp_path / "model", run)
    classifier = load(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["backbone"]["stored"] is True
    for key, tensor in run.best.backbone.module.state_dict().items():
        assert torch.equal(classifier.backbone.module.state_dict()[key], tensor)
    images = [squares("blue-0"), squares("red-1")]
    for found, wanted in zip(classifier.outputs(images), Classifier.of(run).outputs(images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
