"""Idempotent steps: what one is, when its result still holds, and how it is run with a receipt.

A step names what its result depends on. If the receipt in `run.json` has the same hash, and every file it
wrote is still there with its own hash, nothing is done and the step says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_contracts.manifest import RunManifest, StepRecord, content_hash
from data_contracts.store import RunFolder
from flows.console import Console
from flows.settings import Settings


@dataclass(frozen=True)
class Context:
    """What every step is given."""

    run: RunFolder
    settings: Settings
    console: Console
    held: frozenset[str] = frozenset()
    """Files of the source that are still being written: they are left for the next time."""

    @property
    def source(self) -> Path:
        """Folder the images are read from."""
        return Path(self.run.read_manifest().source)


@dataclass
class StepResult:
    """What a step's work gives back."""

    outputs: list[Path] = field(default_factory=list)
    """Files it wrote, to be verified before the result is trusted again."""
    counts: dict[str, float] = field(default_factory=dict)
    """What was done and what was reused; the order is kept when shown."""
    warnings: list[str] = field(default_factory=list)
    cost_usd: float | None = None
    n_failed: int = 0
    """Items that were tried in vain. Such a result gets no receipt, so that the next run tries them again."""


Shard = Mapping[str, Any]
"""What one shard is to do, as plain values that travel to any worker."""
ShardWork = Callable[["Context", Shard], Any]
ShardRunner = Callable[["Context", ShardWork, list[Shard]], list[Any]]


SHARDS_AT_ONCE = 2
"""While the last answers of one shard are awaited, the next one is already asking."""


def overlapping(context: Context, work: ShardWork, shards: list[Shard]) -> list[Any]:
    """The plain `ShardRunner`: two shards at a time, in this process. The first error starts no further shard."""
    pool = ThreadPoolExecutor(SHARDS_AT_ONCE, "medmicn-shard")
    futures = [pool.submit(work, context, shard) for shard in shards]
    try:
        # A shard that hangs must not hide the error of one behind it.
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        return [future.result() for future in futures]
    finally:
        # Without waiting: the step that handed out the shards ends what they are waiting for.
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Step:
    """One link of the chain."""

    name: str
    """The verb on the command line."""
    title: str
    """What people read while it runs."""
    inputs: Callable[[Context], Mapping[str, Any]]
    """Everything the result depends on, as a JSON-able mapping of hashes and settings."""
    work: Callable[[Context, ShardRunner], StepResult]
    sharded: bool = False
    """Whether the work goes through its `ShardRunner`."""
    reads_source: bool = False
    """Whether it reads what others may change meanwhile: then its receipt says what was there before."""


@dataclass(frozen=True)
class StepReport:
    """What happened to one step in this command."""

    name: str
    reused: bool
    seconds: float
    counts: Mapping[str, float]
    warnings: Sequence[str]
    cost_usd: float | None
    n_failed: int = 0


def is_fresh(step: Step, context: Context) -> bool:
    """Whether the step's receipt still holds: same inputs, and its files whole."""
    record = context.run.read_manifest().steps.get(step.name)
    return (
        record is not None
        and record.inputs_sha256 == content_hash(step.inputs(context))
        and context.run.holds(record.outputs)
    )


def execute(step: Step, context: Context, *, shards: ShardRunner = overlapping) -> StepReport:
    """Run one step unless its receipt holds; records receipt and warnings in the manifest."""
    if is_fresh(step, context):
        record = context.run.read_manifest().steps[step.name]
        context.console.say(f"✓ {step.title}: nothing new ({_shown(record.counts)})")
        return StepReport(step.name, True, 0.0, record.counts, (), 0.0)
    context.console.title(f"▸ {step.title}")
    started = time.monotonic()
    before = content_hash(step.inputs(context)) if step.reads_source else None
    result = step.work(context, shards)
    seconds = time.monotonic() - started
    _record(step, context, result, seconds, before)
    for warning in result.warnings:
        context.console.warn(warning)
    context.console.say(f"  {_shown(result.counts)} · {seconds:.1f} s")
    return StepReport(
        step.name, False, seconds, result.counts, tuple(result.warnings), result.cost_usd, result.n_failed
    )


def _record(step: Step, context: Context, result: StepResult, seconds: float, inputs_sha256: str | None) -> None:
    manifest: RunManifest = context.run.read_manifest()
    manifest.warnings[step.name] = result.warnings
    if result.n_failed:
        manifest.steps.pop(step.name, None)
    else:
        # Inputs are hashed after the work: a step may add to a table it also reads, such as the ledger.
        manifest.steps[step.name] = StepRecord(
            inputs_sha256=inputs_sha256 or content_hash(step.inputs(context)),
            outputs=context.run.receipts(result.outputs),
            finished_at=datetime.now(UTC),
            seconds=round(seconds, 3),
            cost_usd=result.cost_usd,
            counts=result.counts,
        )
    context.run.write_manifest(manifest)


def _shown(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{value:g} {name.replace('_', ' ')}" for name, value in counts.items()) or "done"
