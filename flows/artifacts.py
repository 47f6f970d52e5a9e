"""What the Prefect UI shows of a run: parameters, progress, labels, metrics, cost, drift, models, and where to look.

The Prefect UI opens no files: links to the report are there to be copied into the address line of a browser.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from flows import prefect_defaults

prefect_defaults.apply()

from prefect.artifacts import (  # noqa: E402
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event  # noqa: E402

from data_contracts.spreadsheet import read_csv  # noqa: E402
from data_contracts.store import RunFolder  # noqa: E402
from flows import approval, promotion, summary  # noqa: E402
from flows.chain import Context, StepReport  # noqa: E402
from flows.scheduling.rounds import Round  # noqa: E402
from flows.settings import remembered  # noqa: E402
from flows.steps.drift import TESTS_FILE  # noqa: E402

DRIFT_EVENT = "medmicn.drift"
"""Name of the event that is sent when new images drifted; automations can listen to it."""

_SHOWN_TESTS = 100


class Progress:
    """Two progress artifacts: `progress` for whole steps, `shards` for those of the step at work."""

    def __init__(self, step_names: Sequence[str]) -> None:
        self._names = list(step_names)
        self._steps = _begun("progress", "steps of this run")
        self._shards = _begun("shards", "shards of the step at work")
        self._step = ""

    def begin(self, step: str) -> None:
        """A step begins."""
        self._step = step
        position = self._names.index(step) if step in self._names else 0
        update_progress_artifact(self._steps, progress=100.0 * position / len(self._names), description=step)

    def shards(self, n_done: int, n_shards: int) -> None:
        """Within the step at work, `n_done` of `n_shards` are finished."""
        said = f"{self._step}: {n_done} of {n_shards} shards"
        update_progress_artifact(self._shards, progress=100.0 * n_done / max(n_shards, 1), description=said)

    def end(self, said: str = "done") -> None:
        """Everything is finished."""
        for artifact in (self._steps, self._shards):
            update_progress_artifact(artifact, progress=100.0, description=said)


def publish_parameters(context: Context) -> None:
    """A table of every setting that the run was made with; it holds no secret."""
    rows = [
        {"parameter": f"{section}.{key}", "value": str(value)}
        for section, values in remembered(context.settings).items()
        for key, value in values.items()
    ]
    first = [
        {"parameter": "source", "value": str(context.source)},
        {"parameter": "run", "value": str(context.run.path)},
    ]
    create_table_artifact([*first, *rows], key="parameters", description="Source, run folder and every setting")


def publish(context: Context, done: Round) -> None:
    """Tables and links for the Prefect UI, as far as the run has them; an event when new images drifted."""
    run = context.run
    tables = {
        "labels": (summary.label_table(run), "Fused labels per concept"),
        "metrics": (summary.metric_table(run), "Metrics on the test split: mean and standard deviation over seeds"),
        "cost": (cost_table(done.reports), "Seconds and money of each step, this time"),
        "models": (promotion.model_table(run), "The model in use, and those that are kept"),
        "drift": (drift_table(run), "New images against those of the last training; strongest first"),
    }
    for key, (rows, description) in tables.items():
        if rows:
            create_table_artifact(rows, key=key, description=description)
    create_markdown_artifact(_words(run, done), key="outcome", description="What was decided, and why")
    if run.report_path.is_file():
        create_link_artifact(run.report_path.resolve().as_uri(), "report.html", key="report", description="The report")
    create_markdown_artifact(_how_to_review(run), key="review", description="Look at the labels and correct them")
    if done.state == "deferred":
        announce_drift(run)


def announce_drift(run: RunFolder) -> None:
    """Send the event `medmicn.drift` with the open question."""
    question = approval.waiting(run)
    if question is None:
        return
    emit_event(
        DRIFT_EVENT,
        resource={"prefect.resource.id": f"medmicn.run.{run.path.resolve()}", "prefect.resource.name": run.path.name},
        payload={"sentence": question.sentence, "n_images": question.n_images, "raised_at": question.raised_at},
    )


def cost_table(reports: Sequence[StepReport]) -> list[dict[str, Any]]:
    """One row a step of this time: seconds, money (None: unknown), whether it was reused; and their sum."""
    rows: list[dict[str, Any]] = [
        {"step": r.name, "seconds": round(r.seconds, 1), "cost_usd": r.cost_usd, "reused": r.reused} for r in reports
    ]
    if not rows:
        return []
    # Only these two send something; of an endpoint without a price nobody knows the sum.
    unknown = any(r.cost_usd is None and not r.reused for r in reports if r.name in {"concepts", "judge"})
    total = None if unknown else sum(r.cost_usd or 0.0 for r in reports if not r.reused)
    seconds = round(sum(r.seconds for r in reports), 1)
    return [*rows, {"step": "all", "seconds": seconds, "cost_usd": total, "reused": all(r.reused for r in reports)}]


def drift_table(run: RunFolder) -> list[dict[str, Any]]:
    """The last comparison with the baseline, one row a test; empty where nothing was compared."""
    path = run.drift_dir / TESTS_FILE
    if not path.is_file():
        return []
    table = read_csv(path).head(_SHOWN_TESTS)
    return [{str(k): _plain(v) for k, v in row.items()} for row in table.to_dict("records")]


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 5)
    return value.item() if hasattr(value, "item") else value


def _words(run: RunFolder, done: Round) -> str:
    counts = summary.run_overview(run)["counts"]
    said = [f"- {sentence}" for sentence in done.sentences] or ["- nothing had to be decided"]
    n_failed = sum(report.n_failed for report in done.reports)
    failed = [f"- {n_failed} items were tried in vain; the next run tries them again"] if n_failed else []
    have = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items())
    return "\n".join([f"**{done.state}** ({run.path.name}: {have})", "", *said, *failed])


def _how_to_review(run: RunFolder) -> str:
    lines = [
        "The review page is opened by a person, with a token of its own:",
        "",
        f"    medmicn review --run {run.path.resolve()}",
        "",
        f"Report: `{run.report_path.resolve()}`",
    ]
    return "\n".join(lines)


def _begun(key: str, description: str) -> UUID:
    created = create_progress_artifact(progress=0.0, key=key, description=description)
    # Prefect's signature also covers coroutines, which it never gives to synchronous callers.
    assert isinstance(created, UUID)
    return created
