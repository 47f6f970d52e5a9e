"""The temporary Prefect server: Ctrl-C in a terminal ends a run in order, and no end of a run leaves it behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from annotation.vlm.journal import Journal
from benchmarks.simulated_endpoint import DEFAULT_MODEL, Simulator
from data_contracts.errors import ExitCode, StepFailed
from data_contracts.store import RunFolder
from flows.prefect_server import TemporaryServer, begin
from pipeline.phantoms import make_phantoms
from tests.flows.conftest import environment

WAIT_S = 240
"""For whatever must come, on a machine however slow."""
AT_ONCE_S = 45
"""For an end; a client that asks a dead server for ever needs 70 s and more even on a fast machine."""


def servers_of(starter_pid: int) -> list[int]:
    """The temporary servers that this process has started, whether or not it still lives."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    found = []
    for pid, state, *arguments in map(str.split, listed.splitlines()):
        if "flows.prefect_server" in arguments and arguments[-1] == str(starter_pid) and not state.startswith("Z"):
            found.append(int(pid))
    return found


def wait_for(done: Callable[[], bool], *, limit_s: float) -> None:
    end_s = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end_s, "waited too long"
        time.sleep(0.2)


@contextmanager
def started(home: Path, command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A program as a terminal starts it: the first of a process group of its own."""
    process = subprocess.Popen(
        command,
        env=environment(home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        with process:
            try:
                yield process
            finally:
                process.kill()
    finally:
        for pid in servers_of(process.pid):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Prefect home for all tests here: only the first has to make its database."""
    return tmp_path_factory.mktemp("home")


def test_neither_a_kill_nor_ctrl_c_leaves_the_server_or_loses_an_answer(home: Path, tmp_path: Path) -> None:
    make_phantoms(tmp_path, n_images=40, seed=2, side_px=48)
    concepts = tmp_path / "concepts.csv"
    concepts.write_text("name,definition\ndark centre,The centre is dark.\njagged outline,The outline is jagged.\n")
    run = RunFolder(tmp_path / "run")
    with Simulator("--latency-s", 0.5) as simulator:
        command = [
            *(sys.executable, "-m", "flows.cli", "run", str(tmp_path / "images"), "--run", str(run.path), "--yes"),
            *("--base-url", simulator.base_url, "--model", DEFAULT_MODEL, "--concepts", str(concepts)),
            *("--set", "vlm.probe=false", "--set", "vlm.concurrency=1", "--set", "flow.shard_size=10"),
        ]

        def n_asked() -> int:
            return int(simulator.state()["chat_requests_received"])

        with started(home, command) as process:
            wait_for(lambda: n_asked() >= 3 or process.poll() is not None, limit_s=WAIT_S)
            assert len(servers_of(process.pid)) == 1
            process.kill()
            wait_for(lambda: not servers_of(process.pid), limit_s=AT_ONCE_S)

        before = n_asked()
        with started(home, command) as process:
            wait_for(lambda: n_asked() >= before + 3 or process.poll() is not None, limit_s=WAIT_S)
            assert len(servers_of(process.pid)) == 1
            os.killpg(process.pid, signal.SIGINT)
            _, messages = process.communicate(timeout=AT_ONCE_S)
            assert process.returncode == ExitCode.INTERRUPTED
            assert "interrupted; nothing is lost" in messages
            assert "Traceback" not in messages
            assert "rror:" not in messages.replace("error: interrupted", "")
            assert not servers_of(process.pid)
        n_sent = n_asked()
    with Journal(run.journal_dir) as journal:
        assert journal.damage == []
        # One request at a time: at either end one may have been under way. All else is kept, and was asked once.
        assert n_sent - 2 <= len(journal) == journal.n_lines <= n_sent


def test_a_configured_server_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.prefect_server.TemporaryServer", lambda **_: pytest.fail("a second server"))
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        assert begin() is None


def test_a_server_that_cannot_start_says_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "nonsense")
    server = TemporaryServer(limit_s=WAIT_S)
    with pytest.raises(StepFailed, match=r"it ended \(.*SQLAlchemy URL.*prefect server start"):
        server.wait_until_healthy()
    assert not servers_of(os.getpid())


def test_a_server_that_takes_too_long_is_stopped() -> None:
    server = TemporaryServer(limit_s=0)
    with pytest.raises(StepFailed, match="no answer within 0 s.*prefect server start"):
        server.wait_until_healthy()
    assert not servers_of(os.getpid())
