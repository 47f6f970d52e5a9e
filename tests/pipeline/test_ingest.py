from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_contracts.errors import ImageRejected, SourceRefused
from data_contracts.tables import CONCEPTS, IMAGES, JUDGEMENTS, to_pandas
from pipeline import ingest as module
from pipeline.decode import ImageReader
from pipeline.duplicates import NearDuplicateOptions
from pipeline.ingest import Ingested, IngestOptions, ingest
from pipeline.split import SplitFractions, check_splits

QUICK = IngestOptions(modality="test pattern", near_duplicates=NearDuplicateOptions(enabled=False), n_threads=2)


def draw(path: Path, seed: int, side: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for i in range(20):
        draw(tmp_path / "source" / ("a" if i % 2 else "b") / f"{i}.png", seed=i)
    return tmp_path / "source"


def by_path(done: Ingested) -> pd.DataFrame:
    return done.images.set_index("path")


def stored(done: Ingested) -> pd.DataFrame:
    """The table as the next run reads it."""
    return to_pandas(IMAGES.to_arrow(done.images, "images"))


def test_table_keeps_its_contract(source: Path) -> None:
    seen: list[int] = []
    done = ingest(source, QUICK, advance=seen.append)
    table = IMAGES.to_arrow(done.images, "images")
    IMAGES.check(table, "images")
    assert done.images["path"].tolist() == sorted(done.images["path"])
    row = by_path(done).loc["a/1.png"]
    assert row["image_id"] == hashlib.sha256((source / "a/1.png").read_bytes()).hexdigest()
    assert (row["label"], row["modality"], row["format"]) == ("a", "test pattern", "png")
    assert (row["width_px"], row["height_px"]) == (12, 12)
    assert pd.crosstab(done.images["label"], done.images["split"]).to_numpy().tolist() == [[2, 7, 1]] * 2
    assert sum(seen) == 20
    assert done.warnings == []
    assert done.n_reused == 0
    pd.testing.assert_frame_equal(ingest(source, QUICK).images, done.images)


def test_known_bytes_are_hashed_not_decoded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ingest(source, QUICK)
    (source / "a" / "1.png").rename(source / "a" / "renamed.png")
    draw(source / "a" / "new.png", seed=99)
    decoded: list[Path] = []
    real = module.read_pixels
    monkeypatch.setattr(module, "read_pixels", lambda path, *a, **k: decoded.append(path) or real(path, *a, **k))
    again = ingest(source, QUICK, known=stored(first))
    assert [path.name for path in decoded] == ["new.png"]
    assert again.n_reused == 20
    columns = ["image_id", "split", "width_px", "height_px", "format", "fingerprint"]
    old = first.images.set_index("image_id", drop=False)[columns]
    new = again.images.set_index("image_id", drop=False)[columns]
    pd.testing.assert_frame_equal(new.loc[old.index], old)
    assert "a/renamed.png" in set(again.images["path"])


def test_splits_of_known_images_never_move(source: Path) -> None:
    first = ingest(source, QUICK)
    for i in range(100, 140):
        draw(source / "a" / f"{i}.png", seed=i)
    again = ingest(source, replace(QUICK, seed=7), known=stored(first))
    before = first.images.set_index("image_id")["split"]
    after = again.images.set_index("image_id")["split"]
    pd.testing.assert_series_equal(after[before.index], before)


def test_rejected_images_are_tried_again(source: Path) -> None:
    draw(source / "a" / "large.png", seed=50, side=40)
    small = replace(QUICK, max_pixels=400)
    first = ingest(source, small)
    assert by_path(first).loc["a/large.png", "rejected"] == "too_many_pixels"
    again = ingest(source, QUICK, known=stored(first))
    assert pd.isna(by_path(again).loc["a/large.png", "rejected"])
    shrunk = ingest(source, small, known=stored(again))
    assert by_path(shrunk).loc["a/large.png", "rejected"] == "too_many_pixels"


def test_bad_images_are_rows_and_stop_nothing(source: Path) -> None:
    good = (source / "a" / "1.png").read_bytes()
    (source / "a" / "cut.png").write_bytes(good[:100])
    (source / "a" / "empty.png").touch()
    (source / "a" / "text.png").write_text("not an image")
    (source / "b" / "gone.png").symlink_to(source / "nowhere.png")
    (source / "b" / "loop.png").symlink_to(source / "b" / "loop.png")
    Image.new("1", (20_000, 10_000)).save(source / "b" / "bomb.png")
    done = ingest(source, QUICK)
    IMAGES.to_arrow(done.images, "images")
    rejected = by_path(done)["rejected"].dropna().to_dict()
    assert rejected == {
        "a/cut.png": "truncated",
        "a/empty.png": "empty_file",
        "a/text.png": "not_an_image",
        "b/bomb.png": "too_many_pixels",
        "b/gone.png": "missing_file",
        "b/loop.png": "missing_file",
    }
    bad = done.images[done.images["rejected"].notna()]
    assert bad["split"].isna().all()
    assert bad["image_id"].str.fullmatch("[0-9a-f]{64}").all()
    assert by_path(done).loc["b/gone.png", "image_id"] == hashlib.sha256(b"missing:b/gone.png").hexdigest()


def test_any_name_gets_a_row_that_reads_back(source: Path) -> None:
    names = [b"with space.png", b"100%.png", b"it's \"quoted\".png", b"two\nlines.png", b"caf\xe9.png",
             b"back\\slash.png", "größe-日本.png".encode(), b"x" * 200 + b".png", b"-rf.png", b"=1+1.png"]  # fmt: skip
    deep = source / "a" / ("d" * 120) / ("e" * 120)
    deep.mkdir(parents=True)
    for i, name in enumerate(names):
        draw(source / "tmp.png", seed=200 + i)
        os.rename(source / "tmp.png", os.path.join(os.fsencode(source / "a"), name))
    draw(deep / f"{'f' * 60}.png", seed=300)
    done = ingest(source, QUICK)
    images = to_pandas(IMAGES.to_arrow(done.images, "images"))
    images["path"].str.encode("utf-8")
    assert len(images) == 31
    assert images["rejected"].isna().all()
    assert r"a/caf\xe9.png" in set(images["path"])
    read = ImageReader(source, images)
    for image_id in images["image_id"]:
        assert read(image_id).shape == (12, 12, 3)


def test_rejections_say_why_in_the_table(source: Path) -> None:
    page = Image.new("RGB", (9, 9))
    page.save(source / "a" / "stack.tif", save_all=True, append_images=[page])
    row = by_path(ingest(source, QUICK)).loc["a/stack.tif"]
    assert row["rejected"] == "animated"
    assert "2 frames or pages" in row["detail"]


def test_exact_and_conflicting_copies(source: Path) -> None:
    (source / "a" / "copy.png").write_bytes((source / "a" / "1.png").read_bytes())
    (source / "b" / "other.png").write_bytes((source / "a" / "3.png").read_bytes())
    done = ingest(source, QUICK)
    rejected = by_path(done)["rejected"].dropna().to_dict()
    assert rejected == {
        "a/copy.png": "exact_duplicate",
        "a/3.png": "conflicting_labels",
        "b/other.png": "conflicting_labels",
    }
    IMAGES.to_arrow(done.images, "images")


def test_near_duplicates_stay_together_and_are_marked(source: Path) -> None:
    blob = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3)).astype(np.uint8)).resize((200, 200))
    for i, quality in enumerate((95, 60, 30)):
        blob.save(source / "a" / f"near{i}.jpg", quality=quality)
    done = by_path(ingest(source, replace(QUICK, near_duplicates=NearDuplicateOptions())))
    near = done.loc[[f"a/near{i}.jpg" for i in range(3)]]
    assert near["rejected"].isna().all()
    assert near["near_duplicate_of"].fillna("").tolist() == ["", near["image_id"].iloc[0], near["image_id"].iloc[0]]
    assert near["split"].nunique() == 1
    assert done["near_duplicate_of"].notna().sum() == 2


def given(source: Path, split: dict[int, str], patient: dict[int, str] | None = None) -> None:
    lines = [
        f"{'a' if i % 2 else 'b'}/{i}.png,{'a' if i % 2 else 'b'},{split.get(i, '')},{(patient or {}).get(i, '')}"
        for i in range(20)
    ]
    (source / "labels.csv").write_text("\n".join(["path,label,split,patient_id", *lines]))


def test_given_split_is_respected(source: Path) -> None:
    split = {i: "test" if i < 4 else "val" if i < 8 else "train" for i in range(20)}
    given(source, split)
    done = ingest(source, QUICK)
    number = done.images["path"].str.extract(r"(\d+)\.png")[0].astype(int)
    assert done.images["split"].tolist() == [split[i] for i in number]
    assert done.warnings == []


def test_missing_validation_is_carved_and_then_stays(source: Path) -> None:
    given(source, {i: "test" if i < 4 else "train" for i in range(20)})
    first = ingest(source, QUICK)
    counts = first.images["split"].value_counts()
    assert counts["test"] == 4
    assert counts["val"] == 2
    assert any("has no val" in w for w in first.warnings)
    draw(source / "a" / "new.png", seed=77)
    with (source / "labels.csv").open("a") as stream:
        stream.write("\na/new.png,a,train,")
    again = ingest(source, replace(QUICK, seed=3), known=stored(first))
    before, after = (x.images.set_index("image_id")["split"] for x in (first, again))
    pd.testing.assert_series_equal(after[before.index], before)


def test_half_given_split_is_completed(source: Path) -> None:
    given(source, dict.fromkeys(range(4), "test"))
    done = ingest(source, QUICK)
    assert done.images["split"].value_counts().to_dict() == {"train": 14, "test": 4, "val": 2}
    assert "16 image(s) have no given split" in done.warnings[0]


def test_patients_across_a_given_split_are_refused_by_name(source: Path) -> None:
    split = {i: "test" if i < 4 else "val" if i < 8 else "train" for i in range(20)}
    given(source, split, {0: "P-17", 9: "P-17"})
    with pytest.raises(SourceRefused, match=r"1 lie in several: 'P-17'.*allow patient overlap"):
        ingest(source, QUICK)
    done = ingest(source, replace(QUICK, allow_patient_overlap=True))
    assert any("patient or group(s) lie in more than one split: 'P-17'" in w for w in done.warnings)


def test_given_split_without_training_images_is_refused(source: Path) -> None:
    given(source, dict.fromkeys(range(20), "test"))
    with pytest.raises(SourceRefused, match="expected images in train, got only test"):
        ingest(source, QUICK)


def test_patients_stay_together(source: Path) -> None:
    given(source, {}, {i: f"p{i // 4}" for i in range(20)})
    images = ingest(source, QUICK).images
    assert check_splits(images) == []
    assert images["split"].nunique() == 3


def test_given_concepts_become_judgements(source: Path) -> None:
    (source / "labels.csv").write_text(
        "path,label,Dark nucleus,Dark-nucleus,comment\n"
        "a/1.png,a,1,0,x\nb/2.png,b,0,,y\nb/4.png,b,uncertain,,\nb/6.png,b,,,\n"
    )
    done = ingest(source, QUICK)
    CONCEPTS.to_arrow(done.given_concepts, "concepts")
    JUDGEMENTS.to_arrow(done.given_judgements, "judgements")
    assert done.given_concepts["concept_id"].tolist() == ["dark-nucleus", "dark-nucleus-2"]
    assert set(done.given_concepts["origin"]) == {"given"}
    paths = done.images.set_index("image_id")["path"]
    said = [(paths[r.image_id], r.concept_id, r.state) for r in done.given_judgements.itertuples()]
    assert said == [
        ("a/1.png", "dark-nucleus", "present"),
        ("a/1.png", "dark-nucleus-2", "absent"),
        ("b/2.png", "dark-nucleus", "absent"),
        ("b/4.png", "dark-nucleus", "uncertain"),
    ]
    assert set(done.given_judgements["witness"]) == {"given"}
    pd.testing.assert_frame_equal(ingest(source, QUICK).given_judgements, done.given_judgements)


def test_a_class_with_one_image_trains(source: Path) -> None:
    draw(source / "rare" / "1.png", seed=500)
    done = ingest(source, QUICK)
    assert by_path(done).loc["rare/1.png", "split"] == "train"
    assert any("class 'rare' has one image: it is in train" in w for w in done.warnings)


def test_one_class_is_refused(tmp_path: Path) -> None:
    for i in range(3):
        draw(tmp_path / "only" / f"{i}.png", seed=i)
    with pytest.raises(SourceRefused, match=r"at least 2 classes, got one: 'only' \(3 images"):
        ingest(tmp_path, QUICK)


def test_nothing_usable_is_refused_with_the_reasons(tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        (tmp_path / name).touch()
    (tmp_path / "3.png").write_text("text")
    with pytest.raises(SourceRefused, match="none of 3 image.*2 empty_file, 1 not_an_image"):
        ingest(tmp_path, QUICK)


def test_unlabelled_images_are_split_and_may_be_annotated(tmp_path: Path) -> None:
    for i in range(10):
        draw(tmp_path / f"{i}.png", seed=i)
    done = ingest(tmp_path, QUICK)
    assert done.layout == "unlabelled"
    assert done.images["label"].isna().all()
    assert done.images["split"].value_counts().to_dict() == {"train": 7, "test": 2, "val": 1}
    IMAGES.to_arrow(done.images, "images")


def test_everything_can_be_training(source: Path) -> None:
    done = ingest(source, replace(QUICK, fractions=SplitFractions(1.0, 0.0, 0.0)))
    assert set(done.images["split"]) == {"train"}


def test_classes_that_vanish_or_differ_in_case_are_named(source: Path) -> None:
    draw(source / "A" / "1.png", seed=600)
    draw(source / "A" / "2.png", seed=601)
    (source / "broken").mkdir()
    (source / "broken" / "x.png").touch()
    text = " ".join(ingest(source, QUICK).warnings)
    assert "differ only in upper and lower case" in text
    assert "every image of class(es) 'broken' was rejected" in text


def test_threads_run_only_a_few_files_ahead(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the folder: no more results wait than threads can be kept busy with."""
    started, finished, most = [0], [0], [0]
    real = module._rows_of

    def counting(*args: object) -> object:
        started[0] += 1
        most[0] = max(most[0], started[0] - finished[0])
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_rows_of", counting)
    ingest(source, QUICK, advance=lambda n: finished.__setitem__(0, finished[0] + n))
    assert started[0] == finished[0] == 20
    assert most[0] <= 4 * 2 + 1


def test_real_official_split_is_kept(shared_data: Path) -> None:
    folder = shared_data / "covid-ct"
    labels = pd.read_csv(folder / "labels.csv").set_index("path")
    done = ingest(folder, IngestOptions(modality="chest CT"))
    images = by_path(done)
    assert len(images) == 746
    leaks = images.index[images["rejected"] == "near_duplicate_across_splits"].tolist()
    assert leaks == [
        "images/covid/2020.03.22.20040782-p24-1533-6.png",
        "images/non_covid/71%0.jpg",
        "images/non_covid/71%1.jpg",
    ]
    kept = images[images["rejected"].isna()]
    assert len(kept) == 743
    assert (kept["split"] == labels.loc[kept.index, "split"]).all()
    assert (kept["group_id"] == labels.loc[kept.index, "patient_id"]).all()
    assert (kept["split"] == "test").sum() == 203, "the test set is whole"
    assert images["format"].value_counts().to_dict() == {"png": 510, "jpeg": 236}
    with pytest.raises(ImageRejected):
        ImageReader(folder, done.images)(images.loc[leaks[0], "image_id"])
