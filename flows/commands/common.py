"""What every verb shares: its flags, the run folder it means, and the one JSON object at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from data_contracts.errors import ConfigurationError, ExitCode, InputRefused
from data_contracts.store import RunFolder
from flows import console as consoles
from flows import summary
from flows.chain import Context, StepReport
from flows.console import Console
from flows.offline import enforce
from flows.settings import Settings, parse_assignment, resolve

RUNS_FOLDER = Path("runs")

RunFlag = Annotated[
    Path | None,
    typer.Option("--run", metavar="DIR", help="Run folder. Default: runs/<source name>, else the newest in runs/."),
]
ConfigFlag = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file. Default: medmicn.toml, where there is one.")
]
SetFlag = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one configuration key, such as train.epochs=50; repeatable."),
]
YesFlag = Annotated[bool, typer.Option("--yes", help="Do not ask before something costs money.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="Only warnings and errors.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object on standard output at the end.")]
SourceArgument = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="Folder: class sub-folders, or images with a CSV, or images alone.")
]
ModalityFlag = Annotated[
    str | None, typer.Option("--modality", help="What the images are, such as 'blood smear microscopy'.")
]


@dataclass
class Outcome:
    """What `--json` prints: filled while a verb runs, and printed even when it fails."""

    as_json: bool = False
    content: dict[str, Any] = field(default_factory=dict)

    def add_steps(self, reports: Iterable[StepReport]) -> None:
        """Seconds, cost and counts of each step."""
        steps = self.content.setdefault("steps", {})
        for report in reports:
            steps[report.name] = {
                "reused": report.reused,
                "seconds": round(report.seconds, 3),
                "cost_usd": report.cost_usd,
                "counts": dict(report.counts),
                "warnings": list(report.warnings),
                "failed": report.n_failed,
            }

    def add_run(self, run: RunFolder) -> None:
        """Where the run is and what is in it."""
        self.content |= summary.run_overview(run)

    def print(self, exit_code: int, error: str | None = None) -> None:
        """Write the object to standard output, if it was asked for."""
        if self.as_json:
            closing = {"exit_code": exit_code} | ({"error": error} if error else {})
            sys.stdout.write(json.dumps(self.content | closing, ensure_ascii=False, default=str) + "\n")
            sys.stdout.flush()


OUTCOME = Outcome()
"""The outcome of the verb that runs in this process."""


def open_console(*, quiet: bool, as_json: bool) -> Console:
    """The console of this verb, shared with flow tasks in this process."""
    OUTCOME.as_json = as_json
    OUTCOME.content = {}
    console = Console(quiet=quiet)
    consoles.share(console)
    return console


def flags_of(assignments: Iterable[str] | None, **named: object) -> dict[str, Any]:
    """`--set` flags and named ones (`source__modality=…`) as `section.key` → value; None means not given."""
    given = {name.replace("__", "."): value for name, value in named.items() if value is not None}
    return dict(parse_assignment(text) for text in assignments or []) | given


def new_run(source: Path, run: Path | None) -> RunFolder:
    """The run folder for a SOURCE; raises `ConfigurationError` when it belongs to another one."""
    folder = RunFolder(run or RUNS_FOLDER / (source.resolve().name or "run"))
    if folder.exists and Path(folder.read_manifest().source) != source.resolve():
        raise ConfigurationError(
            f"{folder.path}: expected a run of {source}, it is one of {folder.read_manifest().source}.",
            remedy="Choose another folder with --run.",
        )
    return folder


def existing_run(run: Path | None) -> RunFolder:
    """The run folder given, else the newest in `runs/`; raises `InputRefused` where there is none."""
    if run is not None:
        folder = RunFolder(run)
        folder.read_manifest()
        return folder
    candidates = sorted(RUNS_FOLDER.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not candidates:
        raise InputRefused(
            "expected a run folder in runs/, found none.",
            remedy="Begin one with `medmicn run SOURCE`, or name another with --run DIR.",
        )
    return RunFolder(candidates[-1].parent)


def existing_context(run: Path | None, config: Path | None, flags: dict[str, Any], console: Console) -> Context:
    """Run folder, settings and console for a verb without SOURCE."""
    folder = existing_run(run)
    settings = settings_for(folder, config, flags)
    console.say(f"run {folder.path}")
    return Context(folder, settings, console)


def settings_for(run: RunFolder, config: Path | None, flags: dict[str, Any]) -> Settings:
    """Flags over file over what the run was made with; from here on no other machine is reached if they forbid it."""
    stored = run.read_manifest().config if run.exists else None
    return enforce(resolve(config, flags, stored))


def finish(reports: Iterable[StepReport], run: RunFolder) -> None:
    """Close a verb that ran steps: JSON, and exit code 5 when some items were tried in vain."""
    reports = list(reports)
    OUTCOME.add_steps(reports)
    OUTCOME.add_run(run)
    n_failed = sum(report.n_failed for report in reports)
    if n_failed:
        consoles.shared().warn(f"{n_failed} items were tried in vain; the same command tries them again.")
        raise typer.Exit(ExitCode.FAILED)
