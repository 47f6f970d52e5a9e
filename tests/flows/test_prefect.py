"""What Prefect shows, and that a schedule really runs: the three install failures that a hello-flow misses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from prefect.client.schemas.objects import TaskRun
from prefect.states import Failed

from data_contracts.errors import BudgetReached, ConfigurationError, EndpointError, StorageError
from flows.scheduling import server as servers
from flows.scheduling.locks import locked
from tests.flows.conftest import Ended, Finished, environment

Medmicn = Callable[..., Ended]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of an administrator with a Prefect home and no server; one that is started there is ended."""
    folder = tmp_path_factory.mktemp("home")
    yield environment(folder) | {
        # A schedule is looked at every few seconds, so that the test need not wait for the usual minute.
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "3",
        "PREFECT_RUNNER_POLL_FREQUENCY": "2",
        "OMP_NUM_THREADS": "1",
    }
    servers.end(folder)


@pytest.mark.parametrize("package", ["prefect", "fastapi", "sqlalchemy"])
def test_what_is_installed_keeps_the_pins_that_matter(repository: Path, package: str) -> None:
    listed = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["dependencies"]
    pin = next(Requirement(text) for text in listed if Requirement(text).name == package)
    assert any(part.operator == "<" for part in pin.specifier), "later versions fail silently"
    assert version(package) in pin.specifier


def test_a_configured_server_that_does_not_answer_is_refused_with_the_remedy(
    finished: Finished, medmicn: Medmicn
) -> None:
    refused = medmicn(
        *("schedule", finished.source, "--every", "15m", "--run", finished.run.path),
        PREFECT_API_URL="http://127.0.0.1:9/api",
    )
    assert refused.exit_code == 2
    assert "prefect server start" in refused.outcome["error"]


@pytest.mark.parametrize(
    "flags", [[], ["--every", "15m", "--cron", "0 2 * * *"], ["--every", "soon"], ["--cron", "at night"]]
)
def test_a_schedule_needs_exactly_one_time(finished: Finished, medmicn: Medmicn, flags: list[str]) -> None:
    refused = medmicn("schedule", finished.source, "--run", finished.run.path, *flags)
    assert refused.exit_code == 2
    assert "--every" in refused.outcome["error"] or "--cron" in refused.outcome["error"]


def test_a_second_scheduler_of_a_run_folder_says_so_and_ends(copy: Finished, medmicn: Medmicn) -> None:
    with locked(copy.run.path / ".scheduler.lock"):
        refused = medmicn("schedule", copy.source, "--every", "15m", "--run", copy.run.path)
    assert refused.exit_code == 2
    assert f"process {os.getpid()} since" in refused.outcome["error"]


def test_a_schedule_starts_its_server_runs_and_survives_the_end_of_its_scheduler(
    copy: Finished, home: dict[str, str]
) -> None:
    """Started without a server; killed; started again: the same server, deployment and schedule, and it runs again."""
    # Nothing in the chain is new but the report, so a scheduled run is short.
    copy.run.report_path.unlink()
    command = [
        *(sys.executable, "-m", "flows.cli", "schedule", str(copy.source), "--every", "5s"),
        *("--run", str(copy.run.path), "--set", "schedule.settle_s=0.2", "--set", "schedule.watch_drift=false"),
    ]
    with served(command, home) as process:
        wait_for(copy.run.report_path.is_file, process, limit_s=240)
        wait_for(lambda: "COMPLETED" in ask(home, "flow-run", "ls", "--state", "Completed"), process, limit_s=60)
        deployments = ask(home, "deployment", "ls")
        assert deployments.count("annotate-then-train/run-") == 1
        artifacts = ask(home, "artifact", "ls")
        for key in ("parameters", "progress", "shards", "labels", "metrics", "cost", "models", "outcome", "report"):
            assert re.search(rf"\b{key}\b", artifacts), artifacts
        os.killpg(process.pid, signal.SIGKILL)
    first = servers.found(Path(home["PREFECT_HOME"]))
    assert first is not None, "the server outlives its scheduler"

    copy.run.report_path.unlink()
    with served(command, home) as process:
        wait_for(copy.run.report_path.is_file, process, limit_s=120)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert f"found at {first.api_url.removesuffix('/api')}" in said
    assert f"kill {first.pid}" in said
    assert ask(home, "deployment", "ls").count("annotate-then-train/run-") == 1
    assert servers.found(Path(home["PREFECT_HOME"])) == first


@contextmanager
def served(command: list[str], variables: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A scheduler, as a terminal or a supervisor starts it; it and its flow runs are gone at the end."""
    process = subprocess.Popen(
        command,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def ask(variables: dict[str, str], *arguments: str) -> str:
    record = json.loads((Path(variables["PREFECT_HOME"]) / servers.RECORD_FILE).read_text())
    found = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        env=variables | {"COLUMNS": "250", "PREFECT_API_URL": record["api_url"]},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return found.stdout


def wait_for(done: Callable[[], bool], process: subprocess.Popen[str], *, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not done():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.5)


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
