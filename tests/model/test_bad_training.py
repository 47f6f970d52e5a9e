"""What goes wrong while training: sentences that say what and where, and nothing lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from data_contracts.errors import CheckpointRefused, ConfigurationError, StepFailed
from data_contracts.files import sha256_of_file
from model import checkpoint
from model.checkpoint import load, save_run
from model.config import TrainConfig
from model.evaluate import evaluate, metrics_json
from model.fit import Watch, fit, train
from model.learner import Learner
from model.loggers import epoch_log

FAST = TrainConfig(epochs=4, seeds=(0,), image_size_px=64)


def test_concepts_that_cannot_be_learnt_are_named_and_training_goes_on(squares, cache_dir: Path) -> None:
    dataset = squares.dataset()
    mask, concepts = dataset.mask.copy(), dataset.concepts.copy()
    mask[:, 0] = False
    concepts[:, 1] = 1
    run = train(replace(dataset, mask=mask, concepts=concepts), squares, FAST, cache_dir=cache_dir)
    assert any("1 of 4 concepts have no usable label" in w and "bluish" in w for w in run.warnings)
    assert any("1 of 4 concepts are the same" in w and "reddish" in w for w in run.warnings)
    assert not any("stripes" in w for w in run.warnings)
    assert np.isfinite(run.history["train_loss"]).all()
    json.dumps(metrics_json(run, evaluate(run)), allow_nan=False)


@pytest.mark.parametrize("logic", ["paper", "dcr"])
def test_a_data_set_without_any_usable_concept_label_still_learns_classes(squares, cache_dir, logic: str) -> None:
    dataset = squares.dataset()
    config = TrainConfig.model_validate(FAST.model_dump() | {"logic": logic, "epochs": 15})
    run = train(replace(dataset, mask=np.zeros_like(dataset.mask)), squares, config, cache_dir=cache_dir)
    assert evaluate(run).evaluations[0].metrics["accuracy"] > 0.8
    assert run.history["train_concept_loss"].eq(0).all()


def test_batches_of_one_image_train_a_head_but_no_batch_normalisation(squares, cache_dir: Path, tmp_path: Path) -> None:
    run = train(squares.dataset(), squares, FAST.model_copy(update={"batch_size": 1}), cache_dir=cache_dir)
    assert np.isfinite(run.history["train_loss"]).all()
    config = TrainConfig(
        backbone="resnet10t", pretrained=False, freeze_backbone=False, image_size_px=32, batch_size=1, seeds=(0,)
    )
    with pytest.raises(ConfigurationError, match="batch_size=2 or more"):
        train(squares.dataset().take(np.arange(12)), squares, config, cache_dir=tmp_path)


def failing_step(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def step(*_args: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(Learner, "train_step", step)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_says_which_setting_to_lower(squares, cache_dir: Path, monkeypatch, error: Exception) -> None:
    failing_step(monkeypatch, error)
    config = FAST.model_copy(update={"accumulate_steps": 3})
    with pytest.raises(StepFailed, match=r"train.batch_size=16 --set train.accumulate_steps=6"):
        train(squares.dataset(), squares, config, cache_dir=cache_dir)


def test_the_advice_while_fine_tuning_has_more_settings(squares, tmp_path: Path, monkeypatch) -> None:
    failing_step(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    config = TrainConfig(
        backbone="resnet10t",
        pretrained=False,
        freeze_backbone=False,
        image_size_px=32,
        seeds=(0,),
        mixed_precision=False,
    )
    with pytest.raises(StepFailed, match=r"image_size_px than 32, or train.mixed_precision=true, or train.freeze"):
        train(squares.dataset().take(np.arange(12)), squares, config, cache_dir=tmp_path)


def test_other_errors_are_left_as_they_are(squares, cache_dir: Path, monkeypatch) -> None:
    failing_step(monkeypatch, RuntimeError("a fault of the program"))
    with pytest.raises(RuntimeError, match="a fault of the program"):
        train(squares.dataset(), squares, FAST, cache_dir=cache_dir)


def diverging_from(monkeypatch: pytest.MonkeyPatch, n_steps: int) -> None:
    """The weights become NaN after so many steps of a seed."""
    step = Learner.train_step
    n_done: dict[int, int] = {}

    def poisoned(self: Learner, *args: object) -> torch.Tensor:
        n_done[self.seed] = n_done.get(self.seed, 0) + 1
        if n_done[self.seed] == n_steps:
            with torch.no_grad():
                next(self.head.parameters()).fill_(torch.nan)
        return step(self, *args)

    monkeypatch.setattr(Learner, "train_step", poisoned)


@pytest.mark.parametrize("n_good_epochs", [1, 6])
def test_a_loss_that_is_no_number_ends_the_seed_and_keeps_a_good_epoch(
    squares, cache_dir: Path, monkeypatch, n_good_epochs: int
) -> None:
    config = FAST.model_copy(update={"epochs": 8, "batch_size": 15, "seeds": (0, 1)})
    heard: list[tuple[int, float]] = []
    diverging_from(monkeypatch, 3 * n_good_epochs + 2)
    watch = Watch(on_epoch=lambda seed, row: heard.append((seed, row["epoch"])))
    run = train(squares.dataset(), squares, config, cache_dir=cache_dir, watch=watch)
    assert heard == [(seed, epoch) for seed in (0, 1) for epoch in range(1, n_good_epochs + 2)]
    for fitted in run.seeds:
        assert fitted.diverged
        assert 1 <= fitted.epoch <= n_good_epochs
        assert all(torch.isfinite(p).all() for p in fitted.network.parameters())
    sentence = f"seed 1: the loss was no number in epoch {n_good_epochs + 1}"
    assert any(w.startswith(sentence) and "Lower train.learning_rate" in w for w in run.warnings)


def test_a_loss_that_never_was_a_number_is_an_error_with_a_remedy(squares, cache_dir: Path, monkeypatch) -> None:
    diverging_from(monkeypatch, 1)
    with pytest.raises(StepFailed, match=r"first epoch.*Lower train.learning_rate"):
        train(squares.dataset(), squares, FAST, cache_dir=cache_dir)


def test_an_interrupted_write_leaves_the_old_checkpoint_whole(trained, tmp_path: Path, monkeypatch) -> None:
    save_run(tmp_path, trained["paper"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_text", full)
        with pytest.raises(KeyboardInterrupt):
            save_run(tmp_path, trained["dcr"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert load(tmp_path).config.logic == "paper"
    save_run(tmp_path, trained["dcr"])
    assert load(tmp_path).config.logic == "dcr"
    assert all(path.is_file() for path in tmp_path.iterdir())


def resigned(folder: Path, **changes: object) -> None:
    """Alter the configuration and sign it anew, as someone would who knows how."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(checkpoint._signed(content)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:40],
        lambda data: b"",
        lambda data: save({"x": torch.ones(1)}),
    ],
)
def test_weights_with_a_damaged_header_are_refused_even_when_signed_anew(trained, tmp_path: Path, damage) -> None:
    save_run(tmp_path, trained["paper"])
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(CheckpointRefused, match="altered"):
        load(tmp_path)
    files = json.loads((tmp_path / "config.json").read_text())["files"]
    resigned(tmp_path, files=files | {"weights.safetensors": sha256_of_file(weights)})
    with pytest.raises(CheckpointRefused, match="weights.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"files": None}, {"files": []}, {"train": None}, {"backbone": None}, {"seed": "x"}, {"class_names": 3}]
)
def test_a_signed_configuration_that_makes_no_sense_is_refused(trained, tmp_path: Path, changes) -> None:
    save_run(tmp_path, trained["paper"])
    resigned(tmp_path, **changes)
    with pytest.raises(CheckpointRefused, match="config.json"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_logger_that_is_not_installed_is_refused_with_the_remedy(name, tmp_path: Path, monkeypatch) -> None:
    for module in ("torch.utils.tensorboard", "mlflow"):
        monkeypatch.setitem(__import__("sys").modules, module, None)  # an import of it fails
    with pytest.raises(ConfigurationError, match=f"pip install {name}"), epoch_log(name, tmp_path, {}):
        pass


def test_deterministic_training_leaves_torch_as_it_was(squares, cache_dir: Path) -> None:
    seen: list[bool] = []
    watch = Watch(on_epoch=lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    config = FAST.model_copy(update={"deterministic": True})
    one = train(squares.dataset(), squares, config, cache_dir=cache_dir, watch=watch)
    other = train(squares.dataset(), squares, FAST, cache_dir=cache_dir)
    assert set(seen) == {True}
    assert not torch.are_deterministic_algorithms_enabled()
    assert one.history["val_loss"].equals(other.history["val_loss"])


def test_a_compiler_that_fails_is_a_sentence(squares, cache_dir: Path, monkeypatch) -> None:
    class BackendCompilerFailed(RuntimeError):
        __module__ = "torch._dynamo.exc"

    failing_step(monkeypatch, BackendCompilerFailed("no g++"))
    with pytest.raises(ConfigurationError, match=r"no g\+\+.*train.compile=false"):
        train(squares.dataset(), squares, FAST.model_copy(update={"compile": True}), cache_dir=cache_dir)


def test_interventions_in_training_change_what_is_learnt(squares, cache_dir: Path) -> None:
    prepared_run = train(squares.dataset(), squares, FAST, cache_dir=cache_dir)
    for key in ("randint_probability", "concept_dropout"):
        config = FAST.model_copy(update={key: 0.3})
        run = fit(prepared_run.prepared, prepared_run.best.backbone, config)
        assert not run.history["train_loss"].equals(prepared_run.history["train_loss"])
        assert np.isfinite(run.history["train_loss"]).all()
