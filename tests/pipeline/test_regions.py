"""Regions as people bring them: boxes and masks, and every fault they can have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import ConfigurationError, ContractViolation
from pipeline.regions import read_regions

VOCABULARY = Vocabulary.of([Concept("dark-centre", "dark centre"), Concept("scale", "scale")])
IMAGES = pd.DataFrame(
    {
        "image_id": ["a", "b", "c", "d"],
        "path": ["x/one.png", "x/two.png", "y/two.png", "y/bad.png"],
        "width_px": [30, 30, 40, 30],
        "height_px": [20, 20, 20, 20],
        "rejected": [None, None, None, "truncated"],
    }
)
HEADER = "path,concept,x0,y0,x1,y1"


def csv(tmp_path: Path, *rows: str, header: str = HEADER) -> Path:
    path = tmp_path / "regions.csv"
    path.write_text("\n".join([header, *rows]))
    return path


def mask(folder: Path, name: str, pixels: np.ndarray) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_boxes_of_one_cell_add_up_and_concepts_go_by_id_or_name(tmp_path: Path) -> None:
    path = csv(tmp_path, "x/one.png,dark-centre,2,3,5,4", "x/one.png,Dark Centre,20,10,30,20", "one,scale,0.5,0,1.5,1")
    found = read_regions(path, IMAGES, VOCABULARY)
    assert found.cells == {("a", "dark-centre"), ("a", "scale")}
    expected = np.zeros((20, 30), bool)
    expected[3:4, 2:5] = True
    expected[10:20, 20:30] = True
    np.testing.assert_array_equal(found.mask("a", "dark-centre"), expected)
    assert found.mask("a", "scale").sum() == 2  # a pixel that a box covers in part belongs to it


def test_a_spreadsheet_with_semicolons_and_decimal_commas_is_read(tmp_path: Path) -> None:
    path = csv(tmp_path, "x/one.png;scale;2,0;3;5;4", header=HEADER.replace(",", ";"))
    assert read_regions(path, IMAGES, VOCABULARY).mask("a", "scale").sum() == 3


def test_every_fault_is_told_with_row_and_column_at_once(tmp_path: Path) -> None:
    path = csv(
        tmp_path,
        "x/one.png,dark-centre,2,3,5,4",
        "nobody.png,dark-center,2,3,5,4",
        "two.png,scale,2,3,5,4",
        "x/one.png,scale,a,3,5,4",
        "x/one.png,scale,-1,9,31,8",
        "x/one.png,scale,0,0,5,nan",
    )
    with pytest.raises(ContractViolation, match="Nothing was aligned") as caught:
        read_regions(path, IMAGES, VOCABULARY)
    faults = caught.value.faults
    assert [fault.partition(":")[0] for fault in faults] == [
        "row 3, column 'path'",
        "row 3, column 'concept'",
        "row 4, column 'path'",
        "row 5, column 'x0'",
        "row 6, column 'x0'",
        "row 6, column 'x1'",
        "row 6, column 'y1'",
        "row 7, column 'y1'",
    ]
    assert "did you mean 'dark-centre'?" in faults[1]
    assert "2 images" in faults[2]
    assert "at most 30, the image's width, got 31" in faults[5]


def test_a_header_without_a_column_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ContractViolation, match="'y1' is missing"):
        read_regions(csv(tmp_path, "x/one.png,scale,1,2,3", header="path,concept,x0,y0,x1"), IMAGES, VOCABULARY)


def test_regions_of_rejected_images_are_left_out(tmp_path: Path) -> None:
    found = read_regions(csv(tmp_path, "y/bad.png,scale,1,2,3,4", "x/one.png,scale,1,2,3,4"), IMAGES, VOCABULARY)
    assert found.cells == {("a", "scale")}


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "P"])
def test_masks_of_any_kind_are_regions_where_they_are_not_black(tmp_path: Path, mode: str) -> None:
    grey = np.zeros((20, 30), np.uint8)
    grey[5:9, 10:12] = 255
    path = tmp_path / "scale" / "one.png"
    path.parent.mkdir()
    Image.fromarray(grey).convert("RGB").convert(mode).save(path)
    np.testing.assert_array_equal(read_regions(tmp_path, IMAGES, VOCABULARY).mask("a", "scale"), grey > 0)


def test_masks_are_found_by_whole_path_where_a_name_is_not_enough(tmp_path: Path) -> None:
    mask(tmp_path, "scale/y/two.png", np.ones((20, 40), np.uint8))
    mask(tmp_path, ".hidden/one.png", np.ones((1, 1), np.uint8))
    found = read_regions(tmp_path, IMAGES, VOCABULARY)
    assert found.cells == {("c", "scale")}
    assert found.mask("c", "scale").all()


def test_every_faulty_mask_is_told_at_once(tmp_path: Path) -> None:
    mask(tmp_path, "scale/one.png", np.ones((20, 31), np.uint8))
    mask(tmp_path, "scale/two.png", np.ones((20, 30), np.uint8))
    mask(tmp_path, "scales/one.png", np.ones((20, 30), np.uint8))
    (tmp_path / "dark-centre").mkdir()
    (tmp_path / "dark-centre" / "one.png").write_text("no picture")
    with pytest.raises(ContractViolation) as caught:
        read_regions(tmp_path, IMAGES, VOCABULARY)
    text = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 4
    for part in ("30 × 20 px, got 31 × 20 px", "name of 2 images", "did you mean 'scale'?", "got no picture"):
        assert part in text


def test_nothing_at_the_path_is_a_setting_to_correct(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"align\.regions"):
        read_regions(tmp_path / "nowhere", IMAGES, VOCABULARY)
