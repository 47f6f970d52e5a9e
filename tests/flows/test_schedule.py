"""What a repeated run takes in, who may work, and where its server is. No Prefect server is started here."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import numpy as np
import pytest
import yaml
from PIL import Image
from prefect.exceptions import ObjectNotFound

from data_contracts.errors import ConfigurationError
from data_contracts.store import RunFolder
from flows.chain import Context, execute, is_fresh
from flows.console import Console
from flows.scheduling import serve as serve_module
from flows.scheduling import server as servers
from flows.scheduling.arrivals import arrivals
from flows.scheduling.locks import alone, locked, scheduler_of, sole_scheduler
from flows.scheduling.serve import checked_cron, deployment_name, parse_interval, tidy
from flows.settings import Settings, restored
from flows.steps import INGEST, begin
from flows.steps import images as image_steps

FAR_FUTURE_S = 4_000_000_000


def paint(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number in range(6):
        paint(tmp_path / "source" / "ab"[number % 2] / f"{number}.png", number)
    return tmp_path / "source"


@pytest.fixture
def context(source: Path, tmp_path: Path) -> Context:
    return Context(begin(source, RunFolder(tmp_path / "run"), Settings()), Settings(), Console(quiet=True))


def accepted_paths(context: Context) -> list[str]:
    images = context.run.read_images()
    return sorted(images.loc[images["rejected"].isna(), "path"])


# ---- half-copied files, clocks, arrivals ---------------------------------------------------------------------


def test_a_file_that_changes_between_two_looks_waits(source: Path) -> None:
    whole = paint(source / "a" / "new.png", 99).read_bytes()

    def meanwhile(_seconds: float) -> None:
        with (source / "a" / "0.png").open("ab") as file:
            file.write(b"more")
        paint(source / "b" / "arrived.png", 7)
        (source / "b" / "1.png").unlink()

    found = arrivals(source, 5, sleep=meanwhile)
    assert found.held == {"a/0.png", "b/arrived.png", "b/1.png"}
    assert found.n_settled == 5
    assert "3 file(s) are still being written and wait for the next run" in found.sentence
    assert (source / "a" / "new.png").read_bytes() == whole
    assert arrivals(source, 0).held == frozenset()


@pytest.mark.parametrize("time_s", [1, FAR_FUTURE_S])
def test_the_wall_clock_does_not_matter(source: Path, time_s: int, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(source / "a" / "0.png", (time_s, time_s))
    monkeypatch.setattr(time, "time", lambda: pytest.fail("the wall clock was asked"))
    waited: list[float] = []
    found = arrivals(source, 3, sleep=waited.append)
    assert found.held == frozenset()
    assert len(waited) == 1
    assert 2 < waited[0] <= 3


def test_a_table_that_is_still_written_holds_everything(source: Path) -> None:
    (source / "labels.csv").write_text("path,label\n")
    found = arrivals(source, 1, sleep=lambda _s: (source / "labels.csv").write_text("path,label\na/0.png,a\n") and None)
    assert found.tables == ["labels.csv"]


def test_a_half_copied_file_is_left_out_now_and_taken_next_time(context: Context, source: Path) -> None:
    execute(INGEST, context)
    before = accepted_paths(context)
    paint(source / "a" / "slow.png", 50)
    holding = Context(context.run, context.settings, context.console, frozenset({"a/slow.png"}))
    assert is_fresh(INGEST, holding), "a file that waits is no news"
    execute(INGEST, holding)
    assert accepted_paths(context) == before
    execute(INGEST, context)
    assert accepted_paths(context) == sorted([*before, "a/slow.png"])


def test_a_truncated_file_is_named_and_taken_when_it_is_whole(context: Context, source: Path) -> None:
    whole = paint(source / "a" / "cut.png", 60).read_bytes()
    (source / "a" / "cut.png").write_bytes(whole[: len(whole) // 2])
    execute(INGEST, context)
    images = context.run.read_images().set_index("path")
    assert images.at["a/cut.png", "rejected"] == "truncated"
    (source / "a" / "cut.png").write_bytes(whole)
    execute(INGEST, context)
    assert "a/cut.png" in accepted_paths(context)
    assert context.run.read_images()["path"].is_unique


def test_what_arrives_during_a_run_is_taken_by_the_next_one(
    context: Context, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest = image_steps.ingest

    def slowly(*arguments, **options):
        found = ingest(*arguments, **options)
        paint(source / "b" / "late.png", 70)
        return found

    monkeypatch.setattr(image_steps, "ingest", slowly)
    execute(INGEST, context)
    monkeypatch.setattr(image_steps, "ingest", ingest)
    assert "b/late.png" not in accepted_paths(context)
    assert not is_fresh(INGEST, context), "the receipt must not cover what was not read"
    execute(INGEST, context)
    assert "b/late.png" in accepted_paths(context)
    assert is_fresh(INGEST, context)


def test_a_changed_time_alone_reads_again_but_adds_nothing(context: Context, source: Path) -> None:
    execute(INGEST, context)
    before = context.run.read_images()
    for path in source.rglob("*.png"):
        os.utime(path, (FAR_FUTURE_S, FAR_FUTURE_S))
    execute(INGEST, context)
    after = context.run.read_images()
    assert after["image_id"].tolist() == before["image_id"].tolist()
    assert after["split"].tolist() == before["split"].tolist()


# ---- one at a time -------------------------------------------------------------------------------------------

_HOLD = """
import sys, time
from pathlib import Path
from data_contracts.store import RunFolder
from flows.scheduling.locks import alone, sole_scheduler
run = RunFolder(sys.argv[2])
with sole_scheduler(run), alone(Path(sys.argv[1]), run) as busy:
    print(busy or "held", flush=True)
    time.sleep(600)
"""


def test_two_workers_on_one_source_and_a_killed_one_frees_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_HOME, temporary_settings

    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    command = [sys.executable, "-c", _HOLD, str(source), str(first.path)]
    variables = os.environ | {"PREFECT_HOME": str(tmp_path)}
    with (
        temporary_settings({PREFECT_HOME: tmp_path}),
        subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as other,
    ):
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with alone(source, second) as busy:
                assert f"process {other.pid} since" in busy, "another run folder, the same source"
            with pytest.raises(ConfigurationError, match=f"process {other.pid} since"), sole_scheduler(first):
                pytest.fail("two schedulers")
            held = scheduler_of(first)
            assert held is not None
            assert held.pid == other.pid
        finally:
            other.send_signal(signal.SIGKILL)
            other.wait()
        assert scheduler_of(first) is None
        with alone(source, first) as busy:
            assert busy == ""
            with alone(source, first) as twice:
                assert "works on it" in twice
        with first.lock(), alone(source, first) as busy:
            assert "another medmicn process works in this run folder" in busy


# ---- words of the schedule -----------------------------------------------------------------------------------


def test_intervals_and_cron_expressions_are_checked() -> None:
    assert parse_interval("15m") == timedelta(minutes=15)
    assert parse_interval("1d") == timedelta(days=1)
    assert checked_cron("0 2 * * *") == "0 2 * * *"
    for text in ("", "m", "0m", "-1m", "15", "1.5h"):
        with pytest.raises(ConfigurationError, match="--every"):
            parse_interval(text)
    for text in ("", "at night", "0 2 * *", "99 2 * * *"):
        with pytest.raises(ConfigurationError, match="--cron"):
            checked_cron(text)


def test_a_run_folder_always_has_the_same_deployment_and_no_other_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = deployment_name(RunFolder(tmp_path / "a" / "skin"))
    monkeypatch.chdir(tmp_path)
    assert deployment_name(RunFolder("a/skin")) == name
    assert deployment_name(RunFolder("b/skin")) != name
    assert name.startswith("skin-")


# ---- where the server is -------------------------------------------------------------------------------------


def record(home: Path, pid: int, ticks: int, port: int = 9) -> None:
    content = {"api_url": f"http://127.0.0.1:{port}/api", "pid": pid, "started_ticks": ticks, "is_new": False}
    (home / servers.RECORD_FILE).write_text(json.dumps(content))


@pytest.mark.parametrize("answers", [True, False])
def test_a_recorded_server_is_found_only_if_it_is_that_process_and_answers(
    tmp_path: Path, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "answers", lambda _url: answers)
    assert servers.found(tmp_path) is None
    me = os.getpid()
    record(tmp_path, me, servers.started_ticks(me))
    assert (servers.found(tmp_path) is not None) is answers
    record(tmp_path, me, servers.started_ticks(me) - 1)
    assert servers.found(tmp_path) is None, "the number of a process was given to another one since"
    assert not servers.end(tmp_path), "and that one is not to be ended"
    (tmp_path / servers.RECORD_FILE).write_text("half a")
    assert servers.found(tmp_path) is None


def test_a_process_that_ended_is_gone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        deadline = time.monotonic() + 30
        while servers.started_ticks(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert servers.started_ticks(process.pid) == 0, "a zombie serves nobody"


def test_the_port_of_the_last_time_is_taken_again_if_it_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        last = servers.Server(f"http://127.0.0.1:{port}/api", 1)
        assert servers._free_port(last) != port
    assert servers._free_port(last) == port


def test_a_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_contracts.errors import StepFailed

    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setattr(servers.sys, "executable", "/bin/false")
    with pytest.raises(StepFailed, match="it ended with code 1"):
        servers._start(tmp_path)


def test_two_that_need_a_server_do_not_start_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one starts it, the other waits, and then finds it."""
    monkeypatch.setattr(servers, "prefect_home", lambda: tmp_path)
    monkeypatch.setattr(servers, "_start", lambda _home: pytest.fail("a second server"))
    looks: list[Callable[[], None]] = []
    started = servers.Server("http://127.0.0.1:9/api", 1)
    monkeypatch.setattr(servers, "found", lambda _home: started if len(looks) > 1 else looks.append(print))
    monkeypatch.setattr(servers, "_POLL_S", 0.01)
    with locked(tmp_path / servers.LOCK_FILE):
        assert servers._found_or_started() == started


# ---- what a killed scheduler leaves at the server ------------------------------------------------------------


class Server:
    """The part of Prefect's client that `tidy` uses, with the flow runs of one deployment."""

    def __init__(self, **runs: datetime) -> None:
        self.runs = {name: SimpleNamespace(id=name, expected_start_time=at) for name, at in runs.items()}
        self.crashed: list[str] = []

    def read_deployment_by_name(self, name: str) -> SimpleNamespace:
        assert name == "annotate-then-train/skin-1"
        return SimpleNamespace(id=uuid4())

    def read_flow_runs(self, flow_run_filter, limit: int) -> list[SimpleNamespace]:
        states = {str(state.value).lower() for state in flow_run_filter.state.type.any_}
        return [run for name, run in self.runs.items() if name.split("_")[0] in states]

    def set_flow_run_state(self, flow_run_id: str, state, force: bool) -> None:
        assert force
        assert state.is_crashed()
        self.crashed.append(flow_run_id)

    def delete_flow_run(self, flow_run_id: str) -> None:
        del self.runs[flow_run_id]


def test_missed_runs_are_made_up_for_once_and_dead_ones_are_marked() -> None:
    now = datetime.now(UTC)
    hours = {f"scheduled_{n}": now - timedelta(hours=n) for n in (3, 2, 1)}
    server = Server(**hours, scheduled_next=now + timedelta(hours=1), running_0=now, pending_0=now)
    said = tidy(server, "skin-1", nobody_works=True)
    assert set(server.runs) == {"scheduled_1", "scheduled_next", "running_0", "pending_0"}
    assert server.crashed == ["running_0", "pending_0"]
    assert len(said) == 2
    # A run that outlived its scheduler and works is none of these.
    server = Server(running_0=now)
    assert tidy(server, "skin-1", nobody_works=False) == []
    assert server.crashed == []


def test_the_first_start_has_nothing_to_tidy() -> None:
    class Empty(Server):
        def read_deployment_by_name(self, name: str) -> SimpleNamespace:
            raise ObjectNotFound(RuntimeError(name))

    assert tidy(Empty(), "skin-1", nobody_works=True) == []


def test_a_server_that_went_away_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([ConfigurationError("no answer"), ConfigurationError("no answer"), servers.Server("http://x/api")])

    def obtain() -> servers.Server:
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(servers, "obtain", obtain)
    waited: list[float] = []
    assert serve_module._obtained_again(Console(quiet=True), waited.append) == servers.Server("http://x/api")
    assert len(waited) == 3


def test_the_work_pool_file_names_a_flow_and_only_its_parameters(repository: Path) -> None:
    content = yaml.safe_load((repository / "prefect.yaml").read_text())
    (deployment,) = content["deployments"]
    module, _, name = deployment["entrypoint"].rpartition(".")
    flow = getattr(importlib.import_module(module), name)
    assert set(deployment["parameters"]) <= set(inspect.signature(flow.fn).parameters)
    assert deployment["parameters"]["unattended"] is True
    assert deployment["concurrency_limit"]["limit"] == 1
    restored(deployment["parameters"]["config"])
    checked_cron(deployment["schedules"][0]["cron"])
