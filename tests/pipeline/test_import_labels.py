from __future__ import annotations

import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import ContractViolation, InputRefused
from data_contracts.store import write_csv
from data_contracts.tables import CONCEPTS, IMAGES, JUDGEMENTS, LABELS, State, Witness, to_pandas, vocabulary_of
from pipeline.export import wide_labels, wide_states
from pipeline.import_labels import Imported, given_concepts, read_labels

VOCABULARY = Vocabulary.of(
    [
        Concept("red", "Red"),
        Concept("ground-glass-opacity", "ground-glass opacity"),
        Concept("shape-round", "shape round", group="shape"),
        Concept("shape-oval", "shape oval", group="shape"),
    ]
)


def images(paths: list[str], rejected: list[str | None] | None = None, ids: list[str] | None = None) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "image_id": ids or [f"id{i}" for i in range(len(paths))],
            "path": paths,
            "modality": "m",
            "rejected": pd.Series(rejected or [None] * len(paths), dtype="str"),
        }
    )
    return to_pandas(IMAGES.to_arrow(frame, "images"))


IMAGES_AB = images(["a.png", "folder/b.png"])


def sheet(folder: Path, text: str | bytes) -> Path:
    path = folder / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def states(imported: Imported) -> dict[tuple[str, str], str]:
    rows = imported.judgements
    return dict(zip(zip(rows["image_id"], rows["concept_id"], strict=True), rows["state"], strict=True))


def faults(path: Path, table: pd.DataFrame = IMAGES_AB) -> str:
    with pytest.raises(ContractViolation) as caught:
        read_labels(path, table, VOCABULARY, reviewer="R")
    assert "nothing was imported" in str(caught.value).lower()
    return "\n".join(caught.value.faults)


def test_wide_sheet_becomes_judgements_that_keep_their_contract(tmp_path: Path) -> None:
    path = sheet(tmp_path, "path,Red,ground_glass_opacity\na.png,1,absent\nfolder/b.png,,uncertain\n")
    imported = read_labels(path, IMAGES_AB, VOCABULARY, reviewer="Dr A")
    assert states(imported) == {
        ("id0", "red"): "present",
        ("id0", "ground-glass-opacity"): "absent",
        ("id1", "ground-glass-opacity"): "uncertain",
    }
    checked = to_pandas(JUDGEMENTS.to_arrow(imported.judgements, "judgements"))
    assert set(checked["witness"]) == {Witness.EXPERT}
    assert set(checked["witness_model"]) == {"Dr A"}
    assert imported.changed["row"].tolist() == [2, 2, 3]


def test_long_sheet(tmp_path: Path) -> None:
    path = sheet(tmp_path, "image_id,concept_id,state\nid1,red,present\nid1,Ground-glass opacity,0\n")
    assert states(read_labels(path, IMAGES_AB, VOCABULARY, reviewer="R")) == {
        ("id1", "red"): "present",
        ("id1", "ground-glass-opacity"): "absent",
    }


def test_attribute_column_names_the_value_that_holds(tmp_path: Path) -> None:
    path = sheet(tmp_path, "path,Shape\na.png,oval\nfolder/b.png,?\n")
    assert states(read_labels(path, IMAGES_AB, VOCABULARY, reviewer="R")) == {
        ("id0", "shape-round"): "absent",
        ("id0", "shape-oval"): "present",
        ("id1", "shape-round"): "uncertain",
        ("id1", "shape-oval"): "uncertain",
    }


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfpath;red\r\na.png;1\r\n",
        b"sep=;\r\npath;red\r\na.png;1\r\n",
        "path\tred\r\na.png\t1\r\n".encode("utf-16"),
        b"path,red,,\n\na.png,1.0,,\n,,,\n",
        b'"path","red"\r\n"a.png","TRUE"\r\n',
        b"path;red\na.png;1,0\n",
        b"path,red\n.\\a.png,WAHR\n",
        b"PATH,RED\rA.PNG,1\r".replace(b"A.PNG", b"a.png"),
        "path,red,comment\na.png,1,très rouge\n".encode("cp1252"),
    ],
    ids=[
        "bom-semicolon-crlf",
        "sep-line",
        "utf-16-tabs",
        "empty-columns-and-rows",
        "quoted-TRUE",
        "decimal-comma",
        "backslash-german",
        "old-mac",
        "windows-1252",
    ],
)
def test_what_spreadsheets_do_to_a_file_changes_nothing(tmp_path: Path, text: bytes) -> None:
    assert states(read_labels(sheet(tmp_path, text), IMAGES_AB, VOCABULARY, reviewer="R")) == {
        ("id0", "red"): "present"
    }


def test_every_fault_is_named_with_its_row_and_nothing_is_imported(tmp_path: Path) -> None:
    text = "path,red,grond_glass_opacity,shape\na.png,maybe,1,square\nmissing.png,1,,\n,1,,\n"
    found = faults(sheet(tmp_path, text))
    assert "row 2, column 'red': expected 1, 0, present" in found
    assert "did you mean 'ground-glass-opacity'" in found
    assert "row 2, column 'shape': expected one of shape round, shape oval, got 'square'" in found
    assert "row 3: column 'path': 'missing.png' is no image of this run" in found
    assert "row 4: expected an image" in found


def test_two_rows_may_repeat_each_other_but_not_contradict(tmp_path: Path) -> None:
    same = sheet(tmp_path, "path,red\na.png,1\na.png,present\n")
    assert len(read_labels(same, IMAGES_AB, VOCABULARY, reviewer="R").judgements) == 1
    assert "row 3, column 'red': says absent where row 2 says present" in faults(
        sheet(tmp_path, "path,red\na.png,1\na.png,0\n")
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("path,red,RED\na.png,1,1\n", "'red' occurs 2 times"),
        ("path,,red\na.png,1,1\n", "column 2: expected a name"),
        ("path,red\na.png,1,1\n", "row 2: expected at most 2 cells, got 3"),
        ("picture,red\na.png,1\n", "expected one of the columns image_id, path"),
        ("path,label\na.png,x\n", "at least one column that names a concept"),
    ],
)
def test_a_broken_header_or_row_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    assert fault in faults(sheet(tmp_path, text))


@pytest.mark.parametrize("text", ["", "path,red\n"])
def test_a_sheet_without_rows_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputRefused, match="at least one row"):
        read_labels(sheet(tmp_path, text), IMAGES_AB, VOCABULARY, reviewer="R")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="could not be read"):
        read_labels(tmp_path / "none.csv", IMAGES_AB, VOCABULARY, reviewer="R")


def test_rows_of_rejected_images_are_counted_and_left_out(tmp_path: Path) -> None:
    # A second copy of an accepted file is rejected under the same id: only the accepted path speaks.
    table = images(["a.png", "copy.png", "cut.png"], [None, "exact_duplicate", "truncated"], ["id0", "id0", "id9"])
    path = sheet(tmp_path, "path,red\na.png,1\ncopy.png,0\ncut.png,1\n")
    imported = read_labels(path, table, VOCABULARY, reviewer="R")
    assert states(imported) == {("id0", "red"): "present"}
    assert imported.n_rows_left_out == 2


def test_frames_of_one_file_need_an_image_id(tmp_path: Path) -> None:
    table = images(["a.dcm", "a.dcm"], ids=["x#0", "x#1"])
    assert "has 2 frames" in faults(sheet(tmp_path, "path,red\na.dcm,1\n"), table)
    named = read_labels(sheet(tmp_path, "image_id,path,red\nx#1,a.dcm,1\n"), table, VOCABULARY, reviewer="R")
    assert states(named) == {("x#1", "red"): "present"}


def labels(rows: list[tuple[str, str, bool | None]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["image_id", "concept_id", "present"])
    frame = frame.assign(
        present=frame["present"].astype("boolean"), probability=0.5, decided_by="vlm", disagreement=0.0
    )
    return to_pandas(LABELS.to_arrow(frame, "labels"))


def test_of_an_edited_export_only_the_edits_are_the_experts_word(tmp_path: Path) -> None:
    current = labels([("id0", "red", True), ("id0", "shape-round", None), ("id1", "red", False)])
    wide = wide_labels(IMAGES_AB, current, VOCABULARY)
    wide.loc[0, "shape-round"] = "0"
    wide.loc[1, "red"] = "uncertain"
    wide.loc[1, "shape-oval"] = "1"
    write_csv(tmp_path / "labels.csv", wide)
    imported = read_labels(tmp_path / "labels.csv", IMAGES_AB, VOCABULARY, reviewer="R", current=current)
    shown = imported.changed[["image_id", "concept_id", "before", "after"]].to_numpy().tolist()
    assert shown == [
        ["id0", "shape-round", "uncertain", "absent"],
        ["id1", "red", "absent", "uncertain"],
        ["id1", "shape-oval", "not_assessed", "present"],
    ]
    assert imported.n_unchanged == 1


def test_an_emptied_cell_takes_nothing_back_but_not_assessed_does(tmp_path: Path) -> None:
    current = labels([("id0", "red", True), ("id1", "red", True)])
    path = sheet(tmp_path, "path,red\na.png,\nfolder/b.png,not_assessed\n")
    imported = read_labels(path, IMAGES_AB, VOCABULARY, reviewer="R", current=current)
    assert states(imported) == {("id1", "red"): "not_assessed"}


awkward_paths = st.lists(
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\\"), min_size=1, max_size=12).filter(
        lambda p: p == p.strip() and not p.startswith("./") and not p.startswith("id")
    )
    | st.sampled_from(["=1+1.png", "-x.png", "@b", "'=quoted", 'a"b,c;.png', "ä é.png"]),
    min_size=1,
    max_size=4,
    unique=True,
)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), paths=awkward_paths, by_path=st.booleans())
def test_states_survive_the_spreadsheet_and_never_collapse(
    data: st.DataObject, paths: list[str], by_path: bool
) -> None:
    table = images(paths)
    drawn = {
        (image_id, concept_id): data.draw(st.sampled_from(list(State)))
        for image_id in table["image_id"]
        for concept_id in VOCABULARY.ids
    }
    frame = pd.DataFrame([(i, c, s.value) for (i, c), s in drawn.items()], columns=["image_id", "concept_id", "state"])
    wide = wide_states(table, frame, VOCABULARY)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.csv"
        write_csv(path, wide.drop(columns="image_id") if by_path else wide)
        found = states(read_labels(path, table, VOCABULARY, reviewer="R"))
    assert found == {cell: state.value for cell, state in drawn.items() if state is not State.NOT_ASSESSED}


def test_given_concepts_of_a_sheet(tmp_path: Path) -> None:
    text = "path,label,red,cell_size,vacuole,age,note\na,x,1,big,yes,61,hi\nb,y,,small,no,40,\n"
    concepts = to_pandas(CONCEPTS.to_arrow(given_concepts(sheet(tmp_path, text)), "concepts"))
    assert concepts["concept_id"].tolist() == ["red", "cell-size-big", "cell-size-small", "vacuole-no", "vacuole-yes"]
    assert concepts["group"].isna().tolist() == [True, False, False, False, False]
    vocabulary = vocabulary_of(concepts)
    assert vocabulary.groups == {
        "cell size": ("cell-size-big", "cell-size-small"),
        "vacuole": ("vacuole-no", "vacuole-yes"),
    }


def test_the_experts_sheet_of_a_real_data_set(shared_data: Path) -> None:
    path = shared_data / "wbcatt" / "expert_attributes.csv"
    raw = pd.read_csv(path)
    table = images(raw["path"].tolist())
    vocabulary = vocabulary_of(given_concepts(path))
    imported = read_labels(path, table, vocabulary, reviewer="WBCAtt", witness=Witness.GIVEN)
    assert len(vocabulary) == 31
    present = imported.judgements[imported.judgements["state"] == "present"]
    # One value of every attribute that is filled in holds, and pandas counts those in its own way.
    assert len(present) == int(raw.drop(columns="path").notna().to_numpy().sum())


def test_label_studios_csv_export_comes_back(tmp_path: Path) -> None:
    text = (
        "annotation_id,annotator,created_at,id,image,image_id,lead_time,red,shape-round,split,updated_at\n"
        "4,1,2026-01-01T00:00:00Z,7,/data/local-files/?d=pixels/id0.png,id0,3.1,present,absent,test,2026-01-01\n"
    )
    imported = read_labels(sheet(tmp_path, text), IMAGES_AB, VOCABULARY, reviewer="R")
    assert states(imported) == {("id0", "red"): "present", ("id0", "shape-round"): "absent"}
