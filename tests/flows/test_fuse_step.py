"""The fuse step on a run folder: its files, its sentences, its thresholds, and that shards change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from annotation.trust.fuse import FuseOptions, fuse
from data_contracts.errors import ConfigurationError, ContractViolation
from data_contracts.manifest import RunManifest
from data_contracts.store import RunFolder
from data_contracts.tables import JUDGEMENTS
from flows.chain import Context, StepReport, execute
from flows.console import Console
from flows.settings import AlignSettings, LabelSettings, Settings
from flows.steps import fuse as fuse_step
from flows.steps.corrections import draw_audit, score_audit
from flows.steps.fuse import FUSE

N = 200
N_TEST = 60
IDS = [f"{i:064x}" for i in range(N)]
CONCEPTS = ["red", "round", "dark"]
CELLS = pd.MultiIndex.from_product([IDS, CONCEPTS], names=["image_id", "concept_id"])
TRUTH = np.random.default_rng(0).random((N, 3)) < 0.4
CLIP = "ViT-B-32/laion2b_s34b_b79k"

Make = Callable[..., RunFolder]


def concepts(definition: str = "It is red.") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "concept_id": CONCEPTS,
            "name": CONCEPTS,
            "definition": [definition, "It is round.", "It is dark."],
            "group": None,
            "proposed_for": [["x"]] * 3,
            "origin": "vlm",
            "status": "kept",
            "position": range(3),
        }
    )


def answers(state: np.ndarray, cells: pd.MultiIndex, witness: str, model: str = "m", minute: int = 0) -> pd.DataFrame:
    frame = cells.to_frame(index=False).assign(witness=witness, witness_model=model)
    frame["state"] = np.where(state, "present", "absent")
    frame["prompt_sha256"] = "p" if witness == "vlm" else None
    frame["created_at"] = pd.Timestamp("2026-01-01", tz="UTC") + pd.Timedelta(minutes=minute)
    return frame.reindex(columns=JUDGEMENTS.column_names)


def aligned(seed: int, shift: float) -> pa.Table:
    noise = np.random.default_rng(seed).normal(0, 0.3, TRUTH.shape)
    n = len(CELLS)
    return pa.table(
        {
            "image_id": CELLS.get_level_values(0).to_numpy(object),
            "concept_id": CELLS.get_level_values(1).to_numpy(object),
            "similarity": (TRUTH + noise + shift).ravel(),
            "null_similarity": np.zeros(n),
            "grid_h": np.ones(n, np.int64),
            "grid_w": np.ones(n, np.int64),
            "heatmap": pa.array([np.zeros(1, np.float16)] * n, pa.list_(pa.float16())),
        }
    )


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a run folder with one judge, written in three parts of the ledger, and two parts of alignment."""

    def made(name: str = "run", *, seed: int = 1, shift: float = 0.0, definition: str = "It is red.") -> RunFolder:
        run = RunFolder(tmp_path / name)
        run.write_manifest(RunManifest.new(name, "source"))
        split = ["train"] * (N - N_TEST) + ["test"] * N_TEST
        content = {"image_id": IDS, "path": [f"{i}.png" for i in range(N)], "label": ["x", "y"] * (N // 2)}
        run.write_images(pd.DataFrame({**content, "split": split, "modality": "m", "width_px": 4, "height_px": 4}))
        run.write_concepts(concepts(definition))
        said = (TRUTH ^ (np.random.default_rng(seed).random(TRUTH.shape) < 0.15)).ravel()
        for rows in (slice(0, 150), slice(150, 400), slice(400, None)):
            run.append_judgements(answers(said[rows], CELLS[rows], "vlm"))
        # A later answer to the same question, in a part of its own: the last one stands.
        run.append_judgements(answers(~said[300:310], CELLS[300:310], "vlm", minute=5))
        table = aligned(seed + 1, shift)
        run.write_alignment([table.slice(0, 330), table.slice(330)])
        return run

    return made


def fused(run: RunFolder, *, model: str = CLIP, **labels: Any) -> StepReport:
    settings = Settings(labels=LabelSettings(**labels), align=AlignSettings(model=model))
    return execute(FUSE, Context(run, settings, Console(quiet=True)))


def csv(run: RunFolder, name: str) -> pd.DataFrame:
    return pd.read_csv(run.path / name, encoding="utf-8-sig")


def audit(run: RunFolder, n_cells: int = 120) -> None:
    """An expert who knows the truth answers a drawn sheet."""
    context = Context(run, Settings(align=AlignSettings(model=CLIP)), Console(quiet=True))
    draw_audit(context, n_cells, 0, again=True)
    sheet = run.read_audit()
    truth = pd.Series(TRUTH.ravel(), CELLS)
    true = truth.loc[pd.MultiIndex.from_frame(sheet[["image_id", "concept_id"]])].to_numpy()
    sheet.assign(answer=np.where(true, "present", "absent")).to_csv(run.audit_path, index=False)
    score_audit(context, "dr")


def test_labels_are_those_of_fusing_everything_at_once_with_the_runs_options(make: Make) -> None:
    run = make()
    fused(run, min_precision=0.95, min_npv=0.97, abstain_low=0.3)
    options = FuseOptions(min_precision=0.95, min_npv=0.97, abstain_low=0.3)
    whole = fuse(
        run.read_judgements(), run.read_alignment_scores(), run.vocabulary(), options, learn_from=IDS[: N - N_TEST]
    )
    pd.testing.assert_frame_equal(run.read_labels(), whole, check_dtype=False)


@pytest.mark.parametrize("is_audited", [False, True])
def test_shards_change_no_label_and_no_table(make: Make, monkeypatch: pytest.MonkeyPatch, is_audited: bool) -> None:
    run = make()
    fused(run)
    if is_audited:
        audit(run)
    settings = {"threshold": "audited", "min_precision": 0.9}
    names = ["labels.csv", "disagreements.csv", "thresholds.csv", "calibration.csv", "reliability.csv", "agreement.csv"]
    fused(run, **settings)
    labels, tables = run.read_labels(), {name: csv(run, name) for name in names}
    monkeypatch.setattr(fuse_step, "SHARD_IMAGES", 37)
    (run.path / "labels.csv").unlink()
    fused(run, **settings)
    pd.testing.assert_frame_equal(run.read_labels(), labels)
    for name, table in tables.items():
        pd.testing.assert_frame_equal(csv(run, name), table)


def test_a_large_run_learns_from_a_sample_and_says_what_it_is_of(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make()
    fused(run)
    before = run.read_labels()
    monkeypatch.setattr(fuse_step, "TRUST_IMAGES", 120)
    (run.path / "labels.csv").unlink()
    report = fused(run)
    assert any(f"120 of {N} images" in warning for warning in report.warnings)
    after = run.read_labels()
    assert len(after) == len(before)
    assert np.abs(after["probability"] - before["probability"]).mean() < 0.05


def test_disagreements_name_image_concept_and_witnesses(make: Make) -> None:
    run = make()
    report = fused(run)
    found = csv(run, "disagreements.csv")
    first = ["image_id", "path", "concept_id", "concept", "probability", "disagreement", "information", "decided_by"]
    assert list(found) == [*first, "vlm m", "alignment"]
    assert report.counts["disagreements"] == len(found) > 10
    assert found["information"].is_monotonic_decreasing
    paths = {image_id: f"{i}.png" for i, image_id in enumerate(IDS)}
    assert (found["path"] == found["image_id"].map(paths)).all()


def test_too_many_disagreements_are_cut_and_counted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make()
    every = fused(run).counts["disagreements"]
    top = csv(run, "disagreements.csv").head(5)
    monkeypatch.setattr(fuse_step, "MAX_DISAGREEMENTS", 5)
    (run.path / "labels.csv").unlink()
    report = fused(run)
    pd.testing.assert_frame_equal(csv(run, "disagreements.csv"), top)
    assert any(f"disagree on {every:g} cells" in warning for warning in report.warnings)


def test_without_an_audit_nothing_is_claimed_and_one_is_suggested(make: Make) -> None:
    run = make()
    report = fused(run, min_precision=0.9)
    calibration = csv(run, "calibration.csv")
    assert set(calibration["source"]) == {"vlm:m", "alignment", "fused"}
    assert calibration[["ece", "brier"]].isna().all(axis=None)
    assert calibration["note"].str.startswith("not known").all()
    assert csv(run, "reliability.csv").empty
    thresholds = csv(run, "thresholds.csv")
    assert set(thresholds["method"]) == {"expected"}
    assert thresholds["precision"].isna().all()
    (told,) = [warning for warning in report.warnings if "audit draw" in warning]
    assert "no expert has answered a cell, and 200 images are few" in told
    assert 60 <= int(told.partition("--cells ")[2].split("`")[0]) <= 150


def test_an_audit_is_what_cuts_and_probabilities_are_held_against(make: Make) -> None:
    run = make()
    fused(run)
    audit(run)
    report = fused(run, min_precision=0.9, min_npv=0.9, threshold="audited")
    thresholds = csv(run, "thresholds.csv")
    assert thresholds.groupby("source")["n_audited"].sum().to_dict() == {"alignment": 120, "fused": 120}
    assert set(thresholds["method"]) == {"audited"}
    assert (thresholds["precision_low"] < thresholds["precision"]).all()
    assert thresholds["coverage"].between(0.3, 1).all()
    every = csv(run, "calibration.csv").query("concept_id == 'all'").set_index("source")
    assert every["n"].to_dict() == {"vlm:m": 120, "fused": 120, "alignment": 0}
    # The judge is wrong on 15 % of the cells and says 1 or 0 of all.
    assert every.loc["vlm:m", "brier"] == pytest.approx(0.15, abs=0.08)
    assert every.loc["fused", "brier"] < every.loc["vlm:m", "brier"]
    assert csv(run, "reliability.csv").groupby("source")["n"].sum().to_dict() == {"vlm:m": 120, "fused": 120}
    assert not any("audit draw" in warning for warning in report.warnings)


def test_experts_answers_on_the_test_split_reach_no_cut(make: Make) -> None:
    run = make()
    fused(run, min_precision=0.9, threshold="audited")
    before = csv(run, "thresholds.csv")
    test_cells = CELLS[3 * (N - N_TEST) :]
    run.append_judgements(answers(~TRUTH.ravel()[3 * (N - N_TEST) :], test_cells, "expert", "dr", minute=9))
    fused(run, min_precision=0.9, threshold="audited")
    pd.testing.assert_frame_equal(csv(run, "thresholds.csv"), before)
    assert csv(run, "calibration.csv")["n"].sum() == 0


def test_stored_thresholds_are_used_where_all_is_still_the_same(make: Make) -> None:
    one, other = make("one"), make("other", seed=7)
    fused(one, threshold="agreement", min_precision=0.9)
    file = one.path / "thresholds.csv"
    report = fused(other, threshold="agreement", min_precision=0.9, thresholds_file=file)
    limits = ["source", "concept_id", "threshold", "abstain_low", "abstain_high", "fitted_for", "score_quantiles"]
    pd.testing.assert_frame_equal(csv(other, "thresholds.csv")[limits], csv(one, "thresholds.csv")[limits])
    assert set(csv(other, "thresholds.csv")["method"]) == {"stored (agreement)", "stored (expected)"}
    # Scores of the aligner are of one scale; fused probabilities are of whatever each run learned.
    assert not any("thresholds of alignment" in warning for warning in report.warnings)
    called = other.read_labels().dropna(subset=["present"])
    high = csv(one, "thresholds.csv").query("source == 'fused'").set_index("concept_id")["abstain_high"]
    present = called[called["present"].astype(bool)]
    assert (present["probability"] > present["concept_id"].map(high)).all()


def test_thresholds_of_another_model_are_refused(make: Make) -> None:
    one, other = make("one"), make("other")
    fused(one, threshold="agreement")
    with pytest.raises(ConfigurationError, match="the alignment model was 'ViT-B-32.*' and is now 'RN50/openai'"):
        fused(other, model="RN50/openai", threshold="agreement", thresholds_file=one.path / "thresholds.csv")
    assert not other.labels_csv_path.exists()


def test_thresholds_of_other_words_are_left_out_with_a_sentence(make: Make) -> None:
    one, other = make("one"), make("other", definition="It is red all over.")
    fused(one, threshold="agreement")
    report = fused(other, threshold="agreement", thresholds_file=one.path / "thresholds.csv")
    told = [warning for warning in report.warnings if "the words of the concept changed" in warning]
    assert len(told) == 2
    assert all("'red'" in warning and "'round'" not in warning for warning in told)
    methods = csv(other, "thresholds.csv").set_index(["source", "concept_id"])["method"]
    assert methods["alignment", "red"] == "agreement"
    assert methods["alignment", "round"] == "stored (agreement)"


def test_shifted_scores_are_told_with_what_to_do(make: Make) -> None:
    one, other = make("one"), make("other", shift=0.6)
    fused(one, threshold="agreement")
    report = fused(other, threshold="agreement", thresholds_file=one.path / "thresholds.csv")
    (told,) = [warning for warning in report.warnings if "thresholds of alignment: scores have shifted" in warning]
    assert "for 3 of 3 concepts" in told
    assert "medmicn audit draw" in told


def test_a_file_that_is_no_table_of_thresholds_is_refused(make: Make, tmp_path: Path) -> None:
    run = make()
    with pytest.raises(ConfigurationError, match="found none"):
        fused(run, thresholds_file=tmp_path / "missing.csv")
    (tmp_path / "odd.csv").write_text("concept_id,threshold\nred,0.4\n")
    with pytest.raises(ContractViolation, match="column 'source' is missing"):
        fused(run, thresholds_file=tmp_path / "odd.csv")


def test_a_fixed_number_stays_with_its_model(make: Make) -> None:
    run = make()
    fused(run, threshold="fixed", fixed_threshold=0.5)
    with pytest.raises(ConfigurationError, match="belongs to the alignment model 'ViT-B-32"):
        fused(run, model="RN50/openai", threshold="fixed", fixed_threshold=0.5)
    fused(run, model="RN50/openai", threshold="fixed", fixed_threshold=0.5, fixed_threshold_model="RN50/openai")
    with pytest.raises(ConfigurationError, match="belongs to the alignment model 'RN50/openai'"):
        fused(run, threshold="fixed", fixed_threshold=0.5, fixed_threshold_model="RN50/openai")
