"""The demo: generated images, the whole chain, and how well its labels agree with the known truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from data_contracts.spreadsheet import write_csv
from data_contracts.store import RunFolder
from flows.chain import Context, execute
from flows.commands.common import OUTCOME, JsonFlag, QuietFlag, open_console
from flows.commands.run import run_source
from flows.console import Console
from flows.offline import enforce
from flows.settings import resolve
from flows.steps import STEPS

_MODALITY = "synthetic lesion phantoms (generated, no patient)"
DEMO_FOLDER = Path("demo")


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("demo", rich_help_panel="Try it")(demo)


def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where generated images and the run go.")] = DEMO_FOLDER,
    n_images: Annotated[int, typer.Option("--images", min=60, help="Images to generate.")] = 300,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the generator.")] = 0,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Try everything with nothing configured: synthetic lesion phantoms, labelled, learned and explained.

    No key, no network, no GPU. The images are generated and say so; their concepts are known, so the demo can
    print how well its labels agree with the truth. The truth is used for nothing else.
    """
    console = open_console(quiet=quiet, as_json=as_json)
    images = folder / "phantoms" / "images"
    _generate(images.parent, n_images, seed, console)
    run = RunFolder(folder / "phantom-run")
    stored = run.read_manifest().config if run.exists else None
    settings = enforce(resolve(None, {"source.modality": _MODALITY}, stored))
    run_source(images, run, settings, console, yes=False, synthetic=True)
    _say_truth(run, images.parent / "truth.csv", console)
    # Once more, for the page to hold the agreement with the truth.
    execute(STEPS["report"], Context(run, settings, Console(quiet=True)))
    console.say(f"\nopen the report:  {run.report_path}")


def _generate(folder: Path, n_images: int, seed: int, console: Console) -> None:
    truth = folder / "truth.csv"
    if truth.is_file() and len(pd.read_csv(truth)) == n_images:
        return
    from pipeline.phantoms import make_phantoms

    console.title(f"▸ Generating {n_images} synthetic lesion phantoms in {folder}")
    make_phantoms(folder, n_images=n_images, seed=seed)


def _say_truth(run: RunFolder, truth_csv: Path, console: Console) -> None:
    from flows.truth import compare_with_truth, read_truth

    table = compare_with_truth(run, read_truth(truth_csv))
    write_csv(run.path / "truth_agreement.csv", table)
    known = table.dropna(subset=["kappa"])
    console.say("\nagreement of labels with the known truth (Cohen's kappa; synthetic images):")
    for row in known.itertuples():
        console.say(f"  {row.concept:<28} {row.kappa:5.2f}   n {row.n:.0f}, abstained {row.abstained_fraction:.0%}")
    unknown = table[table["kappa"].isna()]["concept"].tolist()
    if unknown:
        console.say(f"  without a known truth: {', '.join(unknown)}")
    mean = float(known["kappa"].mean())
    console.say(f"  {'mean':<28} {mean:5.2f}   over {len(known)} concepts")
    OUTCOME.content["truth_agreement"] = {"mean_kappa": mean, "concepts": known.to_dict(orient="records")}
