from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import ContractViolation
from data_contracts.manifest import RunManifest
from data_contracts.store import RunFolder
from data_contracts.tables import vocabulary_of
from pipeline.import_concepts import is_concept_sheet, read_concept_edits


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.write_manifest(RunManifest.new("run", str(tmp_path)))
    concepts = Vocabulary.of([Concept("red", "red", "Redness."), Concept("round", "round", group="shape")])
    folder.write_concepts(
        pd.DataFrame(
            {
                "concept_id": concepts.ids,
                "name": concepts.names,
                "definition": [c.definition for c in concepts],
                "group": pd.array([c.group for c in concepts], dtype="str"),
                "proposed_for": [["ill"], []],
                "origin": "vlm",
                "status": "kept",
                "reason": pd.array([None, None], dtype="str"),
                "nearest": pd.array([None, None], dtype="str"),
                "similarity": float("nan"),
                "position": [0, 1],
                "synonyms": [["ruddy", "=cmd()"], []],
            }
        )
    )
    return folder


def edited(run: RunFolder, tmp_path: Path, *replacements: tuple[str, str]) -> Path:
    text = (run.path / "concepts.csv").read_text(encoding="utf-8-sig")
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "edited.csv"
    path.write_text(text, encoding="utf-8-sig")
    return path


def test_an_untouched_export_changes_nothing(run: RunFolder, tmp_path: Path) -> None:
    path = edited(run, tmp_path)
    assert is_concept_sheet(path)
    found = read_concept_edits(path, run.read_concepts())
    assert found.changes == ()
    assert vocabulary_of(found.concepts).sha256 == run.vocabulary().sha256


def test_renamed_dropped_and_added_concepts_are_told_and_only_new_questions_cost(
    run: RunFolder, tmp_path: Path
) -> None:
    path = edited(run, tmp_path, ("Redness.", "Visible redness."), ("shape,,vlm,kept", "shape,,vlm,dropped"))
    with path.open("a", encoding="utf-8") as file:
        file.write("\n,oval cell,Longer than wide.,shape,,,,,,,,,,\n")
    found = read_concept_edits(path, run.read_concepts())
    assert [(c.concept_id, c.column, c.after) for c in found.changes] == [
        ("red", "definition", "Visible redness."),
        ("round", "status", "dropped"),
        ("oval-cell", "concept", "oval cell"),
    ]
    assert found.asked_again == ("red", "oval-cell")
    run.write_concepts(found.concepts)
    stored = run.read_concepts().set_index("concept_id")
    assert run.vocabulary().ids == ("red", "oval-cell")
    assert stored.at["round", "reason"] == "by_user"
    assert stored.at["oval-cell", "origin"] == "user"


def test_a_missing_row_loses_no_concept(run: RunFolder, tmp_path: Path) -> None:
    path = tmp_path / "short.csv"
    path.write_text("concept_id,name,status\nred,red,kept\n")
    assert read_concept_edits(path, run.read_concepts()).changes == ()


def test_every_fault_is_named_and_nothing_is_taken(run: RunFolder, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("concept_id,name,status\nred,round,kept\nround,,perhaps\nred,red,kept\nnew,ROUND,kept\n")
    with pytest.raises(ContractViolation) as caught:
        read_concept_edits(path, run.read_concepts())
    faults = "\n".join(caught.value.faults)
    assert "row 3, column 'name'" in faults
    assert "got 'perhaps'" in faults
    assert "row 4: concept 'red' stands in row 2" in faults
    assert "'red' and 'new' are both called" in faults


def test_dropping_all_is_refused(run: RunFolder, tmp_path: Path) -> None:
    path = tmp_path / "none.csv"
    path.write_text("concept_id,name,status\nred,red,dropped\nround,round,dropped\n")
    with pytest.raises(ContractViolation, match="all are dropped"):
        read_concept_edits(path, run.read_concepts())
