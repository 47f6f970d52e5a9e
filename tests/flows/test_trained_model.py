"""A small trained run, without any vision-language model: evidence on it, its card, and its use on new files."""

from __future__ import annotations

import doctest
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

import flows.api
from data_contracts.errors import CheckpointRefused, ConfigurationError, ImageRejected, InputRefused
from data_contracts.spreadsheet import read_csv
from data_contracts.store import RunFolder
from flows import prediction
from flows.chain import Context, execute, is_fresh
from flows.console import Console
from flows.prediction import in_parts, predict_files
from flows.settings import restored
from flows.steps import begin
from flows.steps.card import DATA_SHEET, MODEL_CARD
from flows.steps.fuse import FUSE
from flows.steps.images import INGEST
from flows.steps.learn import DATASET, EXPLAIN, TRAIN
from flows.steps.maps import write_region_overlap
from flows.steps.pages import REPORT
from flows.steps.reliability import subgroup_columns
from flows.steps.robustness import write_robustness
from model.api import load
from tests.model.conftest import Squares

N_IMAGES = 120
SETTINGS = {
    "train": {"image_size_px": 64, "epochs": 8, "seeds": [0], "lambda_neural": 1.0},
    "explain": {"n_maps_per_class": 1, "n_map_evidence_images": 4, "reject_coverage": 0.8},
}


def context_of(run: RunFolder, **explain: object) -> Context:
    settings = SETTINGS | {"explain": SETTINGS["explain"] | explain}
    return Context(run, restored(settings), Console(quiet=True))


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Coloured squares with given concepts, through the real steps; patients have two images each."""
    folder = tmp_path_factory.mktemp("squares")
    squares = Squares(N_IMAGES)
    source = folder / "source"
    source.mkdir()
    rows = []
    for n, image_id in enumerate(squares.ids):
        Image.fromarray(squares(image_id)).save(source / f"{n:03d}.png")
        concepts = {"reddish": int(squares.reddish[n]), "stripes": int(squares.stripes[n])}
        split = ["train", "train", "val", "test"][n // 2 % 4]
        rows.append({"path": f"{n:03d}.png", "label": image_id.split("-")[0], "split": split} | concepts)
    pd.DataFrame(rows).assign(patient_id=[f"p{n // 2}" for n in range(N_IMAGES)]).to_csv(
        source / "labels.csv", index=False
    )
    pd.DataFrame({"path": [row["path"] for row in rows], "site": ["a", "b"] * (N_IMAGES // 2)}).to_csv(
        folder / "sites.csv", index=False
    )
    context = context_of(RunFolder(folder / "run"), subgroups=str(folder / "sites.csv"))
    begin(source, context.run, context.settings)
    for step in (INGEST, FUSE, DATASET, TRAIN, EXPLAIN, REPORT):
        execute(step, context)
    return context.run


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """New pictures, one of them no picture, one unreadable name."""
    squares = Squares(40)
    folder = tmp_path / "new"
    folder.mkdir()
    for n, image_id in enumerate(squares.ids):
        Image.fromarray(squares(image_id)).save(folder / f"{n:02d}.png")
    (folder / "broken.png").write_text("no image")
    return folder


def explained(run: RunFolder, name: str) -> pd.DataFrame:
    return read_csv(run.explanations_dir / f"{name}.csv")


# ---- evidence --------------------------------------------------------------------------------------------------


def test_explaining_again_does_nothing(trained_run: RunFolder) -> None:
    subgroups = str(trained_run.path.parent / "sites.csv")
    context = context_of(trained_run, subgroups=subgroups)
    assert all(is_fresh(step, context) for step in (TRAIN, EXPLAIN, REPORT))
    assert not is_fresh(EXPLAIN, context_of(trained_run, subgroups=subgroups, reject_coverage=0.5))


def test_calibration_is_fitted_on_validation_and_measured_on_test_images(trained_run: RunFolder) -> None:
    stored = json.loads((trained_run.model_dir / "calibration.json").read_text())
    counts = trained_run.read_dataset().frame["split"].value_counts()
    assert stored["n_images"] == counts["val"]
    table = explained(trained_run, "calibration").set_index("measure")
    assert table["n"].eq(counts["test"]).all()
    assert table["temperature"].eq(round(stored["temperature"], 5)).all()
    assert table.loc["nll", "before_low"] <= table.loc["nll", "before"] <= table.loc["nll", "before_high"]
    metrics = json.loads((trained_run.model_dir / "metrics.json").read_text())["test"]["over_seeds"]
    assert table.loc["ece", "before"] == pytest.approx(metrics["ece"]["values"][0], abs=1e-4)
    estimates = explained(trained_run, "intervals").set_index("metric")
    for name in ("accuracy", "macro_f1", "concept_auroc"):
        assert estimates.loc[name, "estimate"] == pytest.approx(metrics[name]["values"][0], abs=1e-4)
        assert estimates.loc[name, "low"] <= estimates.loc[name, "estimate"] <= estimates.loc[name, "high"]


def test_the_reject_threshold_comes_from_validation_images(trained_run: RunFolder) -> None:
    table = explained(trained_run, "reject")
    in_use = table[table["in_use"]].set_index("split")
    assert in_use["threshold"].nunique() == 1
    assert in_use.loc["val", "coverage"] == pytest.approx(0.8, abs=0.05)


def test_subgroups_are_measured_by_the_given_column(trained_run: RunFolder) -> None:
    table = explained(trained_run, "subgroups")
    assert set(table["value"]) == {"a", "b"}
    assert set(table["metric"]) == {"accuracy", "macro_f1", "concept_accuracy"}
    assert table["n"].eq(15).all()
    assert table["note"].str.contains("too small: 15 images").all()
    assert any("too small" in w for w in trained_run.read_manifest().warnings["explain"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,site\nx,a\n", "expected a column 'path' or 'image_id'"),
        ("path,site\nelsewhere.png,a\n", "none of its 1 rows"),
        ("path,site\n006.png,a\n006.png,b\n", "occurs twice"),
    ],
)
def test_a_subgroup_file_that_does_not_fit_is_refused(
    trained_run: RunFolder, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "groups.csv").write_text(content)
    context = context_of(trained_run, subgroups=str(tmp_path / "groups.csv"))
    with pytest.raises(InputRefused, match=message):
        subgroup_columns(context, trained_run.read_dataset())


def test_maps_are_drawn_and_tested(trained_run: RunFolder) -> None:
    maps = explained(trained_run, "maps")
    assert set(maps.loc[maps["target"] == "class", "caption"].str.split(" ").str[0]) <= {"blue", "red", "striped"}
    for name in maps["file"]:
        with Image.open(trained_run.explanations_dir / name) as image:
            assert image.size == (48, 40)
            assert image.info == {}
    assert explained(trained_run, "map_alignment")["image_id"].nunique() == 4
    assert "deletion of the class map" in set(explained(trained_run, "map_evidence")["measure"])


def test_concept_maps_are_compared_with_marked_regions(trained_run: RunFolder, tmp_path: Path) -> None:
    images = trained_run.read_images()
    paths = images[images["split"] == "test"]["path"].sort_values().tolist()[:3]
    boxes = pd.DataFrame(
        [(path, "stripes", 0, 0, 24, 40) for path in paths], columns=["path", "concept", "x0", "y0", "x1", "y1"]
    )
    boxes.to_csv(tmp_path / "regions.csv", index=False)
    settings = restored(SETTINGS | {"align": {"regions": str(tmp_path / "regions.csv")}})
    context = Context(trained_run, settings, Console(quiet=True))
    result = write_region_overlap(context, load(trained_run.model_dir).classifier)
    table = explained(trained_run, "map_regions")
    assert table["target"].tolist() == ["stripes"] * 3
    assert table["by_chance"].eq(0.5).all()
    assert table["iou"].between(0, 1).all()
    result.outputs[0].unlink()


def test_robustness_is_measured_where_it_is_asked_for(trained_run: RunFolder) -> None:
    context = context_of(trained_run, robustness_images=1)
    assert not (trained_run.explanations_dir / "robustness.csv").exists()
    classifier = load(trained_run.model_dir).classifier
    result = write_robustness(context, classifier, trained_run.read_dataset())
    table = explained(trained_run, "robustness")
    assert table["n"].eq(1).all()
    assert len(table) == 1 + 5 + 5 + 6 + 25
    result.outputs[0].unlink()


# ---- cards -----------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_tables_say(trained_run: RunFolder) -> None:
    card = (trained_run.path / MODEL_CARD).read_text()
    estimate = explained(trained_run, "intervals").set_index("metric").loc["accuracy"]
    assert f"{estimate['estimate']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})" in card
    assert "Not a medical device" in card
    assert "blue, red, striped" in card
    assert "site = a" in card
    assert "Not measured: `explain.robustness_images` is 0." in card
    assert json.loads((trained_run.model_dir / "config.json").read_text())["files"]["weights.safetensors"] in card
    sheet = (trained_run.path / DATA_SHEET).read_text()
    assert f"{N_IMAGES} of {N_IMAGES} files were used" in sheet
    assert "60 groups are known" in sheet
    assert "given: labels.csv" in sheet
    assert sheet.count("**Ask:**") >= 4


# ---- prediction ------------------------------------------------------------------------------------------------


def test_every_readable_image_is_predicted_and_the_others_are_listed(
    trained_run: RunFolder, files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = predict_files(context_of(trained_run), [files], out, with_maps=True)
    table = read_csv(out / "predictions.csv")
    assert (result.n_predicted, result.n_left_out, len(table)) == (40, 1, 40)
    assert read_csv(out / "left_out.csv")["reason"].tolist() == ["not_an_image"]
    parquet = pd.read_parquet(out / "predictions.parquet")
    assert parquet["class"].tolist() == table["class"].tolist()
    assert {"reddish", "stripes", "probability blue"} <= set(table.columns)
    assert table[[c for c in table if c.startswith("probability ")]].sum(axis=1).between(0.999, 1.001).all()
    uncertain = parquet["rejected"].notna()
    assert result.n_uncertain == uncertain.sum() > 0
    assert parquet.loc[uncertain, "probability"].max() < parquet.loc[~uncertain, "probability"].min()
    assert all((out / name).is_file() for names in table["maps"] for name in names.split("; "))


def test_a_killed_prediction_goes_on_with_what_is_missing(
    trained_run: RunFolder, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "_MEAN_PART", 8)
    context, out = context_of(trained_run), tmp_path / "out"
    n_parts = len(list(in_parts(sorted(files.glob("*.png")))))
    assert n_parts > 2
    done: list[int] = []
    whole = prediction._predict_part

    def killed_at_the_third(work: object, chunk: list[Path]) -> object:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(chunk))
        return whole(work, chunk)

    monkeypatch.setattr(prediction, "_predict_part", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        predict_files(context, [files], out, with_maps=False)
    assert not (out / "predictions.csv").exists()
    assert len(list((out / "parts").glob("*.parquet"))) == 2
    again: list[int] = []
    monkeypatch.setattr(prediction, "_predict_part", lambda work, chunk: again.append(1) or whole(work, chunk))
    result = predict_files(context, [files], out, with_maps=False)
    assert len(again) == n_parts - 2
    assert 0 < result.n_reused <= sum(done)
    assert len(pd.read_parquet(out / "predictions.parquet")) == 40


def test_a_new_image_costs_one_part_and_another_setting_all(
    trained_run: RunFolder, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "_MEAN_PART", 8)
    out, n_done = tmp_path / "out", []
    whole = prediction._predict_part
    monkeypatch.setattr(prediction, "_predict_part", lambda work, chunk: n_done.append(1) or whole(work, chunk))
    predict_files(context_of(trained_run), [files], out, with_maps=False)
    n_parts = len(n_done)
    shutil.copy(files / "07.png", files / "07b.png")
    result = predict_files(context_of(trained_run), [files], out, with_maps=False)
    assert result.n_predicted == 41
    assert 1 <= len(n_done) - n_parts <= 2  # the new path may itself be where a cut falls
    before = len(n_done)
    os.utime(files / "01.png", (time.time() + 9, time.time() + 9))
    predict_files(context_of(trained_run), [files], out, with_maps=False)
    assert len(n_done) - before == 1
    before = len(n_done)
    predict_files(context_of(trained_run, reject_coverage=0.3), [files], out, with_maps=False)
    assert len(n_done) - before >= n_parts
    assert len(list((out / "parts").glob("*.parquet"))) == len(n_done) - before


def dicom(path: Path, frames: np.ndarray, **elements: str) -> Path:
    """Frames (n, H, W, 3) as a secondary capture with the patient's name in header and file name."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.PatientName, dataset.PatientID = "Doe^Jane", "1234567"
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = len(frames), *frames.shape[1:3]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = np.ascontiguousarray(frames).tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def test_maps_of_dicom_files_hold_no_name(trained_run: RunFolder, tmp_path: Path) -> None:
    squares = Squares(40)
    frames = np.stack([squares("blue-0"), squares("red-1"), squares("striped-2")])
    folder = tmp_path / "Doe_Jane"
    folder.mkdir()
    dicom(folder / "Doe_Jane_1234567.dcm", frames)
    dicom(folder / "burnt.dcm", frames[:1], BurnedInAnnotation="YES")
    out = tmp_path / "out"
    result = predict_files(context_of(trained_run), [folder], out, with_maps=True)
    assert result.n_predicted == 4
    table = read_csv(out / "predictions.csv")
    assert sorted(table["image_id"].str.partition("#")[2]) == ["", "0", "1", "2"]
    drawn = sorted((out / "maps").glob("*"))
    assert len({path.name.split("-")[0] for path in drawn}) == 3
    for path in drawn:
        assert "doe" not in path.name.lower()
        data = path.read_bytes()
        assert not any(chunk in data for chunk in (b"tEXt", b"iTXt", b"zTXt", b"eXIf", b"Doe", b"1234567"))
    assert "burnt into the pixels" in table.set_index("path")["maps"][str(folder / "burnt.dcm")]


def test_a_path_that_looks_like_a_formula_is_harmless_in_the_csv(
    trained_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squares = Squares(3)
    path = tmp_path / "new" / "=1+1.png"
    path.parent.mkdir()
    Image.fromarray(squares("blue-0")).save(path)
    monkeypatch.chdir(path.parent)
    predict_files(context_of(trained_run), [Path("=1+1.png")], tmp_path / "out", with_maps=False)
    assert '"\'=1+1.png"' in (tmp_path / "out" / "predictions.csv").read_text()
    assert read_csv(tmp_path / "out" / "predictions.csv")["path"].tolist() == ["=1+1.png"]


def test_wrong_models_and_settings_are_refused_before_any_image_is_read(
    trained_run: RunFolder, files: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputRefused, match="found none"):
        predict_files(context_of(trained_run), [tmp_path / "empty"], tmp_path / "a", with_maps=False)
    too_strict = context_of(trained_run, reject_coverage=None, reject_max_risk=0.0001)
    with pytest.raises(ConfigurationError, match="validation"):
        predict_files(too_strict, [files], tmp_path / "b", with_maps=False)
    shutil.copytree(trained_run.path, tmp_path / "run")
    weights = tmp_path / "run" / "model" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointRefused, match="was altered"):
        predict_files(context_of(RunFolder(tmp_path / "run")), [files], tmp_path / "c", with_maps=False)


# ---- Python ----------------------------------------------------------------------------------------------------


def test_the_example_for_files_works(trained_run: RunFolder, files: Path) -> None:
    names = {"run": trained_run.path, "path": files / "03.png"}
    (example,) = doctest.DocTestFinder(recurse=False).find(sys.modules[flows.api.__name__], globs=names)
    results = doctest.DocTestRunner().run(example)
    assert results.attempted >= 4
    assert results.failed == 0


def test_paths_and_pixels_give_the_same(trained_run: RunFolder, files: Path) -> None:
    model = flows.api.load(trained_run.path)
    by_path = model.predict([files / "03.png"], coverage=0.9)[0]
    with Image.open(files / "03.png") as image:
        assert model.predict([image])[0].class_probabilities == by_path.class_probabilities
    corrected = model.intervene(str(files / "03.png"), {"reddish": True})
    assert corrected.after.concept_probabilities["reddish"] == 1
    assert list(model.concepts) == ["reddish", "stripes"]
    with pytest.raises(ImageRejected):
        model.explain(files / "broken.png")
    with pytest.raises(InputRefused, match="run folder"):
        flows.api.load(files)
