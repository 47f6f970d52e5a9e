from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from data_contracts.errors import ContractViolation
from data_contracts.store import RunFolder
from data_contracts.tables import State, vocabulary_of
from pipeline.review.vocabulary_edits import Carry, Edit, apply
from tests.pipeline.review.samples import concepts


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    """As a run folder gives it: nulls and lists have the types of the file."""
    run = RunFolder(tmp_path)
    run.write_concepts(concepts())
    return run.read_concepts()


def row(table: pd.DataFrame, concept_id: str) -> dict[str, object]:
    return {str(k): v for k, v in table.set_index("concept_id").loc[concept_id].to_dict().items()}


EDITS = [
    Edit("rename", "red", name="reddish", definition="Rather red."),
    Edit("add", name="blue", definition="It is blue.", group="colour"),
    Edit("drop", "red"),
    Edit("keep", "shiny"),
    Edit("merge", "red", into="round"),
    Edit("split", "red", parts="dark red\nlight red"),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.action)
def test_every_change_fits_the_contract_keeps_every_row_and_says_who_made_it(
    table: pd.DataFrame, edit: Edit, tmp_path: Path
) -> None:
    before = table.copy(deep=True)
    edited = apply(table, edit, "Dr A")
    pd.testing.assert_frame_equal(table, before)
    RunFolder(tmp_path / "after").write_concepts(edited.concepts)
    after = RunFolder(tmp_path / "after").read_concepts()
    assert list(after["concept_id"][:3]) == ["red", "round", "shiny"]
    noted = after["provenance"].map(
        lambda lines: [] if lines is None else [line for line in lines if "by Dr A" in line]
    )
    assert noted.map(bool).any()


def test_a_rename_keeps_the_id_and_remembers_the_old_name(table: pd.DataFrame) -> None:
    after = apply(table, Edit("rename", "red", name="  reddish  ", definition="It is red."), "Dr A").concepts
    assert (row(after, "red")["name"], list(row(after, "red")["synonyms"])) == ("reddish", ["red"])
    assert vocabulary_of(after).ids == vocabulary_of(table).ids


def test_dropped_and_kept_again_is_where_it_was(table: pd.DataFrame) -> None:
    dropped = apply(table, Edit("drop", "red"), "Dr A").concepts
    assert vocabulary_of(dropped).ids == ("round",)
    assert row(dropped, "red")["reason"] == "by_user"
    again = apply(dropped, Edit("keep", "red"), "Dr A").concepts
    assert vocabulary_of(again).ids == ("red", "round")
    assert pd.isna(row(again, "red")["reason"])


def test_what_was_never_in_the_vocabulary_comes_last(table: pd.DataFrame) -> None:
    kept = apply(table, Edit("keep", "shiny"), "Dr A").concepts
    added = apply(kept, Edit("add", name="Blue rim"), "Dr A").concepts
    assert vocabulary_of(added).ids == ("red", "round", "shiny", "blue-rim")
    assert row(added, "blue-rim")["origin"] == "user"


def test_a_merge_carries_presence_only(table: pd.DataFrame) -> None:
    edited = apply(table, Edit("merge", "red", into="round"), "Dr A")
    assert vocabulary_of(edited.concepts).ids == ("round",)
    assert "red" in list(row(edited.concepts, "round")["synonyms"])
    assert row(edited.concepts, "red")["nearest"] == "round"
    assert edited.carries == (Carry("red", State.PRESENT, {"round": State.PRESENT}),)


def test_a_split_carries_absence_only(table: pd.DataFrame) -> None:
    edited = apply(table, Edit("split", "red", parts=" dark red \n\nlight red\n"), "Dr A")
    assert vocabulary_of(edited.concepts).ids == ("round", "dark-red", "light-red")
    assert edited.carries == (Carry("red", State.ABSENT, {"dark-red": State.ABSENT, "light-red": State.ABSENT}),)


@pytest.mark.parametrize(
    "edit",
    [
        Edit("burn", "red"),
        Edit("rename", "blue", name="bluish"),
        Edit("rename", "red", name="   "),
        Edit("rename", "red", name="x" * 81),
        Edit("rename", "red", name="SHINY"),
        Edit("rename", "red", name="red", definition="It is red."),
        Edit("add", name="Red"),
        Edit("add", name="shiny"),
        Edit("drop", "shiny"),
        Edit("keep", "red"),
        Edit("merge", "red", into="red"),
        Edit("merge", "red", into="shiny"),
        Edit("split", "red", parts="dark red"),
        Edit("split", "red", parts="dark red\ndark red"),
        Edit("split", "red", parts="\n".join(f"red {k}" for k in range(9))),
    ],
)
def test_what_makes_no_sense_is_refused(table: pd.DataFrame, edit: Edit) -> None:
    with pytest.raises(ContractViolation, match="nothing was changed"):
        apply(table, edit, "Dr A")


def test_the_last_concept_cannot_be_dropped(table: pd.DataFrame) -> None:
    one = apply(table, Edit("drop", "red"), "Dr A").concepts
    with pytest.raises(ContractViolation, match="at least one"):
        apply(one, Edit("drop", "round"), "Dr A")
