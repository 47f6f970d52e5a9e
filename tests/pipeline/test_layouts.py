from __future__ import annotations

from pathlib import Path

import pytest

from data_contracts.errors import SourceRefused
from data_contracts.tables import Split
from pipeline.layouts import SourceListing, list_source

PNG = b"\x89PNG\r\n\x1a\n"


def make(folder: Path, *names: str, data: bytes = PNG) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def labels(listing: SourceListing) -> dict[str, str | None]:
    return {entry.path: entry.label for entry in listing.entries}


def test_class_folders(tmp_path: Path) -> None:
    listing = list_source(make(tmp_path, "b/2.png", "a/deep/er/1.png", "a/0.png"))
    assert listing.layout == "class_folders"
    assert list(labels(listing).items()) == [("a/0.png", "a"), ("a/deep/er/1.png", "a"), ("b/2.png", "b")]
    assert listing.warnings == []


def test_class_folders_inside_a_wrapper(tmp_path: Path) -> None:
    listing = list_source(make(tmp_path, "dataset/images/a/1.png", "dataset/images/b/2.png"))
    assert labels(listing) == {"dataset/images/a/1.png": "a", "dataset/images/b/2.png": "b"}


def test_split_folders_are_a_given_split(tmp_path: Path) -> None:
    listing = list_source(make(tmp_path, "Train/a/1.png", "Train/b/2.png", "validation/a/3.png", "test/b/4.png"))
    assert {e.path: (e.label, e.split) for e in listing.entries} == {
        "Train/a/1.png": ("a", Split.TRAIN),
        "Train/b/2.png": ("b", Split.TRAIN),
        "test/b/4.png": ("b", Split.TEST),
        "validation/a/3.png": ("a", Split.VAL),
    }


@pytest.mark.parametrize("names", [("1.png", "2.png"), ("images/1.png", "images/2.png")])
def test_flat_images_are_unlabelled(tmp_path: Path, names: tuple[str, ...]) -> None:
    listing = list_source(make(tmp_path, *names))
    assert listing.layout == "unlabelled"
    assert set(labels(listing).values()) == {None}


def test_images_beside_class_folders_are_kept_without_a_label(tmp_path: Path) -> None:
    listing = list_source(make(tmp_path, "a/1.png", "b/2.png", "stray.png"))
    assert labels(listing)["stray.png"] is None
    assert "'stray.png'" in listing.warnings[0]


def test_names_decide_what_is_listed_and_bytes_where_names_are_silent(tmp_path: Path) -> None:
    make(tmp_path, "a/notes.txt", "a/readme", "a/weights.pt", data=b"no image")
    make(tmp_path, "a/IM0001", "a/1.2.840.113", "b/scan.heic", "b/volume.nii.gz", "b/broken.PNG")
    make(tmp_path, "b/broken.PNG", data=b"no image")
    assert [e.path for e in list_source(tmp_path).entries] == [
        "a/1.2.840.113", "a/IM0001", "b/broken.PNG", "b/scan.heic", "b/volume.nii.gz"
    ]  # fmt: skip


def test_source_that_is_no_folder_or_has_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceRefused, match="no image in 0 file"):
        list_source(tmp_path)
    make(tmp_path, "notes.txt", "a/readme.md", data=b"text")
    with pytest.raises(SourceRefused, match="no image in 2 file"):
        list_source(tmp_path)
    with pytest.raises(SourceRefused, match="expected a folder, got a file"):
        list_source(tmp_path / "notes.txt")
    with pytest.raises(SourceRefused, match="expected a folder, got nothing"):
        list_source(tmp_path / "nowhere")
