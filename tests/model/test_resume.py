from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from data_contracts.dataset import AlignedDataset
from model.config import TrainConfig
from model.fit import NOBODY, TrainedRun, Watch, train
from model.loop import Fitted
from model.resume import StateFile, forget

ROOT = Path(__file__).parents[2]

LONG = TrainConfig(
    epochs=40, seeds=(0,), image_size_px=64, batch_size=4, save_every_s=0, randint_probability=0.25, patience=40
)

KILLED = """
import sys
from pathlib import Path
from model.config import TrainConfig
from model.fit import train
from conftest import Squares

squares = Squares()
config = TrainConfig.model_validate_json(sys.argv[1])
train(squares.dataset(), squares, config, cache_dir=Path(sys.argv[2]), state_dir=Path(sys.argv[3]))
"""


def same(one: Fitted, other: Fitted) -> bool:
    pairs = [(one.network, other.network), (one.backbone.module, other.backbone.module)]
    return one.epoch == other.epoch and all(
        torch.equal(tensor, b.state_dict()[key]) for a, b in pairs for key, tensor in a.state_dict().items()
    )


def values(path: Path) -> dict[str, object]:
    with safe_open(path, framework="pt") as stream:
        return json.loads(stream.metadata()["values"])


def test_a_killed_training_goes_on_and_ends_in_the_same_bits(squares, cache_dir: Path, tmp_path: Path) -> None:
    dataset, state = squares.dataset(), tmp_path / "seed-0.safetensors"
    whole = train(dataset, squares, LONG, cache_dir=cache_dir)
    arguments = [sys.executable, "-c", KILLED, LONG.model_dump_json(), str(cache_dir), str(tmp_path)]
    process = subprocess.Popen(
        arguments, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/model")])}
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if state.is_file() and values(state)["epoch"] > 2 and values(state)["step"] > 3:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = values(state)
    assert not left["finished"]
    heard: list[float] = []
    watch = Watch(on_epoch=lambda _seed, row: heard.append(row["epoch"]))
    resumed = train(dataset, squares, LONG, cache_dir=cache_dir, state_dir=tmp_path, watch=watch)
    assert heard[0] == left["epoch"] > 2
    assert same(whole.best, resumed.best)
    assert resumed.history["epoch"].tolist() == whole.history["epoch"].tolist()
    measured = ["train_loss", "val_loss", "val_macro_f1"]
    assert resumed.history[measured].equals(whole.history[measured])


def interrupted(
    monkeypatch: pytest.MonkeyPatch, n_writes: int, dataset: AlignedDataset, squares, config: TrainConfig, folder: Path
) -> None:
    """Train until the state has been written so often, then stop as Ctrl-C would."""
    write, n = StateFile.write, 0

    def counting(self: StateFile, state) -> None:
        nonlocal n
        write(self, state)
        n += 1
        if n == n_writes:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "write", counting)
        with pytest.raises(KeyboardInterrupt):
            train(dataset, squares, config, cache_dir=folder / "cache", state_dir=folder)


def test_a_fine_tuned_backbone_goes_on_within_an_epoch_in_the_same_bits(squares, tmp_path: Path, monkeypatch) -> None:
    dataset = squares.dataset().take(np.arange(36))
    config = TrainConfig(
        backbone="resnet10t",
        pretrained=False,
        freeze_backbone=False,
        augmentation="microscopy",
        warmup_epochs=1,
        layer_decay=0.7,
        accumulate_steps=2,
        epochs=3,
        seeds=(0,),
        image_size_px=32,
        batch_size=3,
        save_every_s=0,
    )
    interrupted(monkeypatch, 6, dataset, squares, config, tmp_path)
    left = values(tmp_path / "seed-0.safetensors")
    assert left["step"] > 0
    assert left["epoch"] > 1
    resumed = train(dataset, squares, config, cache_dir=tmp_path / "cache", state_dir=tmp_path)
    whole = train(dataset, squares, config, cache_dir=tmp_path / "cache")
    assert same(whole.best, resumed.best)


FAST = TrainConfig(epochs=4, seeds=(0, 1), image_size_px=64, save_every_s=0)


def heard_seeds(squares, config: TrainConfig, cache_dir: Path, folder: Path, **changes) -> tuple[TrainedRun, set[int]]:
    heard: set[int] = set()
    watch = NOBODY._replace(on_epoch=lambda seed, _row: heard.add(seed))
    dataset = changes.get("dataset") or squares.dataset()
    run = train(dataset, squares, config, cache_dir=cache_dir, state_dir=folder, watch=watch)
    return run, heard


def test_finished_seeds_are_not_trained_again_and_more_may_be_asked_for(squares, cache_dir, tmp_path: Path) -> None:
    first, heard = heard_seeds(squares, FAST, cache_dir, tmp_path)
    assert heard == {0, 1}
    more = FAST.model_copy(update={"seeds": (1, 2, 0), "decode_threads": 1, "save_every_s": 5.0})
    again, heard = heard_seeds(squares, more, cache_dir, tmp_path)
    assert heard == {2}
    assert same(first.seeds[0], again.seeds[2])
    assert first.history["epoch"].tolist() == again.history[again.history["seed"] < 2]["epoch"].tolist()
    forget(tmp_path)
    assert heard_seeds(squares, FAST, cache_dir, tmp_path)[1] == {0, 1}


def test_the_state_of_another_configuration_or_data_set_is_not_used(squares, cache_dir, tmp_path, caplog) -> None:
    heard_seeds(squares, FAST, cache_dir, tmp_path)
    other = FAST.model_copy(update={"learning_rate": 2e-3})
    assert heard_seeds(squares, other, cache_dir, tmp_path)[1] == {0, 1}
    assert "another configuration or data set" in caplog.text
    dataset = squares.dataset()
    concepts = dataset.concepts.copy()
    concepts[0, 0] = 1 - concepts[0, 0]
    changed = replace(dataset, concepts=concepts)
    assert heard_seeds(squares, other, cache_dir, tmp_path, dataset=changed)[1] == {0, 1}


def test_a_damaged_state_costs_its_seed_only(squares, cache_dir: Path, tmp_path: Path, caplog) -> None:
    first, _ = heard_seeds(squares, FAST, cache_dir, tmp_path)
    path = tmp_path / "seed-1.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    again, heard = heard_seeds(squares, FAST, cache_dir, tmp_path)
    assert heard == {1}
    assert "begins anew" in caplog.text
    assert same(first.seeds[1], again.seeds[1])


def test_a_state_that_lacks_a_part_is_damaged_too(tmp_path: Path, caplog) -> None:
    path = tmp_path / "seed-0.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "medmicn-training/1", "key": "k"})
    assert StateFile(path, "k").read() is None
    assert "begins anew" in caplog.text
