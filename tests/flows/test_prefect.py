"""What Prefect shows, and that a schedule really runs: the three install failures that a hello-flow misses."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from prefect.client.schemas.objects import TaskRun
from prefect.states import Failed

from data_contracts.errors import BudgetReached, ConfigurationError, EndpointError, StorageError
from tests.flows.conftest import Ended, Finished, environment

Medmicn = Callable[..., Ended]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real Prefect server on a free loopback port; the value is the environment that points to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("server")
    variables = environment(home) | {
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # A schedule is looked at every few seconds, so that the test need not wait for the usual minute.
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
        "PREFECT_RUNNER_POLL_FREQUENCY": "2",
        "PREFECT_LOGGING_LEVEL": "WARNING",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(lambda: _healthy(variables["PREFECT_API_URL"]), limit_s=150)
        yield variables
    finally:
        _end(process)


def test_without_a_server_a_schedule_is_refused_with_the_remedy(finished: Finished, medmicn: Medmicn) -> None:
    refused = medmicn("schedule", finished.source, "--every", "15m", "--run", finished.run.path)
    assert refused.exit_code == 2
    assert "prefect server start" in refused.outcome["error"]


@pytest.mark.parametrize("flags", [[], ["--every", "15m", "--cron", "0 2 * * *"], ["--every", "soon"]])
def test_a_schedule_needs_exactly_one_time(finished: Finished, medmicn: Medmicn, flags: list[str]) -> None:
    refused = medmicn("schedule", finished.source, "--run", finished.run.path, *flags)
    assert refused.exit_code == 2
    assert "--every" in refused.outcome["error"]


def test_a_served_schedule_really_runs_and_shows_its_tables(copy: Finished, server: dict[str, str]) -> None:
    # Nothing in the chain is new but the report, so the scheduled run is short.
    copy.run.report_path.unlink()
    command = [
        *(sys.executable, "-m", "flows.cli", "schedule", str(copy.source)),
        *("--every", "20s", "--run", str(copy.run.path)),
    ]
    process = subprocess.Popen(command, env=server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(copy.run.report_path.is_file, limit_s=240)
        _wait_for(lambda: "COMPLETED" in _ask(server, "flow-run", "ls", "--state", "Completed"), limit_s=60)
    finally:
        _end(process)
    assert "annotate-then-train" in _ask(server, "deployment", "ls")
    artifacts = _ask(server, "artifact", "ls")
    assert all(key in artifacts for key in ("labels", "metrics", "progress", "report"))


def _ask(variables: dict[str, str], *arguments: str) -> str:
    found = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        env=variables | {"COLUMNS": "250"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return found.stdout


def _healthy(api_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _wait_for(done: Callable[[], bool], *, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end, "waited too long"
        time.sleep(1)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (StorageError("the disk is full"), True),
        (OSError("connection reset"), True),
        (RuntimeError("unexpected"), True),
        (EndpointError("wrong key"), False),
        (BudgetReached("the cap is reached"), False),
        (ConfigurationError("no such device"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: Exception, expected: bool) -> None:
    from flows.annotate_then_train import run_shard, worth_retrying

    run = TaskRun(task_key="shard", dynamic_key="0")
    assert worth_retrying(run_shard, run, Failed(data=error)) is expected
