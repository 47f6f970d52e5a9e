"""`medmicn compare`: what it asks for, what it writes, and what it will not write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_contracts.errors import ConfigurationError, ContractViolation
from data_contracts.spreadsheet import read_csv
from data_contracts.store import RunFolder
from flows.chain import Context, execute
from flows.cli import main
from flows.compared import systems_for_report
from flows.comparison import Request, as_markdown, compare_systems, write_comparison
from flows.console import Console
from flows.settings import restored
from flows.steps import begin
from flows.steps.fuse import FUSE
from flows.steps.images import INGEST
from flows.steps.learn import DATASET
from model.tabulate import Comparison
from tests.model.conftest import Squares

SETTINGS = {"train": {"image_size_px": 64, "epochs": 2, "seeds": [0, 1]}}


def run_of(folder: Path, concepts: tuple[str, ...]) -> Context:
    """Coloured squares with these given concepts, up to the aligned data set; patients have two images each."""
    squares = Squares(72)
    source = folder / "source"
    if not source.is_dir():
        source.mkdir(parents=True)
        for n, image_id in enumerate(squares.ids):
            Image.fromarray(squares(image_id)).save(source / f"{n:03d}.png")
    frame = pd.DataFrame({"path": [f"{n:03d}.png" for n in range(72)], "label": [i.split("-")[0] for i in squares.ids]})
    frame["split"] = [["train", "train", "val", "test"][n // 6 % 4] for n in range(72)]
    frame["patient_id"] = [f"p{n // 6}-{n % 3}" for n in range(72)]
    for name in concepts:
        frame[name] = getattr(squares, name).astype(int)
    frame.to_csv(source / "labels.csv", index=False)
    context = Context(RunFolder(folder / f"run-{len(concepts)}"), restored(SETTINGS), Console(quiet=True))
    begin(source, context.run, context.settings)
    for step in (INGEST, FUSE, DATASET):
        execute(step, context)
    return context


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return run_of(tmp_path_factory.mktemp("comparison"), ("reddish", "stripes"))


@pytest.fixture(scope="module")
def comparison(context: Context) -> Comparison:
    return compare_systems(context, Request("black-box,joint-cbm,med-micn-dcr", "both", reference="joint-cbm"))


def test_three_files_are_written(context: Context, comparison: Comparison) -> None:
    folder = context.run.path
    pd.testing.assert_frame_equal(read_csv(folder / "comparison.csv"), comparison.table, check_dtype=False)
    pairs = read_csv(folder / "comparison_pairs.csv")
    assert set(pairs["reference"]) == {"joint-cbm"}
    assert set(pairs["system"]) == {"black-box", "med-micn-dcr"}
    assert {"difference", "low", "high", "p", "p_holm"} <= set(pairs)
    page = (folder / "comparison.md").read_text()
    assert "18 test images of 9 patients" in page
    assert "bootstrap resamples" in page


def test_each_number_of_the_page_is_that_of_the_table_with_its_optimism_beside_it(comparison: Comparison) -> None:
    clean, paper = as_markdown(comparison, title="x").split("## Protocol `paper`")
    for row in comparison.table.to_dict("records"):
        page = paper if row["protocol"] == "paper" else clean
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {row['system']} |")]
        assert f"{row['macro_f1']:.3f} ± {row['macro_f1_sd']:.3f}" in line
        assert f"[{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]" in line
        assert line.count("optimism") == (2 if row["protocol"] == "paper" else 0)
        if row["protocol"] == "paper":
            assert f"(optimism {row['optimism_macro_f1']:+.3f})" in line


def test_a_number_without_its_optimism_is_not_written(comparison: Comparison, tmp_path: Path) -> None:
    unmarked = replace(comparison, table=comparison.table.assign(optimism_accuracy=np.nan))
    with pytest.raises(ContractViolation, match="optimism"):
        write_comparison(tmp_path, unmarked, title="x")
    assert not list(tmp_path.iterdir())


def test_the_report_marks_numbers_that_were_chosen_on_test_images(comparison: Comparison, tmp_path: Path) -> None:
    write_comparison(tmp_path, comparison, title="x")
    shown = systems_for_report(tmp_path / "comparison.csv")
    assert shown is not None
    assert "macro_f1_low" not in shown
    for name, row in zip(shown["system"], comparison.table.to_dict("records"), strict=True):
        assert name.startswith(row["system"])
        assert (f"optimism {row['optimism_macro_f1']:+.3f}" in name) == (row["protocol"] == "paper")
    assert systems_for_report(tmp_path / "none.csv") is None


def test_what_cannot_be_asked_for_is_refused(context: Context) -> None:
    with pytest.raises(ConfigurationError, match="clean, paper or both"):
        compare_systems(context, Request("black-box", "honest"))
    with pytest.raises(ConfigurationError, match="med-micn-dcr"):
        compare_systems(context, Request("gpt"))
    with pytest.raises(ConfigurationError, match="loss-ablation"):
        compare_systems(context, Request(preset="everything"))
    with pytest.raises(ConfigurationError) as refused:
        compare_systems(context, Request(preset="filter-ablation"))
    assert "--unfiltered" in str(refused.value.remedy)


def test_the_filter_ablation_takes_a_second_run_folder(context: Context) -> None:
    everything = run_of(context.run.path.parent, ("reddish", "stripes", "bright"))
    request = Request("black-box,joint-cbm", preset="filter-ablation", unfiltered=everything.run.path)
    found = compare_systems(context, request)
    assert found.table["system"].tolist() == ["black-box", "joint-cbm (kept 2)", "joint-cbm (all 3)"]


def test_a_preset_is_a_set_of_rows_of_which_some_can_be_chosen(context: Context) -> None:
    found = compare_systems(context, Request("no extra loss,both losses", preset="loss-ablation"))
    assert found.table["system"].tolist() == ["no extra loss", "both losses"]
    assert (context.run.path / "comparison.md").read_text().startswith("# Loss terms of Med-MICN")


def test_the_command_says_the_page_and_gives_the_tables(context: Context, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", "--run", str(context.run.path), "--systems", "black-box,joint-cbm", "--json"]
    arguments += ["--set", "train.epochs=2", "--set", "train.seeds=[0, 1]", "--set", "train.image_size_px=64"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    outcome = json.loads(printed.out)
    assert [row["system"] for row in outcome["systems"]] == ["black-box", "joint-cbm"]
    assert outcome["pairs"][0]["reference"] == "black-box"
    assert "Protocol `clean`" in printed.err
