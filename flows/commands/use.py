"""Verbs around a trained model and this machine: predict, compare, doctor, config, embedded-vlm."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_contracts.errors import ExitCode
from data_contracts.store import RunFolder
from flows.commands.common import (
    OUTCOME,
    RUNS_FOLDER,
    ConfigFlag,
    JsonFlag,
    QuietFlag,
    RunFlag,
    SetFlag,
    existing_context,
    existing_run,
    finish,
    flags_of,
    open_console,
    settings_for,
)
from flows.commands.labels import serve_locally
from flows.console import Console
from flows.offline import enforce
from flows.settings import documentation, resolve

if TYPE_CHECKING:
    # It opens the vision-language half: `medmicn --help` must not wait for that.
    from flows.doctor import Check

_WIDTH = 100
"""Columns of explanations."""


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("predict", rich_help_panel="Use the model")(predict)
    app.command("compare", rich_help_panel="Use the model")(compare)
    app.command("doctor", rich_help_panel="Try it")(doctor)
    app.command("config", rich_help_panel="Try it")(config_keys)
    app.command("embedded-vlm", rich_help_panel="Try it")(embedded_vlm)


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES…", help="Image files or folders of images.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for predictions.csv, .parquet and maps.")] = Path(
        "predictions"
    ),
    maps: Annotated[bool, typer.Option("--maps/--no-maps", help="Draw class and concept maps as PNG.")] = True,
    run: RunFlag = None,
    config: ConfigFlag = None,
    assignments: SetFlag = None,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Class, concept scores, rule and maps for new images, with the model of a run.

    Any number of images, DICOM among them: the same command goes on where it was stopped, and a file that cannot be
    read is listed in left_out.csv. Maps are named by a hash of the file's bytes and hold nothing but pixels.
    """
    console = open_console(quiet=quiet, as_json=as_json)
    context = existing_context(run, config, flags_of(assignments), console)
    from flows.prediction import predict_files

    result = predict_files(context, images, out, with_maps=maps)
    for row in result.rows[:10]:
        concepts = ", ".join(row["top_concepts"])
        uncertain = f" - {row['rejected']}" if row["rejected"] else ""
        console.say(
            f"{row['path']}: {row['class']} ({row['probability']:.2f}){uncertain}\n    {row['rule']}\n    {concepts}"
        )
    if result.n_predicted > 10:
        console.say(f"… and {result.n_predicted - 10} more in {out / 'predictions.csv'}")
    for path, reason in result.rejected[:10]:
        console.warn(f"{path} was left out: {reason}")
    if result.n_left_out > 10:
        console.warn(f"{result.n_left_out} files were left out: {out / 'left_out.csv'}")
    if result.n_uncertain:
        console.say(f"{result.n_uncertain} of {result.n_predicted} are too uncertain to be given a class")
    if result.n_reused:
        console.say(f"{result.n_reused} were predicted before, and are kept")
    console.say(f"written: {out / 'predictions.csv'}" + (f", maps in {out / 'maps'}" if maps else ""))
    OUTCOME.content["predictions"] = result.rows
    OUTCOME.content["predictions_rejected"] = [{"path": str(p), "reason": reason} for p, reason in result.rejected]
    OUTCOME.content["predictions_counts"] = {
        "predicted": result.n_predicted,
        "reused": result.n_reused,
        "uncertain": result.n_uncertain,
        "left_out": result.n_left_out,
    }
    finish([], context.run)
    if not result.n_predicted:
        raise typer.Exit(ExitCode.INPUT_REFUSED)


def compare(
    systems: Annotated[
        str | None, typer.Option("--systems", help="Comma-separated names, or 'all'. Default: the preset's, else all.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            help="'clean' (epoch chosen on validation images), 'paper' (as published: on the test images; their "
            "optimism stands beside the numbers) or 'both'. Default: the preset's, else clean.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", help="loss-ablation, filter-ablation, fusion or paper-table: the paper's comparisons."
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="System that the others are tested against. Default: the first.")
    ] = None,
    unfiltered: Annotated[
        Path | None,
        typer.Option("--unfiltered", metavar="DIR", help="For filter-ablation: the same images with all concepts."),
    ] = None,
    run: RunFlag = None,
    config: ConfigFlag = None,
    assignments: SetFlag = None,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Med-MICN and other systems side by side: one data set, the same splits and seeds, intervals and paired tests."""
    console = open_console(quiet=quiet, as_json=as_json)
    context = existing_context(run, config, flags_of(assignments), console)
    from flows.comparison import Request, as_markdown, compare_systems

    with context.run.lock():
        found = compare_systems(context, Request(systems, protocol, preset, reference, unfiltered))
    console.say(as_markdown(found, title="Systems side by side"))
    console.say(f"written: {context.run.path / 'comparison.csv'}, comparison_pairs.csv and comparison.md beside it")
    OUTCOME.content["systems"] = found.table.to_dict(orient="records")
    OUTCOME.content["pairs"] = found.pairs.to_dict(orient="records")
    finish([], context.run)


def doctor(
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Send a few test questions about drawn pictures to every endpoint now."),
    ] = False,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="DIR", help="Examine what this run is made with. Default: what is configured."),
    ] = None,
    config: ConfigFlag = None,
    assignments: SetFlag = None,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """What works on this machine and what is missing, with the remedy.

    Of a configured vision-language model it shows whether its address answers and lists it, key, price, tokens of an
    image, and what the last probe found. With --probe it is asked a few questions about drawn pictures: does it see
    them, does it keep the schema? None of your images is sent.
    """
    console = open_console(quiet=quiet, as_json=as_json)
    flags = flags_of(assignments)
    if run is None:
        paths = sorted(RUNS_FOLDER.glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        runs, settings = [RunFolder(path.parent) for path in paths], enforce(resolve(config, flags))
    else:
        runs = [existing_run(run)]
        settings = settings_for(runs[0], config, flags)
    from flows.doctor import examine

    found: list[Check] = []
    endpoint = ""
    for check in examine(settings, runs, console, probing=probe):
        if check.endpoint != endpoint:
            endpoint = check.endpoint
            console.title(f"vision-language model {endpoint}")
        _say_check(check, console)
        found.append(check)
    OUTCOME.content["checks"] = [check._asdict() for check in found]
    faults = [check.name for check in found if check.needed and not check.works]
    if faults:
        console.warn(f"needed, and does not work: {', '.join(faults)}")
        console.say("next:    mend what is marked ✗, then medmicn doctor again")
        raise typer.Exit(ExitCode.FAILED)
    console.say("next:    medmicn run FOLDER, or medmicn demo")


def _say_check(check: Check, console: Console) -> None:
    mark = "✓" if check.works else "✗" if check.needed else "–"
    first, *more = check.finding.splitlines()
    console.say(f"{mark} {check.name:<22} {first}")
    for line in more:
        console.say(f"{'':<25}{line}")
    if check.remedy and not check.works:
        console.say(f"    {check.remedy}")


def config_keys(as_json: JsonFlag = False) -> None:
    """Every configuration key with its default and meaning; `medmicn.toml` may hold any of them."""
    console = open_console(quiet=False, as_json=as_json)
    console.say("Every key with its default; none: the key is left out.")
    section = ""
    for name, default, meaning in documentation():
        if name.split(".")[0] != section:
            section = name.split(".")[0]
            console.title(f"[{section}]")
        console.say(f"  {name.split('.')[1]} = {default}")
        console.say(
            textwrap.fill(meaning, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
        )
    OUTCOME.content["keys"] = [{"key": k, "default": d, "meaning": m} for k, d, m in documentation()]


def embedded_vlm(
    port: Annotated[int, typer.Option("--port", help="Port on 127.0.0.1; 0 takes a free one.")] = 8765,
    quiet: QuietFlag = False,
) -> None:
    """Serve the embedded model over HTTP, for other programs that speak chat completions.

    It answers from image measurements only: colour, brightness, size, shape, symmetry, texture, distribution.
    """
    console = open_console(quiet=quiet, as_json=False)
    from annotation.vlm.embedded import create_app

    serve_locally(create_app(), port, lambda address: console.say(f"listening on {address}/v1; Ctrl-C ends it."))
