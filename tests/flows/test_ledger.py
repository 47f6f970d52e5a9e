from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest

from data_contracts.manifest import RunManifest
from data_contracts.store import RunFolder
from data_contracts.tables import vocabulary_of
from flows.ledger import append_new, asked_concepts, keep_edits, merge_concepts


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.write_manifest(RunManifest.new("run", "source"))
    return folder


def said(state: str, image_id: str = "i", model: str = "m") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image_id": [image_id],
            "concept_id": ["c"],
            "witness": ["given"],
            "witness_model": [model],
            "state": [state],
            "created_at": [datetime.now(UTC)],
        }
    )


def concepts(ids: list[str], **columns: object) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "concept_id": ids,
            "name": ids,
            "definition": "",
            "group": pd.array([None] * len(ids), dtype="str"),
            "proposed_for": [[] for _ in ids],
            "origin": "vlm",
            "status": "kept",
            "reason": pd.array([None] * len(ids), dtype="str"),
            "position": range(len(ids)),
        }
    )
    return frame.assign(**columns)


def test_the_same_words_are_not_said_twice(run: RunFolder) -> None:
    assert append_new(run, said("present")) == 1
    assert append_new(run, said("present")) == 0
    assert len(run.read_judgements()) == 1


def test_a_change_of_mind_and_back_are_both_kept(run: RunFolder) -> None:
    for state in ("present", "absent", "present"):
        assert append_new(run, said(state)) == 1
    assert run.read_judgements()["state"].tolist() == ["present", "absent", "present"]


def test_witnesses_do_not_silence_each_other(run: RunFolder) -> None:
    append_new(run, said("present", model="a"))
    assert append_new(run, said("present", model="b")) == 1


def test_added_concepts_stand_behind_the_stored_ones() -> None:
    merged = merge_concepts(concepts(["a", "b"]), concepts(["b", "c"]))
    assert vocabulary_of(merged).ids == ("a", "b", "c")


def test_concepts_the_aligner_dropped_stay_in_the_question() -> None:
    table = concepts(["a", "b", "c"], status=["kept", "dropped", "dropped"])
    table["reason"] = pd.array([None, "not_seen_in_any_image", "too_long"], dtype="str")
    assert vocabulary_of(table).ids == ("a",)
    assert vocabulary_of(asked_concepts(table)).ids == ("a", "b")


def test_what_people_did_to_concepts_outlives_a_new_proposal() -> None:
    stored = concepts(
        ["machine", "added", "dropped", "renamed", "sheet"],
        origin=["vlm", "user", "vlm", "vlm", "vlm"],
        status=["kept", "kept", "dropped", "kept", "kept"],
        reason=[None, None, "by_user", None, None],
        provenance=[["class 'a' (round 1): \"machine\""], [], [], ["renamed from 'x' by Dr A"], ["edited in my.csv"]],
    )
    proposed = concepts(["renamed", "new"], origin="vlm", status="kept")
    found = keep_edits(stored, proposed).set_index("concept_id")
    assert set(found.index) == {"new", "added", "dropped", "renamed", "sheet"}
    assert found.at["dropped", "status"] == "dropped"
    assert found.at["renamed", "provenance"] == ["renamed from 'x' by Dr A"]
    assert found["position"].is_unique


def test_proposals_alone_are_taken_as_they_are() -> None:
    proposed = concepts(["new"], origin="vlm", status="kept")
    assert keep_edits(None, proposed) is proposed
    assert keep_edits(concepts(["old"], origin="vlm", status="kept"), proposed)["concept_id"].tolist() == ["new"]
