"""The audit as a run folder sees it: what is drawn, read back whatever a spreadsheet did, kept and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from annotation.trust.fuse import fuse
from data_contracts.errors import ConfigurationError, ContractViolation, InputRefused
from data_contracts.manifest import RunManifest
from data_contracts.store import RunFolder
from data_contracts.tables import JUDGEMENTS
from flows.chain import Context
from flows.console import Console
from flows.settings import Settings
from flows.steps.corrections import draw_audit, score_audit

N = 120
IDS = [f"{i:064x}" for i in range(N)]
CONCEPTS = ["red", "round"]
TRUTH = pd.Series(np.random.default_rng(0).random(2 * N) < 0.4, pd.MultiIndex.from_product([IDS, CONCEPTS]))


@pytest.fixture
def context(tmp_path: Path) -> Context:
    run = RunFolder(tmp_path / "run")
    run.write_manifest(RunManifest.new("run", "source"))
    run.write_images(
        pd.DataFrame(
            {
                "image_id": IDS,
                "path": [f"{i}.png" for i in range(N)],
                "label": ["x", "y"] * (N // 2),
                "split": "train",
                "modality": "m",
                "width_px": 4,
                "height_px": 4,
            }
        )
    )
    run.write_concepts(
        pd.DataFrame(
            {
                "concept_id": CONCEPTS,
                "name": CONCEPTS,
                "definition": ["It is red.", "It is round."],
                "group": "kind",
                "proposed_for": [["x"], ["x"]],
                "origin": "vlm",
                "status": "kept",
                "position": [0, 1],
            }
        )
    )
    said = TRUTH ^ (np.random.default_rng(1).random(2 * N) < np.tile([0.05, 0.3], N))
    frame = (
        said.rename_axis(["image_id", "concept_id"])
        .reset_index(name="present")
        .assign(witness="vlm", witness_model="m")
    )
    frame["state"] = np.where(frame["present"], "present", "absent")
    frame["created_at"] = pd.Timestamp("2026-01-01", tz="UTC")
    run.append_judgements(frame.reindex(columns=JUDGEMENTS.column_names))
    run.write_labels(fuse(run.read_judgements(), None, run.vocabulary()), pd.DataFrame())
    return Context(run, Settings(), Console(quiet=True))


def filled(sheet: pd.DataFrame) -> pd.DataFrame:
    true = TRUTH.loc[pd.MultiIndex.from_frame(sheet[["image_id", "concept_id"]])].to_numpy()
    return sheet.assign(answer=np.where(true, "present", "absent"))


def with_settings(context: Context, changes: dict[str, Any]) -> Context:
    return replace(context, settings=Settings.model_validate(changes))


def experts_of(run: RunFolder) -> pd.DataFrame:
    ledger = run.read_judgements()
    return ledger[ledger["witness"] == "expert"]


def test_the_sheet_is_blind_and_its_design_is_kept_beside_it(context: Context) -> None:
    assert draw_audit(context, 40, 0, again=False) == 40
    assert list(context.run.read_audit()) == ["image_id", "path", "concept_id", "concept", "definition", "answer"]
    assert (context.run.path / "audit_design.csv").is_file()


@pytest.mark.parametrize("damage", ["semicolons", "utf-16", "translated", "reordered"])
def test_what_a_spreadsheet_does_to_the_file_changes_no_answer(context: Context, damage: str) -> None:
    draw_audit(context, 40, 0, again=False)
    sheet, path = filled(context.run.read_audit()), context.run.audit_path
    if damage == "semicolons":
        sheet.to_csv(path, index=False, sep=";", encoding="cp1252", lineterminator="\r\n")
    elif damage == "utf-16":
        sheet.assign(extra="note").to_csv(path, index=False, sep="\t", encoding="utf-16")
    elif damage == "translated":
        sheet["answer"] = sheet["answer"].map({"present": "WAHR", "absent": "0,0"})
        sheet.to_csv(path, index=False, encoding="utf-8-sig")
    else:
        sheet.sample(frac=1, random_state=0)[sheet.columns[::-1]].to_csv(path, index=False)
    found = score_audit(context, "dr")
    assert (found.n_answers, found.n_rejected) == (40, 0)
    taken = experts_of(context.run)
    true = TRUTH.loc[pd.MultiIndex.from_frame(taken[["image_id", "concept_id"]])].to_numpy()
    assert (taken["state"].eq("present").to_numpy() == true).all()


def test_nothing_is_taken_of_a_faulty_sheet_unless_partial_says_so(context: Context) -> None:
    draw_audit(context, 40, 0, again=False)
    sheet = filled(context.run.read_audit())
    sheet.loc[3, "answer"] = "1-Jan"
    sheet.loc[5, "image_id"] = "3.2E+45"
    sheet.to_csv(context.run.audit_path, index=False)
    with pytest.raises(ContractViolation) as caught:
        score_audit(context, "dr")
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        "row 5, column 'answer'",
        "row 7, column 'image_id'",
    ]
    assert experts_of(context.run).empty
    assert not (context.run.path / "audit_scores.csv").exists()
    found = score_audit(context, "dr", partial=True)
    assert (found.n_answers, found.n_rejected) == (38, 2)
    assert len(experts_of(context.run)) == 38
    rejected = pd.read_csv(context.run.path / "audit_rejected.csv", dtype=str)
    assert rejected["row"].tolist() == ["5", "7"]
    assert rejected["answer"].iloc[0] == "1-Jan"


def test_a_repeated_header_is_refused_even_in_part(context: Context) -> None:
    draw_audit(context, 10, 0, again=False)
    text = context.run.audit_path.read_text(encoding="utf-8-sig").replace("definition", "answer", 1)
    context.run.audit_path.write_text(text)
    with pytest.raises(ContractViolation, match="'answer' occurs 2 times"):
        score_audit(context, "dr", partial=True)


def test_a_second_expert_brings_a_sheet_and_disputes_are_listed(context: Context, tmp_path: Path) -> None:
    draw_audit(context, 40, 0, again=False)
    sheet = filled(context.run.read_audit())
    sheet.to_csv(context.run.audit_path, index=False)
    assert score_audit(context, "a").experts.empty
    other = sheet.copy()
    other.loc[:3, "answer"] = other.loc[:3, "answer"].map({"present": "absent", "absent": "present"})
    other.to_csv(tmp_path / "b.csv", index=False)
    found = score_audit(context, "b", sheet=tmp_path / "b.csv", ordinal={"kind": "quadratic"})
    assert len(found.disputed) == 4
    assert {"cohen_kappa", "krippendorff_alpha", "cohen_kappa_quadratic"} == set(found.experts["statistic"])
    assert len(experts_of(context.run)) == 80
    assert found.scores.query("witness == 'vlm:m'")["n"].sum() == 36
    with pytest.raises(ConfigurationError, match="kind"):
        score_audit(context, "b", ordinal={"size": "linear"})


def test_ordinal_groups_are_a_setting_and_the_flag_wins(context: Context) -> None:
    draw_audit(context, 40, 0, again=False)
    filled(context.run.read_audit()).to_csv(context.run.audit_path, index=False)
    score_audit(context, "a")
    scaled = with_settings(context, {"concepts": {"ordinal_groups": ["kind=linear"]}})
    assert "cohen_kappa_linear" in set(score_audit(scaled, "b").experts["statistic"])
    other = score_audit(scaled, "b", ordinal={"kind": "quadratic"}).experts
    assert "cohen_kappa_quadratic" in set(other["statistic"])
    with pytest.raises(ConfigurationError, match="ordinal_groups: 'size'"):
        score_audit(with_settings(context, {"concepts": {"ordinal_groups": ["size"]}}), "a")
    with pytest.raises(ValidationError, match="GROUP=linear"):
        with_settings(context, {"concepts": {"ordinal_groups": ["kind=cubic"]}})


def test_fused_labels_are_scored_as_this_run_fuses_them(context: Context) -> None:
    draw_audit(context, 100, 0, again=False)
    filled(context.run.read_audit()).to_csv(context.run.audit_path, index=False)
    n_scored = []
    for low, high in ((0.5, 0.5), (0.001, 0.999)):
        strict = with_settings(context, {"labels": {"abstain_low": low, "abstain_high": high}})
        n_scored.append(score_audit(strict, "dr").scores.query("witness == 'fused'")["n"].sum())
    assert n_scored[0] == 100
    assert n_scored[1] < 60


def test_what_a_refused_witness_said_is_not_in_the_fused_label(context: Context) -> None:
    draw_audit(context, 60, 0, again=False)
    filled(context.run.read_audit()).to_csv(context.run.audit_path, index=False)
    refused = pd.DataFrame([["vlm:m", "round", "fails_null_test", "noise"]])
    refused.columns = ["source", "concept_id", "reason", "detail"]
    refused.to_csv(context.run.path / "refused.csv", index=False)
    found = score_audit(context, "dr").scores.set_index(["witness", "concept_id"])
    assert found.loc[("fused", "round"), "n"] == 0
    assert found.loc[("vlm:m", "round"), "n"] > 10


def test_more_asks_new_cells_of_undecided_concepts_and_keeps_the_answers(context: Context) -> None:
    draw_audit(context, 24, 1, again=False)
    with pytest.raises(ConfigurationError, match="no answer was taken yet"):
        draw_audit(context, 20, 0, again=False, more=True)
    first = filled(context.run.read_audit())
    first.to_csv(context.run.audit_path, index=False)
    scores = score_audit(context, "dr").scores
    with pytest.raises(ConfigurationError, match="answered already"):
        draw_audit(context, 20, 0, again=False)
    open_concepts = set(scores.query("recommendation == 'ask_again'")["concept_id"])
    assert draw_audit(context, 20, 0, again=False, more=True) == 20
    sheet = context.run.read_audit()
    assert sheet["answer"].tolist() == [*first["answer"], *[""] * 20]
    assert not sheet.duplicated(["image_id", "concept_id"]).any()
    assert set(sheet["concept_id"].iloc[24:]) <= open_concepts
    filled(sheet).to_csv(context.run.audit_path, index=False)
    found = score_audit(context, "dr").scores
    assert found.query("witness == 'vlm:m'")["n"].sum() == 44
    assert len(experts_of(context.run)) == 44


def test_a_sheet_read_twice_says_nothing_twice_and_undoes_no_later_correction(context: Context) -> None:
    draw_audit(context, 20, 0, again=False)
    sheet = filled(context.run.read_audit())
    sheet.to_csv(context.run.audit_path, index=False)
    seen = sheet.iloc[[0]].assign(witness="expert", witness_model="dr", state=sheet["answer"].iloc[0])
    seen["created_at"] = pd.Timestamp("2026-01-02", tz="UTC")
    # The same answer, but given with the machine's in sight: the blind one is news.
    context.run.append_judgements(seen.reindex(columns=JUDGEMENTS.column_names))
    assert score_audit(context, "dr").n_answers == 20
    assert len(experts_of(context.run)) == 21
    context.run.append_judgements(
        seen.assign(state="uncertain", created_at=pd.Timestamp("2999-01-01", tz="UTC")).reindex(
            columns=JUDGEMENTS.column_names
        )
    )
    score_audit(context, "dr")
    assert len(experts_of(context.run)) == 22
    assert experts_of(context.run)["state"].iloc[-1] == "uncertain"


def test_a_replaced_sheet_asks_no_answered_cell_again(context: Context) -> None:
    draw_audit(context, 40, 0, again=False)
    first = filled(context.run.read_audit())
    first.to_csv(context.run.audit_path, index=False)
    score_audit(context, "dr")
    draw_audit(context, 60, 0, again=True)
    assert context.run.read_audit().merge(first, on=["image_id", "concept_id"]).empty


def test_without_its_design_a_sheet_is_refused(context: Context) -> None:
    draw_audit(context, 10, 0, again=False)
    (context.run.path / "audit_design.csv").unlink()
    with pytest.raises(InputRefused, match=r"audit_design\.csv"):
        score_audit(context, "dr")
