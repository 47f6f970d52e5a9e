"""The verb that hands labels to other programs: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from data_contracts.errors import ConfigurationError
from flows.commands.common import (
    OUTCOME,
    ConfigFlag,
    JsonFlag,
    QuietFlag,
    RunFlag,
    existing_context,
    finish,
    open_console,
)

_PROGRAMS: tuple[Literal["label-studio", "fiftyone", "coco"], ...] = ("label-studio", "fiftyone", "coco")


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("export", rich_help_panel="Look and correct")(export)


def export(
    to: Annotated[str, typer.Option("--to", help="label-studio, fiftyone or coco.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: export/NAME in the run.")] = None,
    pixels: Annotated[
        bool,
        typer.Option("--pixels", help="Write re-encoded images too, under their ids, without names or metadata."),
    ] = False,
    run: RunFlag = None,
    config: ConfigFlag = None,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """The labels of a run for Label Studio, FiftyOne, or anything that reads COCO-style JSON."""
    console = open_console(quiet=quiet, as_json=as_json)
    context = existing_context(run, config, {}, console)
    from flows.exchange import export_labels

    program = next((name for name in _PROGRAMS if name == to), None)
    if program is None:
        raise ConfigurationError(f"--to: expected one of {', '.join(_PROGRAMS)}, got {to!r}.")
    done = export_labels(context, program, out or context.run.path / "export" / program, pixels=pixels)
    console.say(f"{done.n_images} images: {done.folder}")
    if done.n_foreign:
        console.warn(f"{done.n_foreign} images are in formats that browsers do not show; --pixels writes them as PNG.")
    for step in done.next_steps:
        console.say(f"next:    {step}")
    OUTCOME.content["exported"] = {"folder": str(done.folder), "images": done.n_images, "left_out": done.n_unreadable}
    finish([], context.run)
