"""The main job, for real: generated images, the Prefect flow, embedded models, and what people do afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_contracts.store import RunFolder
from data_contracts.tables import State, Witness
from flows.truth import compare_with_truth, read_truth
from pipeline.phantoms import make_phantoms
from tests.flows.conftest import N_IMAGES, Ended, Finished, environment

Medmicn = Callable[..., Ended]


# ---- what a run leaves ---------------------------------------------------------------------------------------


def test_every_table_of_the_run_keeps_its_contract(finished: Finished) -> None:
    run = finished.run
    images, vocabulary = run.read_images(), run.vocabulary()
    n_cells = N_IMAGES * len(vocabulary)
    assert len(images) == N_IMAGES
    assert len(run.read_labels()) == n_cells
    assert len(run.read_alignment_scores()) == n_cells
    assert set(run.read_judgements()["witness"]) == {Witness.VLM}
    assert len(run.read_judgements()) == n_cells
    dataset = run.read_dataset()
    assert dataset.concepts.shape == (N_IMAGES, len(vocabulary))
    assert {"train", "val", "test"} == set(dataset.frame["split"])


def test_labels_agree_with_what_was_drawn(finished: Finished) -> None:
    table = compare_with_truth(finished.run, read_truth(finished.truth))
    assert table["kappa"].count() >= 5
    assert table["kappa"].mean() >= 0.7


def test_the_classifier_is_better_than_chance_and_reports_its_spread(finished: Finished) -> None:
    metrics = json.loads((finished.run.model_dir / "metrics.json").read_text())
    accuracy = metrics["test"]["over_seeds"]["accuracy"]
    assert accuracy["mean"] > 0.45
    assert accuracy["sd"] >= 0
    assert metrics["test"]["n_images"] == (finished.run.read_dataset().frame["split"] == "test").sum()


def test_rules_and_maps_are_there(finished: Finished) -> None:
    rules = pd.read_csv(finished.run.explanations_dir / "rules.csv", encoding="utf-8-sig")
    assert set(rules["class"]) <= {"phantom A", "phantom B", "phantom C"}
    assert rules["fidelity"].between(0, 1).all()
    maps = pd.read_csv(finished.run.explanations_dir / "maps.csv", encoding="utf-8-sig")
    assert len(maps)
    for name in maps["file"]:
        assert np.asarray(Image.open(finished.run.explanations_dir / name)).std() > 0


def test_the_report_is_one_file_without_requests(finished: Finished) -> None:
    page = finished.run.report_path.read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert len(page) < 10_000_000
    assert all(name in page for name in finished.run.vocabulary().names)


def test_the_json_object_holds_what_scripts_need(finished: Finished) -> None:
    outcome = finished.ended.outcome
    assert outcome["counts"]["images"] == N_IMAGES
    assert outcome["rejected"] == {}
    assert outcome["exit_code"] == 0
    assert outcome["steps"]["judge"]["counts"]["requests"] == N_IMAGES
    assert all(step["seconds"] >= 0 for step in outcome["steps"].values())
    assert Path(outcome["files"]["report"]).is_file()


def test_the_manifest_records_versions_settings_and_receipts(finished: Finished) -> None:
    manifest = finished.run.read_manifest()
    assert manifest.versions["torch"]
    assert manifest.config["train"]["seeds"] == [0, 1]
    assert set(manifest.steps) == {
        *("ingest", "concepts", "judge", "align", "fuse", "dataset"),
        *("train", "promote", "baseline", "explain", "report"),
    }
    assert all(finished.run.holds(step.outputs) for step in manifest.steps.values())


def test_no_file_name_and_no_class_reaches_the_journal(finished: Finished) -> None:
    text = "".join(path.read_text() for path in finished.run.journal_dir.rglob("*") if path.is_file())
    assert text
    assert "synthetic-0" not in text


# ---- doing it again ------------------------------------------------------------------------------------------


def test_a_finished_run_does_nothing_again(copy: Finished, medmicn: Medmicn) -> None:
    again = medmicn("run", copy.source, "--run", copy.run.path)
    assert again.exit_code == 0, again.messages
    assert all(step["reused"] for step in again.outcome["steps"].values())
    assert "Nothing new" in again.messages
    assert "starting Prefect" not in again.messages


def test_one_new_image_costs_one_request(copy: Finished, medmicn: Medmicn, tmp_path: Path) -> None:
    source = tmp_path / "images"
    shutil.copytree(copy.source, source)
    make_phantoms(tmp_path / "more", n_images=3, seed=99)
    new = next((tmp_path / "more" / "images" / "phantom A").glob("*.png"))
    shutil.copy(new, source / "phantom A" / "new.png")
    manifest = copy.run.read_manifest()
    manifest.source = str(source.resolve())
    copy.run.write_manifest(manifest)
    ended = medmicn("annotate", source, "--run", copy.run.path)
    assert ended.exit_code == 0, ended.messages
    assert ended.outcome["steps"]["judge"]["counts"]["requests"] == 1
    assert ended.outcome["steps"]["judge"]["counts"]["judged_before"] == N_IMAGES
    assert ended.outcome["steps"]["concepts"]["reused"]
    assert ended.outcome["counts"]["images"] == N_IMAGES + 1


def test_a_killed_run_goes_on_where_it_was(finished: Finished, medmicn: Medmicn, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "flows.cli", "annotate", str(finished.source), "--run", str(run)]
    killed = subprocess.Popen(command, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(lambda: _n_journal_lines(run) >= 20, limit_s=200)
        killed.send_signal(signal.SIGKILL)
    finally:
        killed.kill()
        killed.wait()
    n_paid = _n_journal_lines(run) - 6  # proposals, one for each class and each pair of them
    ended = medmicn("annotate", finished.source, "--run", run)
    assert ended.exit_code == 0, ended.messages
    counts = ended.outcome["steps"]["judge"]["counts"]
    assert counts["requests"] + counts["from_journal"] + counts["judged_before"] == N_IMAGES
    assert counts["requests"] <= N_IMAGES - n_paid + 1  # at most the torn last line is asked again
    assert len(RunFolder(run).read_labels()) == len(finished.run.read_labels())


def _n_journal_lines(run: Path) -> int:
    journal = run / "journal"
    files = [path for path in journal.rglob("*") if path.is_file()] if journal.is_dir() else []
    return sum(path.read_bytes().count(b"\n") for path in files)


def _wait_for(done: Callable[[], bool], *, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.fixture
def own_concepts(tmp_path: Path) -> Path:
    path = tmp_path / "concepts.csv"
    path.write_text("name,definition\nreddish colour,Red covers most of the lesion.\nlarge lesion,It is large.\n")
    return path


def test_a_cap_stops_the_run_and_the_same_command_goes_on(
    finished: Finished, medmicn: Medmicn, tmp_path: Path, own_concepts: Path
) -> None:
    command = ("annotate", finished.source, "--run", tmp_path / "run", "--concepts", own_concepts)
    stopped = medmicn(*command, "--max-requests", 50)
    assert stopped.exit_code == 4
    assert "cap of 50 requests" in stopped.outcome["error"]
    ended = medmicn(*command, "--max-requests", 50)
    assert ended.exit_code == 0, ended.messages
    counts = ended.outcome["steps"]["judge"]["counts"]
    assert counts["requests"] == N_IMAGES - 50


def test_an_endpoint_that_is_down_is_said_with_its_address(
    finished: Finished, medmicn: Medmicn, tmp_path: Path, own_concepts: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    ended = medmicn(
        *("annotate", finished.source, "--run", tmp_path / "run", "--concepts", own_concepts),
        *("--base-url", address, "--model", "some-vlm", "--set", "vlm.max_retries=0"),
    )
    assert ended.exit_code == 5
    assert address in ended.outcome["error"]


def test_an_interrupted_run_says_that_nothing_is_lost(finished: Finished, own_concepts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "flows.cli", "annotate", str(finished.source), "--run", str(run)),
        *("--concepts", str(own_concepts)),
    ]
    process = subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    try:
        _wait_for(lambda: _n_journal_lines(run) >= 5, limit_s=100)
        process.send_signal(signal.SIGINT)
        _, messages = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "nothing is lost" in messages


# ---- people correct ------------------------------------------------------------------------------------------


def test_a_corrected_spreadsheet_comes_back_as_the_experts_word(copy: Finished, medmicn: Medmicn) -> None:
    sheet = pd.read_csv(copy.run.labels_csv_path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    concept = copy.run.vocabulary().ids[0]
    image_id, before = sheet.loc[0, "image_id"], sheet.loc[0, concept]
    sheet.loc[0, concept] = "0" if before == "1" else "1"
    edited = copy.run.path.parent / "edited.csv"
    sheet.to_csv(edited, index=False)
    taken = medmicn("import-labels", edited, "--reviewer", "Dr A", "--yes", "--run", copy.run.path)
    assert taken.exit_code == 0, taken.messages
    assert taken.outcome["imported"]["changed"] == 1
    assert medmicn("fuse", "--run", copy.run.path).exit_code == 0
    labels = copy.run.read_labels().set_index(["image_id", "concept_id"])
    assert labels.loc[(image_id, concept), "decided_by"] == "expert"
    assert bool(labels.loc[(image_id, concept), "present"]) == (before != "1")


def test_a_wrong_sheet_is_refused_whole(copy: Finished, medmicn: Medmicn) -> None:
    sheet = pd.read_csv(copy.run.labels_csv_path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    concept = copy.run.vocabulary().ids[0]
    sheet.loc[0, concept], sheet.loc[1, concept] = "1", "maybe"
    edited = copy.run.path.parent / "edited.csv"
    sheet.to_csv(edited, index=False)
    refused = medmicn("import-labels", edited, "--reviewer", "Dr A", "--yes", "--run", copy.run.path)
    assert refused.exit_code == 3
    assert "maybe" in refused.outcome["error"]
    assert Witness.EXPERT not in set(copy.run.read_judgements()["witness"])


def test_an_audit_is_drawn_filled_and_scored(copy: Finished, medmicn: Medmicn) -> None:
    drawn = medmicn("audit", "draw", "--cells", 60, "--run", copy.run.path)
    assert drawn.exit_code == 0, drawn.messages
    sheet = copy.run.read_audit()
    assert len(sheet) == 60
    truth = read_truth(copy.truth).set_index("path")
    known = sheet["concept_id"].isin(truth.columns)
    answers = ["present" if truth.loc[row.path, row.concept_id] else "absent" for row in sheet[known].itertuples()]
    sheet.loc[known, "answer"] = answers
    sheet.to_csv(copy.run.audit_path, index=False)
    scored = medmicn("audit", "score", "--reviewer", "Dr B", "--run", copy.run.path)
    assert scored.exit_code == 0, scored.messages
    assert {row["concept_id"] for row in scored.outcome["audit"]} <= set(copy.run.vocabulary().ids)
    judged = copy.run.read_judgements()
    assert (judged["witness"] == Witness.EXPERT).sum() == known.sum()
    again = medmicn("audit", "draw", "--run", copy.run.path)
    assert again.exit_code == 2
    assert "answered already" in again.outcome["error"]


# ---- people use the model ------------------------------------------------------------------------------------


def test_predict_gives_class_concepts_rule_and_maps(finished: Finished, medmicn: Medmicn, tmp_path: Path) -> None:
    make_phantoms(tmp_path / "new", n_images=3, seed=7)
    (tmp_path / "new" / "images" / "broken.png").write_text("no image")
    out = tmp_path / "out"
    ended = medmicn("predict", tmp_path / "new" / "images", "--out", out, "--run", finished.run.path)
    assert ended.exit_code == 0, ended.messages
    table = pd.read_csv(out / "predictions.csv", encoding="utf-8-sig")
    assert len(table) == 3
    assert set(table["class"]) <= {"phantom A", "phantom B", "phantom C"}
    assert set(finished.run.vocabulary().ids) <= set(table.columns)
    assert len(list((out / "maps").glob("*.png"))) >= 3
    assert [row["reason"] for row in ended.outcome["predictions_rejected"]] == ["not_an_image"]


def test_predict_without_a_usable_image_is_refused(finished: Finished, medmicn: Medmicn, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no image")
    ended = medmicn("predict", tmp_path / "x.png", "--out", tmp_path / "out", "--run", finished.run.path)
    assert ended.exit_code == 3


# ---- other sources -------------------------------------------------------------------------------------------


def test_an_unlabelled_folder_gets_labels_and_no_classifier(medmicn: Medmicn, tmp_path: Path) -> None:
    make_phantoms(tmp_path, n_images=24, seed=5)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (tmp_path / "images").rglob("*.png"):
        shutil.copy(path, flat / path.name)
    ended = medmicn("annotate", flat, "--run", tmp_path / "run")
    assert ended.exit_code == 0, ended.messages
    run = RunFolder(tmp_path / "run")
    assert len(run.read_labels()) == 24 * len(run.vocabulary())
    assert run.report_path.is_file()
    refused = medmicn("train", "--run", run.path)
    assert refused.exit_code == 3


def test_given_labels_need_no_model(medmicn: Medmicn, tmp_path: Path) -> None:
    make_phantoms(tmp_path, n_images=45, seed=6)
    source, run = tmp_path / "images", RunFolder(tmp_path / "run")
    truth = read_truth(tmp_path / "truth.csv")
    truth.to_csv(tmp_path / "given.csv", index=False)
    assert medmicn("ingest", source, "--run", run.path).exit_code == 0
    taken = medmicn("import-labels", tmp_path / "given.csv", "--given", "--run", run.path)
    assert taken.exit_code == 0, taken.messages
    ended = medmicn("annotate", source, "--run", run.path)
    assert ended.exit_code == 0, ended.messages
    assert ended.outcome["steps"]["judge"]["counts"] == {"concepts_asked": 0}
    labels = run.read_labels()
    assert set(labels["decided_by"]) == {"given"}
    table = compare_with_truth(run, truth)
    assert (table["kappa"] == 1).all()
    assert set(run.read_judgements()["state"]) <= {State.PRESENT, State.ABSENT}


@pytest.mark.parametrize("prepare", ["empty", "no_images", "one_class"])
def test_a_useless_source_is_refused_with_a_reason(medmicn: Medmicn, tmp_path: Path, prepare: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if prepare == "no_images":
        (source / "notes.txt").write_text("nothing to see")
    if prepare == "one_class":
        (source / "only").mkdir()
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(source / "only" / "a.png")
        Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(source / "only" / "b.png")
    ended = medmicn("run", source, "--run", tmp_path / "run")
    assert ended.exit_code == 3, ended.messages
    assert str(source) in ended.outcome["error"] or "class" in ended.outcome["error"]


def test_a_run_folder_of_another_version_is_refused(copy: Finished, medmicn: Medmicn) -> None:
    content = json.loads(copy.run.manifest_path.read_text())
    copy.run.manifest_path.write_text(json.dumps(content | {"contract": "run/0"}))
    ended = medmicn("run", copy.source, "--run", copy.run.path)
    assert ended.exit_code == 3
    assert "run/0" in ended.outcome["error"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_run_folder_says_so(medmicn: Medmicn, finished: Finished, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir(mode=0o500)
    ended = medmicn("run", finished.source, "--run", place / "run")
    assert ended.exit_code == 5
    assert "--run" in ended.outcome["error"]
