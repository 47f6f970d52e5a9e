"""Verbs that take a SOURCE: run, annotate, estimate, schedule."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from data_contracts.errors import ConfigurationError, ExitCode
from data_contracts.store import RunFolder
from flows.chain import Context, StepReport, execute
from flows.commands.common import (
    OUTCOME,
    ConfigFlag,
    JsonFlag,
    ModalityFlag,
    QuietFlag,
    RunFlag,
    SetFlag,
    SourceArgument,
    YesFlag,
    finish,
    flags_of,
    new_run,
    open_console,
    settings_for,
)
from flows.commands.spending import confirmed, may_cost_money, show_estimate
from flows.console import Console
from flows.settings import Settings
from flows.steps import INGEST, LAST_ANNOTATION_STEP, STEPS, begin, chain_for, require_source

BaseUrlFlag = Annotated[
    str | None,
    typer.Option("--base-url", help="OpenAI-compatible endpoint, such as http://localhost:11434/v1, or 'embedded'."),
]
ModelFlag = Annotated[str | None, typer.Option("--model", help="Vision-language model as the endpoint names it.")]
ConceptsFlag = Annotated[
    Path | None, typer.Option("--concepts", metavar="FILE", help="Your own concepts instead of proposed ones.")
]
AlignerFlag = Annotated[
    str | None, typer.Option("--aligner", help="'embedded', hf-hub:…, local-dir:… or an open_clip name.")
]
BackboneFlag = Annotated[str | None, typer.Option("--backbone", help="'embedded' or any timm name.")]
LogicFlag = Annotated[str | None, typer.Option("--logic", help="Rule layer: 'paper' or 'dcr'.")]
CostFlag = Annotated[float | None, typer.Option("--max-cost-usd", help="Hard cap on money; the run stops resumable.")]
OfflineFlag = Annotated[
    bool, typer.Option("--offline", help="Refuse every connection to another machine, whoever asks for it.")
]
RequestsFlag = Annotated[int | None, typer.Option("--max-requests", help="Hard cap on requests.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("run", rich_help_panel="Main job")(run)
    app.command("annotate", rich_help_panel="Main job")(annotate)
    app.command("estimate", rich_help_panel="Main job")(estimate)
    app.command("schedule", rich_help_panel="Main job")(schedule)


def run(
    source: SourceArgument,
    modality: ModalityFlag = None,
    base_url: BaseUrlFlag = None,
    model: ModelFlag = None,
    concepts: ConceptsFlag = None,
    aligner: AlignerFlag = None,
    backbone: BackboneFlag = None,
    logic: LogicFlag = None,
    max_cost_usd: CostFlag = None,
    max_requests: RequestsFlag = None,
    offline: OfflineFlag = False,
    run: RunFlag = None,
    config: ConfigFlag = None,
    assignments: SetFlag = None,
    yes: YesFlag = False,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Everything, once: images in, concept labels, classifier and report out.

    Nothing needs to be configured: without --base-url the embedded model proposes concepts and labels images
    from measurements, on this machine. Give the same command again after a stop, or when images were added:
    it does only what is missing.

    \b
    Examples:
      medmicn run photos/ --modality "clinical photographs of skin"
      medmicn run photos/ --base-url http://localhost:11434/v1 --model qwen2.5vl
    """
    flags = flags_of(
        assignments,
        source__modality=modality,
        vlm__base_url=base_url,
        vlm__model=model,
        concepts__file=concepts,
        align__model=aligner,
        train__backbone=backbone,
        train__logic=logic,
        vlm__max_cost_usd=max_cost_usd,
        vlm__max_requests=max_requests,
        privacy__offline=offline or None,
    )
    console = open_console(quiet=quiet, as_json=as_json)
    folder = new_run(source, run)
    run_source(source, folder, settings_for(folder, config, flags), console, yes=yes)


def annotate(
    source: SourceArgument,
    modality: ModalityFlag = None,
    base_url: BaseUrlFlag = None,
    model: ModelFlag = None,
    concepts: ConceptsFlag = None,
    aligner: AlignerFlag = None,
    max_cost_usd: CostFlag = None,
    max_requests: RequestsFlag = None,
    offline: OfflineFlag = False,
    run: RunFlag = None,
    config: ConfigFlag = None,
    assignments: SetFlag = None,
    yes: YesFlag = False,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """The steps up to labels, with the price shown first; works on unlabelled folders too."""
    flags = flags_of(
        assignments,
        source__modality=modality,
        vlm__base_url=base_url,
        vlm__model=model,
        concepts__file=concepts,
        align__model=aligner,
        vlm__max_cost_usd=max_cost_usd,
        vlm__max_requests=max_requests,
        privacy__offline=offline or None,
    )
    console = open_console(quiet=quiet, as_json=as_json)
    folder = new_run(source, run)
    require_source(source, folder)
    settings = settings_for(folder, config, flags)
    with folder.lock():
        context = Context(begin(source, folder), settings, console)
        reports = confirmed(context, yes=yes)
        for step in chain_for(context, LAST_ANNOTATION_STEP):
            if step.name not in {report.name for report in reports}:
                reports.append(execute(step, context))
        reports.append(execute(STEPS["report"], context))
    _say_results(context)
    finish(reports, folder)


def estimate(
    source: SourceArgument,
    base_url: BaseUrlFlag = None,
    model: ModelFlag = None,
    max_cost_usd: CostFlag = None,
    max_requests: RequestsFlag = None,
    offline: OfflineFlag = False,
    run: RunFlag = None,
    config: ConfigFlag = None,
    assignments: SetFlag = None,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Requests, tokens, price and time before anything is sent; reads the images, asks nothing."""
    flags = flags_of(
        assignments,
        vlm__base_url=base_url,
        vlm__model=model,
        vlm__max_cost_usd=max_cost_usd,
        vlm__max_requests=max_requests,
        privacy__offline=offline or None,
    )
    console = open_console(quiet=quiet, as_json=as_json)
    folder = new_run(source, run)
    require_source(source, folder)
    settings = settings_for(folder, config, flags)
    with folder.lock():
        context = Context(begin(source, folder), settings, console)
        reports = [execute(INGEST, context)]
        show_estimate(context)
    console.say(f"next:    medmicn annotate {source} --run {folder.path}   (with the same flags)")
    finish(reports, folder)


def schedule(
    source: SourceArgument,
    cron: Annotated[str | None, typer.Option("--cron", help="Cron expression, such as '0 2 * * *'.")] = None,
    every: Annotated[str | None, typer.Option("--every", help="Interval, such as 15m, 2h or 1d.")] = None,
    once: Annotated[bool, typer.Option("--once", help="One such run now, and no schedule.")] = False,
    run: RunFlag = None,
    config: ConfigFlag = None,
    assignments: SetFlag = None,
    yes: YesFlag = False,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Repeat the run by the clock: each time only what is new or changed is handled.

    Uses the Prefect server that PREFECT_API_URL names, else one of its own on 127.0.0.1, which it finds or starts and
    which goes on afterwards. Training happens when a condition of [schedule] holds, never on drifted images without
    `medmicn approve`, and a new model takes over only if it is not worse. Files that are still being copied wait.

    \b
    Examples:
      medmicn schedule photos/ --every 15m
      medmicn schedule photos/ --once      (for cron or a systemd timer; exit code 4 when a person is asked)
      medmicn schedule photos/ --cron "0 2 * * *" --set schedule.retrain_after_new_images=500
    """
    console = open_console(quiet=quiet, as_json=as_json)
    if (cron is not None) + (every is not None) + once != 1:
        raise ConfigurationError("schedule: expected exactly one of --cron, --every and --once.")
    from flows.scheduling import serve as schedules

    interval: timedelta | None = schedules.parse_interval(every) if every else None
    cron = schedules.checked_cron(cron) if cron else None
    folder = new_run(source, run)
    require_source(source, folder)
    settings = settings_for(folder, config, flags_of(assignments))
    if may_cost_money(settings) and not yes:
        raise ConfigurationError(
            "schedule: a scheduled run cannot ask before it spends money.",
            remedy="Give --yes, and caps: --set vlm.max_cost_usd=… or vlm.max_requests=….",
        )
    if once:
        _run_once(source, folder, settings, console)
        return
    console.say(
        f"schedule: {source} → {folder.path}, {'cron ' + cron if cron else 'every ' + str(every)}; Ctrl-C ends."
    )
    schedules.serve(source, folder, settings, console, cron=cron, every=interval)


def run_source(
    source: Path, folder: RunFolder, settings: Settings, console: Console, *, yes: bool, synthetic: bool = False
) -> None:
    """The whole chain as one Prefect flow; a finished run is recognised without starting Prefect."""
    from flows.scheduling.rounds import everything, is_everything_fresh, put_right

    require_source(source, folder)
    with folder.lock():
        context = Context(begin(source, folder, synthetic=synthetic), settings, console)
        reports = confirmed(context, yes=yes)
        put_right(context)
        if is_everything_fresh(context):
            reports = everything(context, execute).reports
            console.say("Nothing new: every step's result still holds.")
        else:
            console.say("starting Prefect (up to a minute when cold) …")
            reports = _reports(as_flow(source, folder, settings))
    _say_results(context)
    finish(reports, folder)


def as_flow(source: Path, folder: RunFolder, settings: Settings, *, unattended: bool = False) -> dict[str, Any]:
    """The result of one flow run, with the Prefect server that is configured or with one for this command."""
    from flows import prefect_server

    server = prefect_server.begin()
    from flows.annotate_then_train import flow_for

    if server is not None:
        server.wait_until_healthy()
    state = flow_for(settings)(
        source=str(source.resolve()),
        run=str(folder.path.resolve()),
        config=settings.model_dump(mode="json"),
        unattended=unattended,
        return_state=True,
    )
    result: dict[str, Any] = state.result()
    return result


def _reports(result: dict[str, Any]) -> list[StepReport]:
    return [StepReport(**report) for report in result["steps"]]


def _run_once(source: Path, folder: RunFolder, settings: Settings, console: Console) -> None:
    """One unattended run, for another clock than Prefect's; exit code 4 when it could not do everything."""
    console.say("starting Prefect (up to a minute when cold) …")
    result = as_flow(source, folder, settings, unattended=True)
    OUTCOME.content |= {"state": result["state"], "said": result["said"]}
    finish(_reports(result), folder)
    if result["state"] != "done":
        raise typer.Exit(ExitCode.RESUMABLE)


def _say_results(context: Context) -> None:
    run, say = context.run, context.console.say
    say()
    for row in _headline(run):
        say(row)
    if run.labels_csv_path.is_file():
        say(f"labels:  {run.labels_csv_path}")
    if run.report_path.is_file():
        say(f"report:  {run.report_path}   ← open this in a browser")
    say(f"next:    medmicn review --run {run.path}   (look at the labels and correct them)")


def _headline(run: RunFolder) -> list[str]:
    from flows.summary import metric_table

    shown = {"accuracy": "accuracy", "macro_f1": "macro F1", "auroc": "AUROC", "concept_auroc": "concept AUROC"}
    rows = {row["metric"]: row for row in metric_table(run)}
    parts = [f"{label} {_spread(rows[name])}" for name, label in shown.items() if name in rows]
    return ["test:    " + ", ".join(parts)] if parts else []


def _spread(row: dict[str, Any]) -> str:
    return f"{row['mean']:.3f}" + ("" if row["sd"] is None else f" ± {row['sd']:.3f}")
