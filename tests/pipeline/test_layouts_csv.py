from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_contracts.errors import RejectReason, SourceRefused
from data_contracts.tables import Split, State
from pipeline.layouts import Entry, SourceListing, list_source
from pipeline.paths import os_path, table_path

PNG = b"\x89PNG\r\n\x1a\n"


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG)
    return folder


def listing(folder: Path, text: str | bytes, name: str = "labels.csv") -> SourceListing:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return list_source(folder)


def only(found: SourceListing) -> Entry:
    (entry,) = found.entries
    return entry


def test_all_columns_are_read(tmp_path: Path) -> None:
    make(tmp_path, "x/1.png", "x/2.png")
    found = listing(
        tmp_path,
        "path,label,split,patient_id,Dark nucleus,vacuole,site\n"
        "x/1.png,a,Training,p1,1,present,Bonn\nx/2.png,b,test,p2,0,,Köln\n",
    )
    assert found.layout == "csv"
    assert found.concept_names == ["Dark nucleus", "vacuole"]
    first, second = found.entries
    assert (first.label, first.split, first.group_id) == ("a", Split.TRAIN, "p1")
    assert first.concepts == {"Dark nucleus": State.PRESENT, "vacuole": State.PRESENT}
    assert second.concepts == {"Dark nucleus": State.ABSENT}, "an empty cell says nothing"
    assert len(found.warnings) == 1
    assert "'site'" in found.warnings[0]


def test_the_states_never_collapse(tmp_path: Path) -> None:
    make(tmp_path, *[f"{i}.png" for i in range(6)])
    cells = ["1.0", "FALSE", "uncertain", "not_assessed", "", "Absent"]
    found = listing(tmp_path, "file,c\n" + "".join(f"{i}.png,{cell}\n" for i, cell in enumerate(cells)))
    assert [e.concepts.get("c") for e in found.entries] == [
        State.PRESENT, State.ABSENT, State.UNCERTAIN, State.NOT_ASSESSED, None, State.ABSENT
    ]  # fmt: skip


@pytest.mark.parametrize(
    "encode",
    [
        lambda t: ("\ufeff" + t).encode(),
        lambda t: t.replace("\n", "\r\n").encode(),
        lambda t: t.replace("\n", "\r").encode(),
        lambda t: t.replace(",", ";").encode(),
        lambda t: t.replace(",", "\t").encode("utf-16"),
        lambda t: t.encode("cp1252"),
    ],
    ids=["bom", "crlf", "old-mac", "semicolon", "utf-16", "windows-1252"],
)
def test_damage_by_spreadsheets_does_not_matter(tmp_path: Path, encode: object) -> None:
    make(tmp_path, "größe 1.png")
    data = encode("path,label\n\ngröße 1.png,Entzündung\n\n")  # type: ignore[operator]
    entry = only(listing(tmp_path, data))
    assert (entry.path, entry.label, entry.rejected) == ("größe 1.png", "Entzündung", None)


@given(raw=st.binary(min_size=1, max_size=40).filter(lambda b: not set(b) & {0, 47} and b not in {b".", b".."}))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_name_can_be_listed_by_its_table_path(tmp_path: Path, raw: bytes) -> None:
    text = table_path(os.fsdecode(raw) + ".png")
    if text.strip() != text or "\r" in text or text.startswith("'"):
        return  # a CSV does not keep these
    folder = tmp_path / os.urandom(8).hex()
    folder.mkdir()
    path = folder / os_path(text)
    path.write_bytes(PNG)
    stream = io.StringIO()
    csv.writer(stream).writerows([("path", "label"), (text, "a")])
    entry = only(listing(folder, stream.getvalue()))
    assert entry.rejected is None
    assert (folder / os_path(entry.path)).samefile(path)


def test_files_are_found_by_path_name_or_stem(tmp_path: Path) -> None:
    make(tmp_path, "images/deep/ISIC_1.png", "images/2.png", "d/3.png")
    found = listing(tmp_path, f"image_id,dx\nISIC_1,nv\n2.png,mel\nd\\3.png,nv\n{tmp_path}/d/3.png,nv\n")
    assert {e.path: e.label for e in found.entries} == {
        "d/3.png": "nv", "images/2.png": "mel", "images/deep/ISIC_1.png": "nv"
    }  # fmt: skip


def test_file_without_a_row_is_left_out_and_named(tmp_path: Path) -> None:
    make(tmp_path, "1.png", "2.png")
    found = listing(tmp_path, "path,label\n1.png,a\n")
    assert only(found).path == "1.png"
    assert "1 image(s) of SOURCE are not listed and were left out: '2.png'" in found.warnings[0]


def test_row_without_a_file_is_a_rejected_entry(tmp_path: Path) -> None:
    make(tmp_path, "1.png", "a/dup.png", "b/dup.png")
    long = "x" * 300 + ".png"
    found = listing(tmp_path, f"path,label\n1.png,a\ngone.png,b\n{long},b\ndup.png,a\n,a\n")
    reasons = {e.path: e.rejected for e in found.entries}
    assert reasons == {
        "1.png": None,
        "gone.png": RejectReason.MISSING_FILE,
        long: RejectReason.MISSING_FILE,
        "dup.png": RejectReason.MISSING_FILE,
    }
    ambiguous = next(e for e in found.entries if e.path == "dup.png")
    assert ambiguous.detail is not None
    assert "fits 2 files" in ambiguous.detail
    assert any("row 6 names no file" in w for w in found.warnings)


@pytest.mark.parametrize(
    "path",
    ["../secret.png", "/etc/secret.png", "a/../../secret.png", "..\\secret.png", "a\\..\\..\\secret.png", "C:\\x.png"],
)
def test_paths_do_not_leave_source(tmp_path: Path, path: str) -> None:
    make(tmp_path, "secret.png", "source/1.png")
    found = listing(tmp_path / "source", f"path,label\n1.png,a\n{path},b\n")
    assert [e.rejected for e in found.entries if e.path != "1.png"] == [RejectReason.OUTSIDE_SOURCE]


def test_a_leading_backslash_stays_in_source(tmp_path: Path) -> None:
    make(tmp_path, "outside.png", "source/1.png")
    absolute = str(tmp_path / "outside.png").replace("/", "\\")
    found = listing(tmp_path / "source", f"path,label\n1.png,a\n{absolute},b\n")
    assert [e.rejected for e in found.entries if e.path != "1.png"] == [RejectReason.MISSING_FILE]


def test_equal_rows_are_one_and_contradictions_are_rejected(tmp_path: Path) -> None:
    make(tmp_path, "1.png", "2.png", "3.png", "4.png")
    found = listing(
        tmp_path,
        "path,label,split,patient,c\n1.png,a,train,p,1\n1.png,a,,,1\n2.png,a,,,\n2.png,b,,,\n"
        "3.png,a,train,,\n3.png,a,test,,\n4.png,a,,,1\n4.png,a,,,0\n",
    )
    one, two, three, four = found.entries
    assert (one.rejected, one.label, one.split, one.group_id) == (None, "a", Split.TRAIN, "p")
    assert (two.rejected, two.label) == (RejectReason.CONFLICTING_LABELS, None)
    assert two.detail is not None
    assert "2 labels: 'a', 'b'" in two.detail
    assert three.rejected is RejectReason.CONFLICTING_LABELS
    assert four.concepts == {"c": State.UNCERTAIN}
    assert any("4 file(s) are listed more than once" in w for w in found.warnings)


def test_labels_csv_wins_and_the_others_are_named(tmp_path: Path) -> None:
    make(tmp_path, "1.png")
    (tmp_path / "expert_attributes.csv").write_text("path,colour\n1.png,red\n")
    (tmp_path / "broken.csv").write_bytes(b"\0\0")
    found = listing(tmp_path, "path,label\n1.png,a\n")
    assert only(found).label == "a"
    assert "'broken.csv', 'expert_attributes.csv'" in found.warnings[0]


def test_two_lists_are_ambiguous(tmp_path: Path) -> None:
    make(tmp_path, "1.png")
    (tmp_path / "a.csv").write_text("path,label\n1.png,a\n")
    with pytest.raises(SourceRefused, match=r"'a.csv', 'b.csv'.*Name the one that counts labels.csv"):
        listing(tmp_path, "path,label\n1.png,b\n", "b.csv")


def test_answer_sheets_and_tables_of_something_else_are_not_read(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "prices.csv").write_text("item,price\nlens,3\n")
    found = listing(tmp_path, "path,round\na/1.png,1\nb/2.png,0\n", "truth.csv")
    assert found.layout == "class_folders"
    assert found.concept_names == []


def test_concepts_without_labels_keep_the_labels_of_the_folders(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png", "b/2.png")
    found = listing(tmp_path, "path,round\na/1.png,1\nb/2.png,0\n", "concepts.csv")
    assert [(e.label, e.concepts["round"]) for e in found.entries] == [("a", State.PRESENT), ("b", State.ABSENT)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n", "at least one row"),
        ("a,b\n1,2\n", "expected a column that names the files, got 'a', 'b'"),
        ("path,label,label\n1.png,a,b\n", "'label' twice"),
        ("path,label\n1.png,a,b\n", r"expected 2 cells a row, got more in row\(s\) '2'"),
        ("path,label,split\n1.png,a,train\n\n1.png,a,holdout\n", "train, val or test, got row 4: 'holdout'"),
        ('path,label\n"1.png,a\n', "breaks off"),
        ("path,label\nnot.png,a\nthere.png,b\n", "none of the 2 file"),
        (b"path,label\n1.png,\0\n", "binary"),
    ],
)
def test_useless_lists_are_refused_by_name(tmp_path: Path, text: str | bytes, message: str) -> None:
    make(tmp_path, "1.png")
    with pytest.raises(SourceRefused, match=message) as caught:
        listing(tmp_path, text)
    assert "labels.csv" in str(caught.value)


def test_a_file_name_that_looks_like_a_drive_is_found(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"A:\x80.png")
    path.write_bytes(PNG)
    stream = io.StringIO()
    csv.writer(stream).writerows([("path", "label"), (table_path(path.name), "a")])
    assert only(listing(tmp_path, stream.getvalue())).rejected is None
