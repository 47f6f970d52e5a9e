"""What other programs read: every state keeps its meaning, and nothing of a rejected image gets out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest

from data_contracts.concepts import Concept, Vocabulary
from data_contracts.tables import IMAGES, LABELS, State, to_pandas
from pipeline.exchange.coco import write_coco
from pipeline.exchange.fiftyone import write_fiftyone
from pipeline.exchange.label_studio import labelling_config, tasks
from pipeline.exchange.records import Record, records, write_json_list

VOCABULARY = Vocabulary.of(
    [
        Concept("red", 'red & "hot"', "Redness <b>inside</b>."),
        Concept("round", "round", group="shape"),
        Concept("oval", "oval", group="shape"),
    ]
)


@pytest.fixture
def images() -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "image_id": ["aa", "bb#1", "cc"],
            "path": ["x/ä b.png", "y.dcm", "z.png"],
            "label": ["ill", None, "well"],
            "split": ["test", None, "train"],
            "modality": "m",
            "width_px": [10, None, 10],
            "height_px": [20, None, 10],
            "rejected": pd.Series([None, None, "unreadable"], dtype="str"),
        }
    )
    return to_pandas(IMAGES.to_arrow(frame, "images"))


@pytest.fixture
def labels() -> pd.DataFrame:
    rows = [
        ("bb#1", "oval", None, 0.5, "vlm"),
        ("aa", "round", False, 0.1, "vlm"),
        ("aa", "red", True, 0.9, "expert"),
        ("cc", "red", True, 0.9, "vlm"),
        ("aa", "gone", True, 0.9, "vlm"),
    ]
    frame = pd.DataFrame(rows, columns=["image_id", "concept_id", "present", "probability", "decided_by"])
    frame["present"] = frame["present"].astype("boolean")
    return to_pandas(LABELS.to_arrow(frame.assign(disagreement=0.0), "labels"))


@pytest.fixture
def found(images: pd.DataFrame, labels: pd.DataFrame) -> list[Record]:
    return list(records(images, labels, VOCABULARY))


def address(record: Record) -> str:
    return record.path


def test_records_are_the_accepted_images_with_their_own_cells_in_vocabulary_order(found: list[Record]) -> None:
    assert [r.image_id for r in found] == ["aa", "bb#1"]
    assert [(c.concept_id, c.state) for c in found[0].cells] == [("red", "present"), ("round", "absent")]
    assert [(c.concept_id, c.state) for c in found[1].cells] == [("oval", "uncertain")]
    assert (found[1].label, found[1].width_px) == (None, None)


def test_label_studio_keeps_the_experts_word_apart_from_the_machines(found: list[Record]) -> None:
    first, second = tasks(found, address, "medmicn r")
    says = {r["from_name"]: r["value"]["choices"] for r in first["predictions"][0]["result"]}
    assert says == {"red": ["present"], "round": ["absent"]}
    assert [r["from_name"] for r in first["annotations"][0]["result"]] == ["red"]
    assert "annotations" not in second
    assert second["predictions"][0]["score"] == 0.5
    assert "ill" not in json.dumps(first), "the class would tell the annotator what to see"


def test_label_studio_config_is_xml_whose_choices_are_the_concepts(found: list[Record]) -> None:
    view = ElementTree.fromstring(labelling_config(VOCABULARY))
    assert [c.get("name") for c in view.iter("Choices")] == list(VOCABULARY.ids)
    assert {c.get("toName") for c in view.iter("Choices")} == {view.find(".//Image").get("name")}  # type: ignore[union-attr]
    assert view.find(".//Header").get("value") == 'red & "hot"'  # type: ignore[union-attr]
    results = [r for task in tasks(found, address, "m") for r in task["predictions"][0]["result"]]
    values = {c.get("value") for c in view.iter("Choice")}
    assert all(set(r["value"]["choices"]) <= values for r in results)


def test_a_list_is_strict_json_and_written_while_it_is_made(tmp_path: Path) -> None:
    def items() -> Iterator[int]:
        yield from range(3)

    assert write_json_list(tmp_path / "l.json", items()) == 3
    assert json.loads((tmp_path / "l.json").read_text()) == [0, 1, 2]
    with pytest.raises(ValueError, match="JSON"):
        write_json_list(tmp_path / "l.json", [float("nan")])
    assert json.loads((tmp_path / "l.json").read_text()) == [0, 1, 2], "what was there is whole"


def test_fiftyone_shows_what_is_present_or_uncertain(tmp_path: Path, found: list[Record]) -> None:
    assert write_fiftyone(tmp_path, found, address, VOCABULARY) == 2
    labels = json.loads((tmp_path / "labels.json").read_text())["labels"]
    assert [c["label"] for c in labels["aa"]] == ['red & "hot"']
    assert labels["bb_1"][0]["attributes"]["tags"] == ["uncertain"]
    assert json.loads((tmp_path / "data.json").read_text()) == {"aa": "x/ä b.png", "bb_1": "y.dcm"}
    assert json.loads((tmp_path / "classes.json").read_text())["labels"] == {"aa": "ill"}
    compile((tmp_path / "load.py").read_text(), "load.py", "exec")


def test_coco_ids_refer_to_each_other_and_states_do_not_collapse(tmp_path: Path, found: list[Record]) -> None:
    assert write_coco(tmp_path / "coco.json", found, address, VOCABULARY, "r") == 2
    coco = json.loads((tmp_path / "coco.json").read_text())
    names = {c["id"]: c["concept_id"] for c in coco["categories"]}
    files = {i["id"]: i["file_name"] for i in coco["images"]}
    told = {(files[a["image_id"]], names[a["category_id"]], a["attributes"]["state"]) for a in coco["annotations"]}
    assert told == {
        ("x/ä b.png", "red", State.PRESENT),
        ("x/ä b.png", "round", State.ABSENT),
        ("y.dcm", "oval", State.UNCERTAIN),
    }
    assert [p.name for p in tmp_path.iterdir()] == ["coco.json"], "nothing is left lying about"
