"""Verbs around runs that repeat: approve and reject what drifted; models, and back to an earlier one."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.common import (
    OUTCOME,
    ConfigFlag,
    JsonFlag,
    QuietFlag,
    RunFlag,
    existing_context,
    existing_run,
    finish,
    open_console,
)
from flows.console import Console

ByFlag = Annotated[str | None, typer.Option("--by", help="Who decides. Default: the name you are logged in with.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    panel = "Runs that repeat"
    app.command("approve", rich_help_panel=panel)(approve)
    app.command("reject", rich_help_panel=panel)(reject)
    app.command("models", rich_help_panel=panel)(models)
    app.command("rollback", rich_help_panel=panel)(rollback)


def approve(
    refuse: Annotated[bool, typer.Option("--reject", help="Say no instead: the images are not trained on.")] = False,
    take_back: Annotated[
        bool, typer.Option("--refused", help="Allow every image of this run that was ever refused.")
    ] = False,
    by: ByFlag = None,
    run: RunFlag = None,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Say yes: the new images that differ from the earlier ones may be trained on.

    Where a scheduler serves the run folder, its next run is begun at once.
    """
    _decide(not refuse, by, run, open_console(quiet=quiet, as_json=as_json), take_back=take_back)


def reject(by: ByFlag = None, run: RunFlag = None, quiet: QuietFlag = False, as_json: JsonFlag = False) -> None:
    """Say no: the new images that differ from the earlier ones keep their labels, and are never trained on.

    `medmicn approve --refused` takes it back.
    """
    _decide(False, by, run, open_console(quiet=quiet, as_json=as_json))


def models(run: RunFlag = None, quiet: QuietFlag = False, as_json: JsonFlag = False) -> None:
    """The model in use, and the earlier and refused ones that are kept."""
    console = open_console(quiet=quiet, as_json=as_json)
    folder = existing_run(run)
    from flows.promotion import model_table

    rows = model_table(folder)
    for row in rows:
        f1 = "     " if row["macro_f1"] is None else f"{row['macro_f1']:.3f}"
        mark = "in use" if row["in_use"] else "      "
        console.say(f"{row['model']:>4} {mark} {row['made_at']} trained on {row['n_train']}, macro F1 {f1}")
        console.say(f"            {row['verdict']}")
    if not rows:
        console.say("no model is recorded; `medmicn run` and `medmicn schedule` record those that they train")
    OUTCOME.content["models"] = rows
    finish([], folder)


def rollback(
    to: Annotated[int | None, typer.Option("--to", help="Number of the model. Default: the one before.")] = None,
    run: RunFlag = None,
    config: ConfigFlag = None,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Use an earlier model again; explanations and report follow, and the newer one is kept."""
    console = open_console(quiet=quiet, as_json=as_json)
    context = existing_context(run, config, {}, console)
    from flows.scheduling.rounds import roll_back

    with context.run.lock():
        done = roll_back(context, to)
    for sentence in done.sentences:
        console.say(sentence)
    finish(done.reports, context.run)


def _decide(yes: bool, by: str | None, run: Path | None, console: Console, *, take_back: bool = False) -> None:
    folder = existing_run(run)
    from flows import approval

    if take_back:
        n_images = approval.take_back(folder)
        console.say(f"{n_images} refused images may be trained on now.")
    else:
        question = approval.answer(folder, approve=yes, by=by or getpass.getuser())
        n_images = question.n_images
        said = "may be trained on" if yes else "are left out of training"
        console.say(f"{question.sentence}\nDecided: these {n_images} images {said}.")
    OUTCOME.content["decision"] = {"approve": yes, "n_images": n_images}
    from flows.scheduling.locks import scheduler_of

    if scheduler_of(folder) is None:
        console.say(f"next:    medmicn run {folder.read_manifest().source} --run {folder.path}, or its schedule")
    else:
        from flows.scheduling.serve import run_now

        begun = run_now(folder)
        console.say("Its scheduler was asked for a run now." if begun else "The next scheduled run takes it up.")
    finish([], folder)
