from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_contracts.errors import ConfigurationError, InputRefused
from model.config import TrainConfig
from model.fit import train
from model.parallel import Processes

ROOT = Path(__file__).parents[2]

ONE = TrainConfig(
    epochs=3, seeds=(0,), image_size_px=64, batch_size=16, dropout=0, first_candidate_fraction=0, focal_gamma=1
)
TWO = ONE.model_copy(update={"batch_size": 8, "processes": 2})

WORKER = """
import sys
from pathlib import Path
from model.config import TrainConfig
from model.fit import train
from model.parallel import joined
from conftest import Squares

squares = Squares()
config = TrainConfig.model_validate_json(sys.argv[1])
with joined():
    train(squares.dataset(), squares, config, cache_dir=Path(sys.argv[2]), state_dir=Path(sys.argv[3]))
"""


def test_rows_are_shared_out_without_loss_or_double() -> None:
    rows = np.arange(11)
    shares = [Processes(rank, 4).share(rows) for rank in range(4)]
    assert sorted(np.concatenate(shares).tolist()) == rows.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_two_processes_learn_what_one_learns_from_the_double_batch(squares, cache_dir: Path, tmp_path: Path) -> None:
    whole = train(squares.dataset(), squares, ONE, cache_dir=cache_dir)  # fills the cache too
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/model")]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    common |= {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", WORKER, TWO.model_dump_json(), str(cache_dir), str(tmp_path)]
    started = [
        subprocess.Popen(arguments, cwd=ROOT, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    # This process alone could not train it: it reads what the two have left.
    shared = train(squares.dataset(), squares, TWO, cache_dir=cache_dir, state_dir=tmp_path)
    for name in ("train_loss", "val_loss", "val_macro_f1", "val_concept_loss"):
        assert shared.history[name].tolist() == pytest.approx(whole.history[name].tolist(), rel=2e-4)
    for key, tensor in whole.best.network.state_dict().items():
        torch.testing.assert_close(shared.best.network.state_dict()[key], tensor, rtol=1e-3, atol=2e-5)


def test_accumulated_batches_are_the_step_of_the_large_batch(squares, cache_dir: Path) -> None:
    parts = ONE.model_copy(update={"batch_size": 4, "accumulate_steps": 4})
    one, other = (train(squares.dataset(), squares, config, cache_dir=cache_dir) for config in (ONE, parts))
    assert other.history["val_loss"].tolist() == pytest.approx(one.history["val_loss"].tolist(), rel=2e-4)
    assert other.history["train_loss"].tolist() == pytest.approx(one.history["train_loss"].tolist(), rel=2e-4)


def test_processes_that_were_not_started_are_refused_with_the_remedy(squares, cache_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match="expected 2 processes"):
        train(squares.dataset(), squares, TWO, cache_dir=cache_dir)


def test_too_few_images_for_the_processes_are_refused(squares, cache_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(Processes, "current", classmethod(lambda cls: cls(0, 64)))
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    with pytest.raises(InputRefused, match="at least 128"):
        train(squares.dataset(), squares, ONE.model_copy(update={"processes": 64}), cache_dir=cache_dir)
