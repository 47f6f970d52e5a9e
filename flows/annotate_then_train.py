"""The Prefect flow: every step a task, judging in one task per shard, artifacts for people who watch the UI.

This, `schedule.py` and `prefect_server.py` are the only files that know the scheduler. Steps keep their own receipts,
so a retried or repeated flow run does only what is missing; Prefect's result cache is not used.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from flows import prefect_defaults

prefect_defaults.apply()

from prefect import flow, task  # noqa: E402
from prefect.artifacts import (  # noqa: E402
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.schemas.objects import State, TaskRun  # noqa: E402
from prefect.states import Completed  # noqa: E402
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner  # noqa: E402
from prefect.tasks import Task  # noqa: E402

from data_contracts.errors import ConfigurationError, EndpointError, MedMicnError, StepFailed  # noqa: E402
from data_contracts.store import RunFolder  # noqa: E402
from flows import console as consoles  # noqa: E402
from flows import summary  # noqa: E402
from flows.chain import SHARDS_AT_ONCE, Context, Shard, ShardWork, Step, StepReport, execute  # noqa: E402
from flows.offline import enforce  # noqa: E402
from flows.settings import Settings, restored  # noqa: E402
from flows.steps import STEPS, begin, chain_for  # noqa: E402

_RETRY_DELAYS_S: list[float] = [5.0, 30.0, 120.0]


def worth_retrying(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed task may succeed later: storage and endpoint trouble may pass, a refusal will not."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, EndpointError | ConfigurationError):
        # The client has retried what can pass by itself; a wrong key, model or address stays wrong.
        return False
    return isinstance(error, StepFailed | OSError) or not isinstance(error, MedMicnError)


@task(name="step", task_run_name="{name}", persist_result=False, cache_result_in_memory=False)
def run_step(name: str, run: str, config: dict[str, Any]) -> StepReport:
    """One step of the chain as a Prefect task."""
    return execute(STEPS[name], _context(run, config))


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
    source: str, run: str, config: dict[str, Any] | None = None, last_step: str | None = None
) -> dict[str, Any] | State[Any]:
    """Images in, labels and a trained, explained classifier out; does only what is new since the last time.

    Args:
        source: folder of images.
        run: run folder; begun when it does not exist.
        config: resolved settings, as `Settings.model_dump(mode="json")`.
        last_step: stop after this step; None: all steps that the source allows.
    """
    settings = enforce(restored(config))
    context = Context(begin(Path(source), RunFolder(run), settings), settings, consoles.shared())
    reports = _run_chain(context, last_step)
    _publish(context)
    result = {"run": run, "steps": [asdict(report) for report in reports]}
    n_failed = sum(report.n_failed for report in reports)
    if n_failed:
        return Completed(name="CompletedWithFailures", message=f"{n_failed} items were tried in vain", data=result)
    return result


def flow_for(settings: Settings) -> Any:
    """The flow with the configured task runner."""
    return annotate_then_train.with_options(task_runner=_task_runner(settings))


def _run_chain(context: Context, last_step: str | None) -> list[StepReport]:
    progress = _Progress()
    reports: list[StepReport] = []
    done: set[str] = set()
    # What the chain holds depends on what was ingested (labels or none), so it is asked again after every step.
    while (step := next((s for s in chain_for(context, last_step) if s.name not in done), None)) is not None:
        progress.begin(step.name, len(done), len(chain_for(context, last_step)))
        reports.append(_run_one(step, context, progress))
        done.add(step.name)
    progress.end()
    return reports


class _Progress:
    """The progress artifact: whole steps, and shards within a step."""

    def __init__(self) -> None:
        created = create_progress_artifact(progress=0.0, key="progress", description="begun")
        # Prefect's signature also covers coroutines, which it never gives to synchronous callers.
        assert isinstance(created, UUID)
        self._artifact = created
        self._step, self._n_done, self._n_steps = "", 0, 1

    def begin(self, step: str, n_done: int, n_steps: int) -> None:
        self._step, self._n_done, self._n_steps = step, n_done, n_steps
        self.shards(0, 1)

    def shards(self, n_done: int, n_shards: int) -> None:
        """Within the current step, `n_done` of `n_shards` are finished."""
        fraction = (self._n_done + n_done / max(n_shards, 1)) / self._n_steps
        update_progress_artifact(self._artifact, progress=100.0 * fraction, description=self._step)

    def end(self) -> None:
        update_progress_artifact(self._artifact, progress=100.0, description="done")


def _run_one(step: Step, context: Context, progress: _Progress) -> StepReport:
    if step.sharded:
        return execute(step, context, shards=partial(_prefect_shards, progress))
    return run_step(step.name, str(context.run.path), context.settings.model_dump(mode="json"))


def _prefect_shards(progress: _Progress, context: Context, work: ShardWork, shards: list[Shard]) -> list[Any]:
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


def _publish(context: Context) -> None:
    """Tables for the Prefect UI: labels per concept, metrics, and where the report is."""
    labels = summary.label_table(context.run)
    if labels:
        create_table_artifact(labels, key="labels", description="Fused labels per concept")
    metrics = summary.metric_table(context.run)
    if metrics:
        create_table_artifact(metrics, key="metrics", description="Metrics on the test split")
    create_markdown_artifact(f"Report: `{context.run.report_path}`", key="report")


def _context(run: str, config: dict[str, Any]) -> Context:
    return Context(RunFolder(run), enforce(restored(config)), consoles.shared())


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
