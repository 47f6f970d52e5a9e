from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_contracts.store import RunFolder
from flows.commands.run import _headline


@pytest.mark.parametrize(("sd", "shown"), [(0.01, "accuracy 0.900 ± 0.010"), (None, "accuracy 0.900")])
def test_one_seed_has_no_spread(tmp_path: Path, sd: float | None, shown: str) -> None:
    run = RunFolder(tmp_path)
    run.model_dir.mkdir()
    metrics = {"test": {"over_seeds": {"accuracy": {"mean": 0.9, "sd": sd, "values": [0.9]}}}}
    (run.model_dir / "metrics.json").write_text(json.dumps(metrics))
    assert _headline(run) == ["test:    " + shown]
