"""Verbs for people who look at labels and correct them: review, import-labels, audit."""

from __future__ import annotations

import secrets
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from data_contracts.errors import ConfigurationError, ExitCode
from flows.chain import Context
from flows.commands.common import (
    OUTCOME,
    ConfigFlag,
    JsonFlag,
    QuietFlag,
    RunFlag,
    SetFlag,
    YesFlag,
    existing_context,
    finish,
    flags_of,
    open_console,
)
from flows.settings import Scale, scale_of
from flows.steps import draw_audit, image_reader, import_sheet, score_audit
from flows.steps.corrections import AUDIT_DISPUTED_CSV, AUDIT_REJECTED_CSV

audit_app = typer.Typer(help="The expert sample, and its statistics.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("review", rich_help_panel="Look and correct")(review)
    app.command("import-labels", rich_help_panel="Look and correct")(import_labels)
    app.add_typer(audit_app, name="audit", rich_help_panel="Look and correct")


def review(
    port: Annotated[int, typer.Option("--port", help="Port on 127.0.0.1; 0 takes a free one.")] = 0,
    reviewer: Annotated[str, typer.Option("--reviewer", help="Your name in the ledger; the page can change it.")] = (
        "reviewer"
    ),
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = True,
    run: RunFlag = None,
    config: ConfigFlag = None,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Local page to look at labels, filter and correct them; only this machine can reach it.

    Corrections are added to the ledger as expert judgements. Afterwards `medmicn fuse` makes labels of them,
    and `medmicn train` the classifier.
    """
    console = open_console(quiet=quiet, as_json=as_json)
    context = existing_context(run, config, {}, console)
    from flows.review_ports import review_ports
    from pipeline.review.app import create_app

    token, read = secrets.token_urlsafe(24), image_reader(context)
    app = create_app(context.run, read, token, reviewer=reviewer, ports=review_ports(context, read))

    def started(address: str) -> None:
        url = f"{address}/?token={token}"
        console.say(f"review:  {url}\n         Ctrl-C ends it; every correction is kept as it is made.")
        if open_browser:
            webbrowser.open(url)

    serve_locally(app, port, started)
    console.say(f"next:    medmicn fuse --run {context.run.path}")
    finish([], context.run)


def import_labels(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.csv", help="An edited labels.csv or concepts.csv, or any sheet of labels.")
    ],
    given: Annotated[
        bool,
        typer.Option(
            "--given", help="The sheet comes with the data: its columns become the concepts, its cells labels."
        ),
    ] = False,
    reviewer: Annotated[
        str, typer.Option("--reviewer", help="Who filled the sheet; stored with every judgement.")
    ] = "",
    run: RunFlag = None,
    config: ConfigFlag = None,
    yes: YesFlag = False,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Read corrections from a spreadsheet; the differences are shown first, and nothing half-valid is taken.

    \b
    Examples:
      medmicn import-labels runs/skin/labels.csv --reviewer "Dr A"
      medmicn import-labels attributes.csv --given
      medmicn import-labels runs/skin/concepts.csv
    """
    console = open_console(quiet=quiet, as_json=as_json)
    context = existing_context(run, config, {}, console)
    if not given and _holds_concepts(file):
        _import_concepts(context, file, yes=yes)
        return
    if not given and not reviewer:
        raise ConfigurationError("import-labels: expected --reviewer NAME (or --given), got neither.")
    with context.run.lock():
        imported = import_sheet(context, file, given=given, reviewer=reviewer)
        for line in imported.preview():
            console.say(line)
        if imported.n_changed and not yes and not given and not typer.confirm("Take these?", err=True):
            raise typer.Exit(ExitCode.RESUMABLE)
        imported.take()
    console.say(f"{imported.n_changed} cells taken, {imported.n_unchanged} were so already.")
    console.say(f"next:    medmicn fuse --run {context.run.path}")
    OUTCOME.content["imported"] = {"changed": imported.n_changed, "unchanged": imported.n_unchanged}
    finish([], context.run)


def _holds_concepts(file: Path) -> bool:
    from pipeline.import_concepts import is_concept_sheet

    return file.is_file() and is_concept_sheet(file)


def _import_concepts(context: Context, file: Path, *, yes: bool) -> None:
    """An edited concepts.csv: differences and their cost first."""
    from flows.steps.concept_sheet import read_concept_sheet

    console = context.console
    with context.run.lock():
        sheet = read_concept_sheet(context, file)
        for line in sheet.preview():
            console.say(line)
        if sheet.n_changed and not yes and not typer.confirm("Take these?", err=True):
            raise typer.Exit(ExitCode.RESUMABLE)
        if sheet.n_changed:
            sheet.take()
    console.say(f"{sheet.n_changed} changes taken.")
    if sheet.n_changed:
        console.say(f"next:    medmicn annotate {context.source} --run {context.run.path}   (asks only what is new)")
    OUTCOME.content["imported"] = {"changed": sheet.n_changed, "asked_again": list(sheet.edits.asked_again)}
    finish([], context.run)


@audit_app.command("draw")
def audit_draw(
    cells: Annotated[int, typer.Option("--cells", min=1, help="Cells (image, concept) the expert is asked for.")] = 200,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sample.")] = 0,
    more: Annotated[
        bool, typer.Option("--more", help="Add cells of the concepts that the answers so far leave undecided.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Replace a sheet that has answers in it.")] = False,
    run: RunFlag = None,
    config: ConfigFlag = None,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Choose cells for an expert and write audit.csv, blind to what the machine said.

    Give the sheet to a second expert as a copy; `audit score --sheet COPY.csv --reviewer NAME` reads it.
    """
    console = open_console(quiet=quiet, as_json=as_json)
    context = existing_context(run, config, {}, console)
    if more and again:
        raise ConfigurationError("audit draw: expected --more (keep the sheet) or --again (replace it), got both.")
    with context.run.lock():
        n_cells = draw_audit(context, cells, seed, again=again, more=more)
    console.say(f"{n_cells} cells: {context.run.audit_path}; fill the column 'answer' with present or absent.")
    console.say(f"next:    medmicn review --run {context.run.path} (audit page), then medmicn audit score")
    OUTCOME.content["cells"] = n_cells
    finish([], context.run)


@audit_app.command("score")
def audit_score(
    reviewer: Annotated[str, typer.Option("--reviewer", help="Who filled the sheet.")] = "expert",
    sheet: Annotated[
        Path | None, typer.Option("--sheet", metavar="FILE.csv", help="A filled copy of audit.csv, say a colleague's.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Take the valid rows; list the others in audit_rejected.csv.")
    ] = False,
    ordinal: Annotated[
        list[str] | None,
        typer.Option("--ordinal", metavar="GROUP[=linear]", help="A group whose values form a scale (may repeat)."),
    ] = None,
    run: RunFlag = None,
    config: ConfigFlag = None,
    assignments: SetFlag = None,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Read audit.csv back: agreement of every witness with the expert, with intervals, and what to do."""
    console = open_console(quiet=quiet, as_json=as_json)
    context = existing_context(run, config, flags_of(assignments), console)
    with context.run.lock():
        found = score_audit(context, reviewer, sheet=sheet, partial=partial, ordinal=_scales(ordinal or []))
    console.say(found.scores.to_string(index=False, float_format="{:.2f}".format))
    if len(found.experts):
        console.say(found.experts.to_string(index=False, float_format="{:.2f}".format))
    if len(found.disputed):
        console.say(f"{len(found.disputed)} cells are disputed among experts: {AUDIT_DISPUTED_CSV}")
    if found.n_rejected:
        console.say(f"{found.n_rejected} rows were left out: {AUDIT_REJECTED_CSV} says why")
    OUTCOME.content["audit"] = found.scores.to_dict(orient="records")
    OUTCOME.content["experts"] = found.experts.to_dict(orient="records")
    OUTCOME.content["answers"] = {
        "taken": found.n_answers,
        "rejected": found.n_rejected,
        "disputed": len(found.disputed),
    }
    console.say(f"next:    medmicn fuse --run {context.run.path}   (labels that use the expert's answers)")
    finish([], context.run)


def _scales(names: list[str]) -> dict[str, Scale]:
    """Group → how far apart two of its values are, from `GROUP` or `GROUP=linear`."""
    try:
        return dict(scale_of(name) for name in names)
    except ValueError as error:
        raise ConfigurationError(f"--ordinal: {error}.") from error


def serve_locally(app: object, port: int, started: Callable[[str], None]) -> None:
    """Serve an ASGI application on 127.0.0.1 until interrupted; `started` is told the address once it listens."""
    import socket

    import uvicorn

    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigurationError(
                f"--port: expected a free port on 127.0.0.1, {port} is not ({error.strerror}).",
                remedy="Choose another, or 0 for any free one.",
            ) from error
        started(f"http://127.0.0.1:{listener.getsockname()[1]}")
        # No access log: it would repeat the token.
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))  # type: ignore[arg-type]
        server.run(sockets=[listener])
