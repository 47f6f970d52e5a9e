"""A real server that no one here wrote, with a model that talks nonsense: coded failures, and not a single label.

`transformers serve` ignores schemas and log-probabilities, and its model has random weights.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest

from annotation.vlm.journal import Journal
from annotation.vlm.probe import n_requests
from annotation.vlm.schema import FaultCode
from data_contracts.errors import ExitCode
from data_contracts.store import RunFolder
from data_contracts.tables import State
from flows.settings import Settings
from pipeline.phantoms import make_phantoms
from tests.annotation.vlm.tiny_vlm import make_tiny_vlm
from tests.flows.conftest import Ended

N_IMAGES = 3
N_CONCEPTS = 2
START_LIMIT_S = 120.0

Annotate = Callable[..., Ended]


class Server(NamedTuple):
    """A running server."""

    base_url: str
    model: str
    log: Path

    @property
    def n_asked(self) -> int:
        """Chat requests that it has answered, as its own log says."""
        return self.log.read_text().count("POST /v1/chat/completions")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`transformers serve` with a tiny model, ended whatever happens."""
    folder = tmp_path_factory.mktemp("served")
    model, home, log = make_tiny_vlm(folder / "model"), folder / "home", folder / "log.txt"
    # It lists what is in its cache, and fails where there is none.
    (home / "hub").mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(str(Path(sys.executable).with_name("transformers")), "serve", str(model)),
        *("--host", "127.0.0.1", "--port", str(port), "--device", "cpu"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=os.environ | offline, stdout=stream, stderr=subprocess.STDOUT)
    try:
        _await_health(process, f"http://127.0.0.1:{port}/health", log)
        yield Server(f"http://127.0.0.1:{port}/v1", str(model), log)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_health(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    with httpx2.Client(trust_env=False) as client:
        while time.monotonic() < deadline_s and process.poll() is None:
            try:
                if client.get(address).status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.25)
    raise AssertionError(f"expected a healthy server, got this: {log.read_text()[-3000:]}")


@pytest.fixture
def annotate(server: Server, medmicn: Callable[..., Ended], tmp_path: Path) -> Annotate:
    """`medmicn annotate` of a few images by this server; arguments are further ones."""
    make_phantoms(tmp_path, n_images=N_IMAGES, seed=1, side_px=48)
    concepts = tmp_path / "concepts.csv"
    concepts.write_text("name,definition\ndark centre,The centre is darker.\njagged outline,The outline is jagged.\n")

    def call(*arguments: str) -> Ended:
        return medmicn(
            *("annotate", tmp_path / "images", "--run", tmp_path / "run", "--concepts", concepts),
            *("--base-url", server.base_url, "--model", server.model, "--set", "vlm.max_output_tokens=16"),
            *("--set", "vlm.image_side_px=48", "--set", "vlm.max_retries=0", "--set", "vlm.timeout_s=60", *arguments),
        )

    return call


def test_the_probe_finds_out_before_any_image_is_sent(server: Server, annotate: Annotate, tmp_path: Path) -> None:
    n_before = server.n_asked
    ended = annotate()
    assert ended.exit_code == ExitCode.FAILED
    assert "nothing that can be used" in ended.outcome["error"]
    assert "no image of yours was sent" in ended.outcome["error"]
    run = RunFolder(tmp_path / "run")
    assert server.n_asked - n_before == n_requests(Settings().vlm)
    with Journal(run.journal_dir) as journal:
        # Answers about images are named by their cells.
        assert [r.cells for r in journal.lines()] == [()] * (server.n_asked - n_before)
    assert not list(run.judgements_dir.glob("*"))
    assert not run.labels_csv_path.exists()


def test_nonsense_becomes_coded_failures_and_is_not_paid_for_again(
    server: Server, annotate: Annotate, medmicn: Callable[..., Ended], tmp_path: Path
) -> None:
    n_before, run = server.n_asked, RunFolder(tmp_path / "run")
    ended = annotate("--set", "vlm.probe=false")
    assert ended.exit_code == ExitCode.FAILED
    assert "Judging: expected a usable answer" in ended.outcome["error"]
    # Every image once, and once more with more room.
    assert server.n_asked - n_before == 2 * N_IMAGES
    ledger = run.read_judgements()
    assert len(ledger) == N_IMAGES * N_CONCEPTS
    assert set(ledger["state"]) == {State.NOT_ASSESSED}
    assert ledger["probability"].isna().all()
    assert set(ledger["evidence"]) <= set(FaultCode)
    (told,) = run.read_manifest().warnings["judge"]
    assert told.startswith(f"{N_IMAGES} images have no answer to some question: ")
    assert "judge" not in run.read_manifest().steps
    assert not run.labels_csv_path.exists()
    # Judging again, with the settings that the run remembers.
    again = medmicn("judge", "--run", run.path)
    assert again.exit_code == ExitCode.FAILED
    step = again.outcome["steps"]["judge"]
    assert (step["counts"]["requests"], step["counts"]["from_journal"], step["failed"]) == (0, N_IMAGES, N_IMAGES)
    assert server.n_asked - n_before == 2 * N_IMAGES
    with Journal(run.journal_dir) as journal:
        assert len(list(journal.lines())) == 2 * N_IMAGES
    assert set(run.read_judgements()["state"]) == {State.NOT_ASSESSED}
