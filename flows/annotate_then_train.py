"""The Prefect flow: every step a task, judging in one task per shard, artifacts for people who watch the UI.

This, `artifacts.py`, `prefect_server.py` and `scheduling/` are the only files that know the scheduler. Steps keep their
own receipts, so a retried or repeated flow run does only what is missing; Prefect's result cache is not used.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from flows import prefect_defaults

prefect_defaults.apply()

from prefect import flow, task  # noqa: E402
from prefect.client.schemas.objects import State, TaskRun  # noqa: E402
from prefect.states import Completed  # noqa: E402
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner  # noqa: E402
from prefect.tasks import Task  # noqa: E402

from data_contracts.errors import ConfigurationError, EndpointError, MedMicnError, StepFailed  # noqa: E402
from data_contracts.store import RunFolder  # noqa: E402
from flows import console as consoles  # noqa: E402
from flows.artifacts import Progress, publish, publish_parameters  # noqa: E402
from flows.candidate import CandidateFolder, dataset_step  # noqa: E402
from flows.chain import SHARDS_AT_ONCE, Context, Shard, ShardWork, Step, StepReport, execute  # noqa: E402
from flows.offline import enforce  # noqa: E402
from flows.scheduling.locks import alone  # noqa: E402
from flows.scheduling.rounds import Round, everything, scheduled  # noqa: E402
from flows.settings import Settings, restored  # noqa: E402
from flows.steps import STEPS, begin  # noqa: E402
from flows.steps.drift import BASELINE, DRIFT  # noqa: E402
from flows.steps.promote import PROMOTE  # noqa: E402

_RETRY_DELAYS_S: list[float] = [5.0, 30.0, 120.0]

_ALL_STEPS = STEPS | {step.name: step for step in (PROMOTE, BASELINE, DRIFT)}

STATE_NAMES = {"deferred": "WaitsForPerson", "waiting": "WaitsForFiles", "busy": "Busy"}
"""Names of Prefect's Completed state for rounds that ended before everything was done; none of them lost anything."""


def worth_retrying(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed task may succeed later: storage and endpoint trouble may pass, a refusal will not."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, EndpointError | ConfigurationError):
        # The client has retried what can pass by itself; a wrong key, model or address stays wrong.
        return False
    return isinstance(error, StepFailed | OSError) or not isinstance(error, MedMicnError)


@task(name="step", task_run_name="{name}", persist_result=False, cache_result_in_memory=False)
def run_step(
    name: str, run: str, config: dict[str, Any], held: Sequence[str] = (), candidate: bool = False
) -> StepReport:
    """One step of the chain as a Prefect task; `candidate`: it works on the model that is being trained."""
    context = _context(run, config, held, candidate=candidate)
    step = dataset_step(context.run) if name == "dataset" else _ALL_STEPS[name]
    return execute(step, context)


@task(
    name="shard",
    task_run_name="{title} {number}",
    persist_result=False,
    cache_result_in_memory=False,
    retry_delay_seconds=_RETRY_DELAYS_S,
    retry_jitter_factor=0.5,
    retry_condition_fn=worth_retrying,
)
def run_shard(title: str, number: int, work: str, shard: Shard, run: str, config: dict[str, Any]) -> Any:
    """The work of one shard as a Prefect task; `work` is `module:function`, so that it travels to any worker."""
    module, _, function = work.partition(":")
    return getattr(importlib.import_module(module), function)(_context(run, config), shard)


@flow(name="annotate-then-train", flow_run_name="{run}", validate_parameters=False, persist_result=False)
def annotate_then_train(
    source: str,
    run: str,
    config: dict[str, Any] | None = None,
    last_step: str | None = None,
    unattended: bool = False,
) -> dict[str, Any] | State[Any]:
    """Images in, labels and a trained, explained classifier out; does only what is new since the last time.

    Args:
        source: folder of images.
        run: run folder; begun when it does not exist.
        config: resolved settings, as `Settings.model_dump(mode="json")`.
        last_step: stop after this step; None: all steps that the source allows.
        unattended: nobody asked for this run but a clock. It works alone on the source, leaves files that are still
            being written, trains only when a condition of [schedule] holds, and asks before it uses drifted images.
    """
    settings = enforce(restored(config))
    folder = RunFolder(run)
    with _sole_worker(Path(source), folder, unattended=unattended) as busy:
        if busy:
            return Completed(
                name=STATE_NAMES["busy"], message=busy, data={"run": run, "steps": [], "state": "busy", "said": [busy]}
            )
        context = Context(begin(Path(source), folder, settings), settings, consoles.shared())
        publish_parameters(context)
        progress = Progress(list(_ALL_STEPS))
        do = partial(_do, progress)
        done = scheduled(context, do) if unattended else everything(context, do, last_step)
        progress.end(done.state)
        publish(context, done)
    return _ended(run, done)


def flow_for(settings: Settings) -> Any:
    """The flow with the configured task runner."""
    return annotate_then_train.with_options(task_runner=_task_runner(settings))


@contextmanager
def _sole_worker(source: Path, folder: RunFolder, *, unattended: bool) -> Iterator[str]:
    """Hold source and run folder; the value says who holds them otherwise. A command holds its run folder by itself."""
    if not unattended:
        yield ""
        return
    with alone(source, folder) as busy:
        yield busy


def _ended(run: str, done: Round) -> dict[str, Any] | State[Any]:
    result = {
        "run": run,
        "steps": [asdict(report) for report in done.reports],
        "state": done.state,
        "said": list(done.sentences),
    }
    for sentence in done.sentences:
        consoles.shared().say(sentence)
    n_failed = sum(report.n_failed for report in done.reports)
    if n_failed:
        return Completed(name="CompletedWithFailures", message=f"{n_failed} items were tried in vain", data=result)
    if done.state != "done":
        return Completed(name=STATE_NAMES[done.state], message=done.sentences[-1], data=result)
    return result


def _do(progress: Progress, step: Step, context: Context) -> StepReport:
    progress.begin(step.name)
    if step.sharded:
        return execute(step, context, shards=partial(_prefect_shards, progress))
    return run_step(
        step.name,
        str(context.run.path),
        context.settings.model_dump(mode="json"),
        sorted(context.held),
        candidate=isinstance(context.run, CandidateFolder),
    )


def _prefect_shards(progress: Progress, context: Context, work: ShardWork, shards: list[Shard]) -> list[Any]:
    name = f"{work.__module__}:{work.__qualname__}"
    config = context.settings.model_dump(mode="json")
    attempt = run_shard.with_options(retries=context.settings.flow.retries)
    run = str(context.run.path)
    futures = [attempt.submit(work.__name__, n, name, shard, run, config) for n, shard in enumerate(shards)]
    results = []
    for future in futures:
        results.append(future.result())
        progress.shards(len(results), len(shards))
    return results


def _context(run: str, config: dict[str, Any], held: Sequence[str] = (), *, candidate: bool = False) -> Context:
    folder = CandidateFolder(run) if candidate else RunFolder(run)
    return Context(folder, enforce(restored(config)), consoles.shared(), frozenset(held))


def _task_runner(settings: Settings) -> TaskRunner[Any]:
    name = settings.flow.task_runner
    if name == "threads":
        return ThreadPoolTaskRunner(max_workers=SHARDS_AT_ONCE)
    module, runner = {"dask": ("prefect_dask", "DaskTaskRunner"), "ray": ("prefect_ray", "RayTaskRunner")}[name]
    try:
        return getattr(importlib.import_module(module), runner)()
    except ImportError as error:
        raise ConfigurationError(
            f"flow.task_runner = {name!r}: expected the package {module.replace('_', '-')}, it is not installed.",
            remedy=f"pip install medmicn[{name}]",
        ) from error
