"""Serving the deployment: the same name and schedule from start to start, one run at a time, whatever is restarted."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import prefect_defaults

prefect_defaults.apply()

from data_contracts.errors import ConfigurationError, StepFailed  # noqa: E402
from data_contracts.store import RunFolder  # noqa: E402
from flows import console as consoles  # noqa: E402
from flows.annotate_then_train import annotate_then_train, flow_for  # noqa: E402
from flows.console import Console  # noqa: E402
from flows.prefect_server import end_with  # noqa: E402
from flows.scheduling import server as servers  # noqa: E402
from flows.scheduling.locks import locked, scheduler_of, sole_scheduler, source_lock_path  # noqa: E402
from flows.settings import Settings, restored  # noqa: E402

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_AGAIN_S = 5.0
"""Between the end of a server and the look for another."""
_LOOK_S = 2.0
_MOST_MISSED = 15
"""So many looks in a row that find no answer mean that a configured server is gone."""
_GRACE_S = 20.0
_QUICK_S = 30.0
_MOST_QUICK = 3
"""So many faults in a row, each within `_QUICK_S`, end the schedule."""


def parse_interval(text: str) -> timedelta:
    """`15m`, `2h`, `1d`, `90s` as a time span; raises `ConfigurationError` otherwise."""
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS_S or not number.isdigit() or int(number) == 0:
        raise ConfigurationError(f"--every: expected a number and s, m, h or d, such as 15m, got {text!r}.")
    return timedelta(seconds=int(number) * _UNITS_S[unit])


def checked_cron(text: str) -> str:
    """The cron expression; raises `ConfigurationError` for what Prefect would refuse later."""
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        CronSchedule(cron=text)
    except ValidationError as error:
        raise ConfigurationError(
            f"--cron: expected five fields such as '0 2 * * *' (every night at two), got {text!r}."
        ) from error
    return text


def deployment_name(run: RunFolder) -> str:
    """Name of the run folder's deployment: always the same one for it, and another one for another folder."""
    place = hashlib.sha256(os.fsencode(run.path.resolve())).hexdigest()[:8]
    return f"{run.path.resolve().name}-{place}"


def serve(
    source: Path,
    run: RunFolder,
    settings: Settings,
    console: Console,
    *,
    cron: str | None = None,
    every: timedelta | None = None,
) -> None:
    """Serve the deployment until interrupted; a server that goes away is found or started again.

    Raises:
        ConfigurationError: another scheduler serves the run folder, or the configured server does not answer.
        StepFailed: no server could be started.
    """
    with sole_scheduler(run), _ended_by_terminate():
        # The first time errors are told at once; later they pass, and the schedule goes on.
        server = servers.obtain()
        console.say(server.sentence)
        what = (str(source), str(run.path), settings.model_dump(mode="json"), cron, every, os.getpid())
        n_quick = 0
        while True:
            began_s = time.monotonic()
            if _served(what, server):
                return
            # A fault that comes again at once is no matter of the server.
            n_quick = n_quick + 1 if time.monotonic() - began_s < _QUICK_S else 0
            if n_quick >= _MOST_QUICK:
                raise StepFailed("Prefect: serving ended several times in a row; the lines above say why.")
            console.warn("the Prefect server went away, or serving ended; both are begun again")
            server = _obtained_again(console)


def _served(what: tuple[Any, ...], server: servers.Server) -> bool:
    """Serve in a process of its own, until it ends or the server is gone; True if it was ended on purpose.

    Prefect's runner neither ends nor goes on when its server dies, so it cannot be waited for in this process.
    """
    child = multiprocessing.get_context("spawn").Process(target=_serve_here, args=what)
    child.start()
    try:
        n_missed = 0
        while child.is_alive() and n_missed < _MOST_MISSED:
            child.join(_LOOK_S)
            # A machine at work may keep its server from answering; that of this project is judged by its process.
            gone = not server.lives if server.pid is not None else not servers.answers(server.api_url)
            n_missed = (n_missed + (_MOST_MISSED if server.pid is not None else 1)) if gone else 0
        return child.exitcode == 0
    finally:
        _end(child)


def _end(child: BaseProcess) -> None:
    for stop in (child.terminate, child.kill):
        if child.is_alive():
            stop()
            child.join(_GRACE_S)


@contextmanager
def _ended_by_terminate() -> Iterator[None]:
    """Let SIGTERM, which a supervisor sends, end this process as Ctrl-C does, so that what it started is ended too."""

    def interrupted(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_now(run: RunFolder) -> bool:
    """Ask the scheduler of this run folder for a run at once; False where none serves it."""
    if scheduler_of(run) is None or servers.reached() is None:
        return False
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    try:
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(f"{annotate_then_train.name}/{deployment_name(run)}")
            client.create_flow_run_from_deployment(deployment.id)
    except ObjectNotFound:
        return False
    return True


def _serve_here(
    source_path: str,
    run_path: str,
    config: dict[str, Any],
    cron: str | None,
    every: timedelta | None,
    scheduler_pid: int,
) -> None:
    """Serve in this process, as long as the scheduler that started it lives."""
    threading.Thread(target=end_with, args=(scheduler_pid,), daemon=True).start()
    source, run, settings, console = Path(source_path), RunFolder(run_path), restored(config), consoles.shared()
    name = deployment_name(run)
    from prefect.client.orchestration import get_client

    with locked(source_lock_path(source)) as holder, get_client(sync_client=True) as client:
        # A run may outlive its scheduler; as long as it works, nothing is to be said about it.
        for sentence in tidy(client, name, nobody_works=holder is None):
            console.say(sentence)
    flow_for(settings).serve(
        name=name,
        cron=cron,
        interval=every,
        parameters={
            "source": str(source.resolve()),
            "run": str(run.path.resolve()),
            "config": settings.model_dump(mode="json"),
            "unattended": True,
        },
        tags=["medmicn"],
        description=f"{source.resolve()} → {run.path.resolve()}",
        limit=1,
        # A supervised service is stopped and started; its schedule must outlive that.
        pause_on_shutdown=False,
        print_starting_message=False,
    )


def tidy(client: SyncPrefectClient, name: str, *, nobody_works: bool) -> list[str]:
    """Put right what a killed scheduler left at the server; sentences that say what.

    Runs that nobody works on any more are marked as crashed, and of those that were missed meanwhile only the newest is
    made up for: each handles everything that is new.
    """
    from prefect.exceptions import ObjectNotFound

    try:
        deployment = client.read_deployment_by_name(f"{annotate_then_train.name}/{name}")
    except ObjectNotFound:
        return []
    said = []
    dead = _runs(client, deployment.id, ("RUNNING", "PENDING", "CANCELLING")) if nobody_works else []
    if dead:
        from prefect.states import Crashed

        for flow_run in dead:
            client.set_flow_run_state(flow_run.id, Crashed(message="Its scheduler was killed."), force=True)
        said.append(f"{len(dead)} run(s) of a killed scheduler are marked as crashed; the next run goes on from there.")
    now = datetime.now(UTC)
    waiting = _runs(client, deployment.id, ("SCHEDULED",))
    late = [r for r in waiting if r.expected_start_time is not None and r.expected_start_time < now]
    for flow_run in sorted(late, key=lambda found: found.expected_start_time or now)[:-1]:
        client.delete_flow_run(flow_run.id)
    if len(late) > 1:
        said.append(f"{len(late)} runs were missed; one run makes up for all of them.")
    return said


def _runs(client: SyncPrefectClient, deployment_id: UUID, states: tuple[str, ...]) -> list[FlowRun]:
    from prefect.client.schemas.filters import FlowRunFilter

    wanted: dict[str, Any] = {"deployment_id": {"any_": [deployment_id]}, "state": {"type": {"any_": list(states)}}}
    return client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted), limit=200)


def _obtained_again(console: Console, sleep: Callable[[float], None] = time.sleep) -> servers.Server:
    """A server, waited for as long as it takes: a service is not to end because another one restarts."""
    while True:
        sleep(_AGAIN_S)
        try:
            server = servers.obtain()
        except ConfigurationError as error:
            console.warn(str(error))
            continue
        console.say(server.sentence)
        return server
