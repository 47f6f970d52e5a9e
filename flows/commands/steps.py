"""One verb per step, for work on an existing run folder; no Prefect needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from data_contracts.errors import ConfigurationError
from data_contracts.store import RunFolder
from flows.chain import Context, Step, execute, is_fresh
from flows.commands.common import (
    OUTCOME,
    ConfigFlag,
    JsonFlag,
    QuietFlag,
    RunFlag,
    SetFlag,
    SourceArgument,
    YesFlag,
    existing_context,
    finish,
    flags_of,
    new_run,
    open_console,
    settings_for,
)
from flows.commands.spending import confirm
from flows.steps import INGEST, REPORT, STEPS, begin, remember_settings, require_source

_ASKS_A_MODEL = {"concepts", "judge"}

_HELP = {
    "concepts": "Propose concepts from sampled training images and filter them.",
    "judge": "Ask the vision-language model about every image, blind to its class.",
    "align": "Check every concept against the pixels: heatmaps and scores.",
    "fuse": "Make one label of all witnesses, with a probability or an abstention.",
    "dataset": "Assemble the table the trainer reads.",
    "train": "Train Med-MICN and measure it once on the test split.",
    "explain": "Rules, maps, and whether the concepts are used; calibration, subgroups, robustness.",
}


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("ingest", rich_help_panel="Single steps")(ingest)
    for name, text in _HELP.items():
        app.command(name, help=text, rich_help_panel="Single steps")(_verb(STEPS[name]))
    app.command("report", rich_help_panel="Single steps")(report)


def ingest(
    source: SourceArgument,
    run: RunFlag = None,
    config: ConfigFlag = None,
    assignments: SetFlag = None,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Read a folder of images: formats, duplicates, splits, given labels."""
    console = open_console(quiet=quiet, as_json=as_json)
    folder = new_run(source, run)
    settings = settings_for(folder, config, flags_of(assignments))
    require_source(source, folder)
    with folder.lock():
        context = Context(begin(source, folder, settings), settings, console)
        reports = [execute(INGEST, context)]
    console.say(f"next:    medmicn concepts --run {folder.path}")
    finish(reports, folder)


def report(
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="RUN_A RUN_B", help="Write one page about two runs instead."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.html", help="Page of --compare. Default: comparison.html.")
    ] = None,
    run: RunFlag = None,
    config: ConfigFlag = None,
    assignments: SetFlag = None,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Write the report page, or one page that compares two runs.

    \b
    Examples:
      medmicn report
      medmicn report --compare runs/before runs/after
    """
    if compare is None:
        _verb(REPORT)(run, config, assignments, quiet=quiet, as_json=as_json)
        return
    console = open_console(quiet=quiet, as_json=as_json)
    from flows.report_comparison import compare_runs

    first, second = map(RunFolder, compare)
    page = out or Path("comparison.html")
    compare_runs(first, second, page)
    console.say(f"written: {page}")
    OUTCOME.content["comparison"] = str(page)
    finish([], first)


def _verb(step: Step) -> Callable[..., None]:
    def verb(
        run: RunFlag = None,
        config: ConfigFlag = None,
        assignments: SetFlag = None,
        yes: YesFlag = False,
        quiet: QuietFlag = False,
        as_json: JsonFlag = False,
    ) -> None:
        console = open_console(quiet=quiet, as_json=as_json)
        context = existing_context(run, config, flags_of(assignments), console)
        from flows.scheduling.rounds import by_hand

        with context.run.lock():
            if step.name in _ASKS_A_MODEL and not is_fresh(step, context):
                confirm(context, yes=yes)
            remember_settings(context)
            done = by_hand(context, step)
        for sentence in done.sentences:
            console.say(sentence)
        following = _next_verb(step)
        if following:
            console.say(f"next:    medmicn {following} --run {context.run.path}")
        finish(done.reports, context.run)

    return verb


def _next_verb(step: Step) -> str | None:
    names = list(STEPS)
    if step.name not in names:
        raise ConfigurationError(f"step {step.name!r} is unknown; steps are {', '.join(names)}.")
    position = names.index(step.name) + 1
    return names[position] if position < len(names) else None
