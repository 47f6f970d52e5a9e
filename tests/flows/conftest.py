"""One finished run for all tests of flows: the real command, the real flow, the embedded models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from data_contracts.store import RunFolder
from pipeline.phantoms import make_phantoms

N_IMAGES = 90


class Ended(NamedTuple):
    """How one command ended."""

    exit_code: int
    outcome: dict[str, Any]
    messages: str


class Finished(NamedTuple):
    """A whole run, done once by `medmicn run`."""

    source: Path
    truth: Path
    run: RunFolder
    ended: Ended


def environment(home: Path) -> dict[str, str]:
    """This process's environment with a Prefect home of its own and no server configured."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "OPENAI_"))}
    return clean | {"PREFECT_HOME": str(home), "OMP_NUM_THREADS": "2", "COLUMNS": "100"}


@pytest.fixture(scope="session")
def medmicn(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ended]:
    """Run the command line as a person does, in a process of its own."""
    home = tmp_path_factory.mktemp("prefect")
    work = tmp_path_factory.mktemp("work")

    def call(*arguments: object, cwd: Path = work, as_json: bool = True, **variables: str) -> Ended:
        command = [sys.executable, "-m", "flows.cli", *map(str, arguments), *(["--json"] if as_json else [])]
        found = subprocess.run(
            command,
            cwd=cwd,
            env=environment(home) | variables,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        outcome = json.loads(found.stdout) if as_json and found.stdout else {}
        return Ended(found.returncode, outcome, found.stderr)

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, medmicn: Callable[..., Ended]) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    make_phantoms(folder, n_images=N_IMAGES, seed=3)
    run = RunFolder(folder / "run")
    ended = medmicn(
        *("run", folder / "images", "--run", run.path, "--modality", "synthetic lesion phantoms"),
        *("--set", "train.seeds=[0,1]", "--set", "flow.shard_size=40"),
        # Each image of the map evidence costs some hundred passes.
        *("--set", "explain.n_map_evidence_images=4"),
    )
    assert ended.exit_code == 0, ended.messages[-3000:]
    return Finished(folder / "images", folder / "truth.csv", run, ended)


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Finished:
    """The finished run in a folder of its own, to be changed."""
    shutil.copytree(finished.run.path, tmp_path / "run")
    return finished._replace(run=RunFolder(tmp_path / "run"))
