"""One verb per step, for work on an existing run folder; no Prefect needed."""

from __future__ import annotations

from collections.abc import Callable

import typer

from data_contracts.errors import ConfigurationError
from flows.chain import Context, Step, execute, is_fresh
from flows.commands.common import (
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
from flows.steps import INGEST, STEPS, begin, remember_settings, require_source

_ASKS_A_MODEL = {"concepts", "judge"}

_HELP = {
    "concepts": "Propose concepts from sampled training images and filter them.",
    "judge": "Ask the vision-language model about every image, blind to its class.",
    "align": "Check every concept against the pixels: heatmaps and scores.",
    "fuse": "Make one label of all witnesses, with a probability or an abstention.",
    "dataset": "Assemble the table the trainer reads.",
    "train": "Train Med-MICN and measure it once on the test split.",
    "explain": "Rules over a whole split, and saliency maps.",
    "report": "Write the report page.",
}


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("ingest", rich_help_panel="Single steps")(ingest)
    for name, text in _HELP.items():
        app.command(name, help=text, rich_help_panel="Single steps")(_verb(STEPS[name]))


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
        with context.run.lock():
            if step.name in _ASKS_A_MODEL and not is_fresh(step, context):
                confirm(context, yes=yes)
            remember_settings(context)
            reports = [execute(step, context)]
        following = _next_verb(step)
        if following:
            console.say(f"next:    medmicn {following} --run {context.run.path}")
        finish(reports, context.run)

    return verb


def _next_verb(step: Step) -> str | None:
    names = list(STEPS)
    if step.name not in names:
        raise ConfigurationError(f"step {step.name!r} is unknown; steps are {', '.join(names)}.")
    position = names.index(step.name) + 1
    return names[position] if position < len(names) else None
