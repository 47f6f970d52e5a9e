from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from data_contracts.concepts import Vocabulary
from data_contracts.dataset import AlignedDataset
from data_contracts.errors import ConfigurationError, InputRefused
from model.backbones import hash_of_weights
from model.compare import Design, compare
from model.config import TrainConfig
from model.devices import resolve_device
from model.evaluate import evaluate, metrics_json, outputs_of
from model.fit import TrainedRun, Watch, train
from model.systems.registry import system

FAST = TrainConfig(epochs=4, seeds=(0,), image_size_px=64)


def with_split(dataset: AlignedDataset, split: np.ndarray) -> AlignedDataset:
    return replace(dataset, frame=dataset.frame.assign(split=split))


@pytest.mark.parametrize("logic", ["paper", "dcr"])
def test_classes_and_concepts_are_learnt(trained: dict[str, TrainedRun], logic: str) -> None:
    summary = evaluate(trained[logic]).summary.set_index("metric")["mean"]
    assert summary["accuracy"] > 0.9
    assert summary["concept_auroc"] > 0.85
    assert summary["rule_accuracy"] > 0.6  # chance is 0.33


def test_the_kept_epoch_is_the_best_candidate_on_validation(trained: dict[str, TrainedRun]) -> None:
    for run in trained.values():
        for fitted in run.seeds:
            candidates = fitted.history[fitted.history["epoch"] > run.config.epochs // 2]
            best = candidates.sort_values(["val_macro_f1", "val_loss"], ascending=[False, True]).iloc[0]
            assert fitted.epoch == best["epoch"]
            assert fitted.history.loc[fitted.history["kept"], "epoch"].tolist() == [fitted.epoch]


def test_the_kept_weights_are_those_of_the_kept_epoch(trained: dict[str, TrainedRun]) -> None:
    run = trained["paper"]
    measured = evaluate(run, "val")
    for fitted in run.seeds:
        assert measured.of(fitted.seed).metrics["macro_f1"] == pytest.approx(fitted.val_macro_f1)


def test_test_images_have_no_influence(squares, cache_dir: Path, trained: dict[str, TrainedRun]) -> None:
    run = trained["paper"]
    dataset = run.prepared.dataset
    test = dataset.rows("test")
    labels = dataset.frame["label"].to_numpy(dtype=object, copy=True)
    labels[test] = "blue"
    concepts = dataset.concepts.copy()
    concepts[test] = 1 - concepts[test]
    poisoned = replace(dataset, frame=dataset.frame.assign(label=labels), concepts=concepts)
    again = train(poisoned, squares, run.config, cache_dir=cache_dir)
    for one, other in zip(run.seeds, again.seeds, strict=True):
        for key, tensor in one.network.state_dict().items():
            torch.testing.assert_close(other.network.state_dict()[key], tensor, rtol=0, atol=0)


def test_a_seed_decides_everything_and_the_callers_generator_nothing(squares, cache_dir: Path) -> None:
    torch.manual_seed(123)
    undisturbed = torch.rand(1)
    torch.manual_seed(123)
    first = train(squares.dataset(), squares, FAST, cache_dir=cache_dir)
    assert torch.rand(1) == undisturbed
    second = train(squares.dataset(), squares, FAST, cache_dir=cache_dir)
    other = train(squares.dataset(), squares, FAST.model_copy(update={"seeds": (5,)}), cache_dir=cache_dir)
    weights = [run.best.network.state_dict()["fusion.weight"] for run in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_features_are_standardised_by_training_images_only(trained: dict[str, TrainedRun]) -> None:
    run = trained["paper"]
    rows = run.prepared.dataset.rows("train")
    (features,) = run.prepared.inputs.batches([rows])
    layer = run.best.network.standardise
    torch.testing.assert_close(layer.mean, features.mean(0), rtol=1e-4, atol=1e-5)
    scaled = layer(features)
    torch.testing.assert_close(scaled.var(0, correction=0).mean(), torch.tensor(1.0), rtol=1e-3, atol=1e-3)


def test_unreadable_images_are_left_out_with_a_warning(squares, with_unreadable, tmp_path: Path) -> None:
    run = train(squares.dataset(), with_unreadable, FAST, cache_dir=tmp_path)
    assert set(run.prepared.rejected) == {"blue-0", "red-4"}
    assert len(run.prepared.dataset) == len(squares.ids) - 2
    assert any("2 images could not be read" in warning for warning in run.warnings)


def test_a_class_missing_from_test_is_null_and_said(squares, cache_dir: Path) -> None:
    dataset = squares.dataset()
    frame = dataset.frame
    moved = np.where((frame["label"] == "red") & (frame["split"] == "test"), "train", frame["split"])
    run = train(with_split(dataset, moved), squares, FAST, cache_dir=cache_dir)
    measured = evaluate(run)
    content = metrics_json(run, measured)
    by_class = {row["class"]: row for row in content["test"]["per_class"]}
    assert by_class["red"]["recall"] is None
    assert by_class["blue"]["recall"] is not None
    assert any("'red'" in warning for warning in measured.evaluations[0].warnings)
    assert any("'red'" in warning for warning in run.warnings)


def test_without_validation_images_the_last_epoch_is_kept_and_said(squares, cache_dir: Path) -> None:
    dataset = squares.dataset()
    run = train(with_split(dataset, dataset.frame["split"].replace("val", "train")), squares, FAST, cache_dir=cache_dir)
    assert run.best.epoch == FAST.epochs
    assert any("no validation images" in warning for warning in run.warnings)


def test_an_empty_test_split_gives_nulls(squares, cache_dir: Path) -> None:
    dataset = squares.dataset()
    run = train(
        with_split(dataset, dataset.frame["split"].replace("test", "train")), squares, FAST, cache_dir=cache_dir
    )
    content = metrics_json(run, evaluate(run))
    assert content["test"]["n_images"] == 0
    assert content["test"]["over_seeds"]["accuracy"]["mean"] is None


def test_one_class_is_refused(squares, cache_dir: Path) -> None:
    dataset = squares.dataset()
    split = np.where(dataset.frame["label"] == "red", "train", "test")
    with pytest.raises(InputRefused, match="at least 2 classes, got 1"):
        train(with_split(dataset, split), squares, FAST, cache_dir=cache_dir)


def without_concepts(dataset: AlignedDataset) -> AlignedDataset:
    n = len(dataset)
    return AlignedDataset(
        dataset.frame, np.zeros((n, 0), np.float32), np.zeros((n, 0), bool), Vocabulary(), dataset.class_names
    )


def test_an_empty_vocabulary_is_refused_before_any_image_is_read(squares, tmp_path: Path) -> None:
    n_reads = squares.n_reads
    with pytest.raises(InputRefused, match="at least 1 concept"):
        train(without_concepts(squares.dataset()), squares, FAST, cache_dir=tmp_path)
    assert squares.n_reads == n_reads


def test_a_black_box_needs_no_concept(squares, cache_dir: Path) -> None:
    config = FAST.model_copy(update={"family": "black-box"})
    run = train(without_concepts(squares.dataset()), squares, config, cache_dir=cache_dir)
    metrics = evaluate(run).evaluations[0].metrics
    assert metrics["accuracy"] > 0.5
    assert not any(name.startswith(("concept_", "rule_")) for name in metrics)


def test_targets_that_may_not_be_used_change_nothing(squares, cache_dir: Path) -> None:
    dataset = squares.dataset()
    flipped = np.where(dataset.mask, dataset.concepts, 1 - dataset.concepts).astype(np.float32)
    one, other = (
        train(data, squares, FAST, cache_dir=cache_dir) for data in (dataset, replace(dataset, concepts=flipped))
    )
    assert torch.equal(
        one.best.network.state_dict()["concepts.score.weight"], other.best.network.state_dict()["concepts.score.weight"]
    )


def test_two_classes_and_a_single_concept_train(squares, cache_dir: Path) -> None:
    dataset = squares.dataset()
    rows = np.flatnonzero(dataset.frame["label"] != "striped")
    two = dataset.take(rows)
    pair = AlignedDataset(
        two.frame, two.concepts[:, :1], two.mask[:, :1], Vocabulary(dataset.vocabulary.concepts[:1]), ("blue", "red")
    )
    for logic in ("paper", "dcr"):
        run = train(pair, squares, FAST.model_copy(update={"logic": logic, "epochs": 30}), cache_dir=cache_dir)
        assert evaluate(run).evaluations[0].metrics["accuracy"] > 0.9


def test_every_epoch_is_heard(squares, cache_dir: Path) -> None:
    heard: list[tuple[int, float]] = []
    config = FAST.model_copy(update={"seeds": (3, 4)})
    run = train(
        squares.dataset(),
        squares,
        config,
        cache_dir=cache_dir,
        watch=Watch(on_epoch=lambda seed, row: heard.append((seed, row["epoch"]))),
    )
    assert Counter(seed for seed, _ in heard) == Counter(run.history["seed"].tolist())
    assert {"train_loss", "val_loss", "val_macro_f1", "val_concept_loss"} <= set(run.history.columns)


def test_fine_tuning_any_timm_backbone_moves_it(squares, tmp_path: Path) -> None:
    dataset = squares.dataset().take(np.arange(36))
    config = TrainConfig(
        backbone="resnet10t",
        pretrained=False,
        freeze_backbone=False,
        epochs=1,
        seeds=(0,),
        image_size_px=32,
        batch_size=5,
    )
    run = train(dataset, squares, config, cache_dir=tmp_path)
    fingerprint = run.best.backbone.fingerprint
    assert fingerprint != hash_of_weights(run.best.backbone.module)
    assert np.isfinite(run.history["train_loss"]).all()
    assert outputs_of(run, run.best, dataset.rows("test")).class_probabilities.shape == (len(dataset.rows("test")), 3)
    assert [path.name for path in tmp_path.iterdir()] == ["pixels-32-bicubic"]


def test_compare_is_paired_with_a_training_alone(squares, cache_dir: Path, tmp_path: Path) -> None:
    config = FAST.model_copy(update={"seeds": (0, 1)})
    systems = ("black-box", "med-micn-dcr")
    alone = train(squares.dataset(), squares, system("med-micn-dcr").config(config), cache_dir=cache_dir)
    table = compare(squares.dataset(), squares, config, Design(systems), cache_dir=tmp_path).table.set_index("system")
    accuracies = [e.metrics["accuracy"] for e in evaluate(alone).evaluations]
    assert np.isnan(table.at["black-box", "concept_auroc"])
    assert table.at["med-micn-dcr", "accuracy"] == pytest.approx(np.mean(accuracies))
    assert table.at["med-micn-dcr", "accuracy_sd"] == pytest.approx(pd.Series(accuracies).std())


def test_compare_refuses_an_unknown_system(squares, cache_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match="black-box"):
        compare(squares.dataset(), squares, FAST, Design(["gpt"]), cache_dir=cache_dir)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"seeds": ()},
        {"seeds": (1, 1)},
        {"logic": "fuzzy"},
        {"unknown": 1},
        {"device": "tpu"},
        {"freeze_backbone": True, "pretrained": False},
        {"dropout": 1.0},
    ],
)
def test_a_contradictory_configuration_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TrainConfig.model_validate(wrong)


def test_a_device_that_is_not_there_is_refused_with_a_remedy() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigurationError, match="auto"):
        resolve_device("cuda")


def test_training_leaves_the_callers_threads_as_they_were(squares, cache_dir: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen: list[int] = []

    try:
        train(
            squares.dataset(),
            squares,
            FAST,
            cache_dir=cache_dir,
            watch=Watch(on_epoch=lambda *_: seen.append(torch.get_num_threads())),
        )
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
