from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.paths import os_path, table_path, walk


@given(st.binary(min_size=1, max_size=60))
def test_every_name_round_trips_as_valid_unicode(raw: bytes) -> None:
    name = os.fsdecode(raw)
    text = table_path(name)
    text.encode("utf-8")
    assert os.fsencode(os_path(text)) == raw


@given(a=st.binary(max_size=12), b=st.binary(max_size=12))
def test_different_names_have_different_spellings(a: bytes, b: bytes) -> None:
    assert (table_path(os.fsdecode(a)) == table_path(os.fsdecode(b))) == (a == b)


def test_ordinary_names_stand_as_they_are() -> None:
    for name in ("a/b c.png", "100%.png", 'it\'s "quoted".png', "zwei\nZeilen.png", "größe.png"):
        assert table_path(name) == name
    assert table_path(os.fsdecode(b"caf\xe9\\1.png")) == r"caf\xe9\\1.png"


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_walk_is_sorted_and_leaves_out_what_systems_leave_behind(tmp_path: Path) -> None:
    make(tmp_path, "b/2.png", "b/10.png", "a.png", ".hidden/x.png", "b/.DS_Store", "Thumbs.db", "__MACOSX/b/._2.png",
         "b/.ipynb_checkpoints/2-checkpoint.png")  # fmt: skip
    assert walk(tmp_path).files == ["a.png", "b/10.png", "b/2.png"]


def test_loops_are_cut_and_named(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "over").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "over").symlink_to(tmp_path / "a")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    found = walk(tmp_path)
    assert found.files == ["a/1.png", "b/2.png", "self.png"]
    assert len(found.warnings) == 3
    assert all("read already" in warning for warning in found.warnings)


def test_links_to_folders_elsewhere_are_followed(tmp_path: Path) -> None:
    make(tmp_path / "store", "1.png")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "benign").symlink_to(tmp_path / "store")
    assert walk(tmp_path / "source").files == ["benign/1.png"]


def test_of_two_links_to_a_folder_the_first_by_name_counts(tmp_path: Path) -> None:
    make(tmp_path / "store", "1.png")
    for name in ("a", "b", "c"):
        (tmp_path / "source" / name).mkdir(parents=True)
        (tmp_path / "source" / name / "link").symlink_to(tmp_path / "store")
    assert walk(tmp_path / "source").files == ["a/link/1.png"]


def test_excluded_folders_are_not_part_of_it(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png", "runs/x/model/map.png")
    assert walk(tmp_path, exclude=[tmp_path / "runs" / "x"]).files == ["a/1.png"]


def test_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a/1.png", "b/2.png")
    real = os.scandir

    def scandir(path: Path) -> object:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = walk(tmp_path)
    assert found.files == ["a/1.png"]
    assert found.warnings == ["b: folder could not be read (Permission denied); passed over."]
