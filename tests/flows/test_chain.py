from __future__ import annotations

from pathlib import Path

import pytest

from data_contracts.files import write_text
from data_contracts.manifest import RunManifest
from data_contracts.store import RunFolder
from flows.chain import Context, ShardRunner, Step, StepResult, execute, is_fresh, overlapping
from flows.console import Console
from flows.settings import Settings


class Work:
    """A step that writes what it is told to and counts how often it ran."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.input = "a"
        self.n_failed = 0
        self.times = 0

    def step(self) -> Step:
        return Step("train", "Training", lambda _context: {"input": self.input}, self)

    def __call__(self, _context: Context, _shards: ShardRunner) -> StepResult:
        self.times += 1
        path = self.run.path / "output.txt"
        write_text(path, self.input)
        return StepResult([path], {"items": 1}, ["careful"], n_failed=self.n_failed)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    run = RunFolder(tmp_path / "run")
    run.write_manifest(RunManifest.new("run", "source"))
    return Context(run, Settings(), Console(quiet=True))


def test_a_step_runs_once_and_then_says_that_nothing_is_new(context: Context) -> None:
    work = Work(context.run)
    first, second = execute(work.step(), context), execute(work.step(), context)
    assert (work.times, first.reused, second.reused) == (1, False, True)
    assert second.counts == {"items": 1}


def test_a_changed_input_runs_it_again(context: Context) -> None:
    work = Work(context.run)
    execute(work.step(), context)
    work.input = "b"
    assert not execute(work.step(), context).reused


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("other")])
def test_a_lost_or_changed_output_runs_it_again(context: Context, damage: object) -> None:
    work = Work(context.run)
    execute(work.step(), context)
    damage(context.run.path / "output.txt")  # type: ignore[operator]
    assert not is_fresh(work.step(), context)
    assert not execute(work.step(), context).reused


def test_failed_items_leave_no_receipt_so_that_they_are_tried_again(context: Context) -> None:
    work = Work(context.run)
    work.n_failed = 2
    assert execute(work.step(), context).n_failed == 2
    assert not is_fresh(work.step(), context)


def test_a_step_that_breaks_leaves_the_manifest_as_it_was(context: Context) -> None:
    def broken(_context: Context, _shards: ShardRunner) -> StepResult:
        raise RuntimeError("killed")

    before = context.run.manifest_path.read_bytes()
    with pytest.raises(RuntimeError):
        execute(Step("train", "Training", lambda _context: {}, broken), context)
    assert context.run.manifest_path.read_bytes() == before


def test_warnings_of_a_step_replace_its_earlier_ones(context: Context) -> None:
    work = Work(context.run)
    execute(work.step(), context)
    work.input = "b"
    execute(work.step(), context)
    assert context.run.read_manifest().warnings == {"train": ["careful"]}


def test_results_of_shards_are_in_their_order(context: Context) -> None:
    shards = [{"number": n} for n in range(9)]
    assert overlapping(context, lambda _context, shard: shard["number"], shards) == list(range(9))
