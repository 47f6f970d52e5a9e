from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from data_contracts.errors import RejectReason, SourceRefused
from data_contracts.tables import CONCEPTS, JUDGEMENTS, State
from pipeline.ingest import ingest
from pipeline.layouts import list_source

PNG = b"\x89PNG\r\n\x1a\n"


def make(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(PNG)


def ddi_table(folder: Path, name: str = "ddi_metadata.csv", **more: list[object]) -> None:
    rows = {
        "DDI_ID": [1, 2, 3],
        "DDI_file": ["000001.png", "000002.png", "000003.png"],
        "skin_tone": [56, 12, 34],
        "malignant": [True, False, False],
        "disease": ["melanoma", "acne", "eczema"],
    }
    pd.DataFrame(rows | more).to_csv(folder / name)


@pytest.mark.parametrize("subfolder", ["", "images"])
def test_ddi(tmp_path: Path, subfolder: str) -> None:
    make(tmp_path / subfolder, ["000001.png", "000002.png"])
    ddi_table(tmp_path)
    found = list_source(tmp_path)
    assert found.layout == "ddi"
    assert {e.path.rpartition("/")[2]: (e.label, e.rejected) for e in found.entries} == {
        "000001.png": ("malignant", None),
        "000002.png": ("benign", None),
        "000003.png": ("benign", RejectReason.MISSING_FILE),
    }
    assert found.concept_names == []


def test_ddi_with_its_own_concepts(tmp_path: Path) -> None:
    make(tmp_path / "images", ["000001.png", "000002.png", "000003.png"])
    ddi_table(tmp_path, "ddi_metadata_concept.csv", Plaque=[1, 0, 0], Scale=[0, 0, 1])
    found = list_source(tmp_path)
    assert found.concept_names == ["Plaque", "Scale"]
    assert found.entries[0].concepts == {"Plaque": State.PRESENT, "Scale": State.ABSENT}


def test_skincon_on_ddi_adds_concepts_and_exclusions(tmp_path: Path, shared_data: Path) -> None:
    table = pd.read_csv(shared_data / "skincon" / "annotations_ddi.csv")
    excluded = table.loc[table["Do not consider this image"] == 1, "ImageID"].iloc[0]
    kept = table.loc[table["Do not consider this image"] == 0, "ImageID"].iloc[0]
    make(tmp_path / "images", [excluded, kept])
    table[table["ImageID"].isin([excluded, kept])].to_csv(tmp_path / "annotations_ddi.csv")
    found = list_source(tmp_path)
    assert found.layout == "skincon_ddi"
    assert len(found.concept_names) == 48, "SkinCon has 48 concepts"
    by_path = {e.path: e for e in found.entries}
    assert by_path[f"images/{excluded}"].rejected is RejectReason.EXCLUDED_BY_SOURCE
    said = {name for name, state in by_path[f"images/{kept}"].concepts.items() if state is State.PRESENT}
    row = table.set_index("ImageID").loc[kept, found.concept_names]
    assert said == set(row.index[row == 1])


def test_skincon_and_fitzpatrick17k_as_published(tmp_path: Path, shared_data: Path) -> None:
    """Real tables, invented pictures: 30 of the 3,690 annotated images, and one that has a label only."""
    source = shared_data / "skincon"
    annotated = pd.read_csv(source / "annotations_fitzpatrick17k.csv")
    labels = pd.read_csv(source / "fitzpatrick17k.csv").set_index("md5hash")["three_partition_label"]
    part = annotated[annotated["Do not consider this image"] == 0].groupby(
        annotated["ImageID"].str[:-4].map(labels)
    ).head(10)  # fmt: skip
    plain = next(h for h in labels.index if f"{h}.jpg" not in set(annotated["ImageID"]))
    (tmp_path / "images").mkdir()
    for i, name in enumerate([*part["ImageID"], f"{plain}.jpg"]):
        Image.effect_noise((40, 40), 60 + i).convert("RGB").save(tmp_path / "images" / name)
    for name in ("annotations_fitzpatrick17k.csv", "fitzpatrick17k.csv"):
        (tmp_path / name).symlink_to(source / name)

    done = ingest(tmp_path)
    accepted = done.images[done.images["rejected"].isna()]
    assert done.layout == "fitzpatrick17k"
    assert accepted["label"].value_counts().to_dict() == {"benign": 10, "malignant": 10, "non-neoplastic": 10} | {
        labels[plain]: 11
    }
    counts = done.images["rejected"].value_counts()
    assert counts["missing_file"] + counts["excluded_by_source"] == len(annotated) - 30
    assert counts["excluded_by_source"] == (annotated["Do not consider this image"] == 1).sum()
    assert any(f"{len(labels) - len(annotated) - 1} row(s) without concepts" in w for w in done.warnings)

    JUDGEMENTS.to_arrow(done.given_judgements, "judgements")
    CONCEPTS.to_arrow(done.given_concepts, "concepts")
    assert len(done.given_judgements) == 30 * 48
    names = dict(zip(done.given_concepts["concept_id"], done.given_concepts["name"], strict=True))
    present = done.given_judgements[done.given_judgements["state"] == "present"]
    found = present["concept_id"].map(names).value_counts().to_dict()
    expected = part[list(names.values())].sum()
    assert found == expected[expected > 0].to_dict()


def test_tables_without_their_images_are_refused(shared_data: Path) -> None:
    with pytest.raises(SourceRefused, match="published apart from the tables"):
        list_source(shared_data / "skincon")


def test_two_data_sets_in_one_folder_are_refused(tmp_path: Path) -> None:
    make(tmp_path, ["000001.png", "abc.jpg"])
    ddi_table(tmp_path)
    (tmp_path / "fitzpatrick17k.csv").write_text("md5hash,three_partition_label\nabc,benign\n")
    with pytest.raises(SourceRefused, match="of DDI and of Fitzpatrick17k"):
        list_source(tmp_path)


def test_table_of_another_shape_is_refused_by_column(tmp_path: Path) -> None:
    make(tmp_path, ["000001.png"])
    (tmp_path / "ddi_metadata.csv").write_text("DDI_file,skin_tone\n000001.png,12\n")
    with pytest.raises(SourceRefused, match="ddi_metadata.csv: expected a column 'malignant'"):
        list_source(tmp_path)
