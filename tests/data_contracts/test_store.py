from __future__ import annotations

import errno
import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from data_contracts import files
from data_contracts.concepts import Concept, Vocabulary
from data_contracts.dataset import AlignedDataset
from data_contracts.errors import ConfigurationError, ContractViolation, InputRefused, StorageError, VocabularyMismatch
from data_contracts.manifest import RunManifest
from data_contracts.store import RunFolder
from data_contracts.tables import ALIGNMENT, IMAGES, LABELS


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.write_manifest(RunManifest.new("run", "images"))
    return folder


def concepts_frame(ids: list[str]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "concept_id": ids,
            "name": ids,
            "definition": [""] * len(ids),
            "proposed_for": [["x", "y"] for _ in ids],
            "origin": ["user"] * len(ids),
            "status": ["kept"] * len(ids),
            "position": range(len(ids)),
        }
    )


def dataset(vocabulary: Vocabulary) -> AlignedDataset:
    frame = pd.DataFrame(
        {
            "image_id": ["i1", "i2"],
            "path": ["1.png", "2.png"],
            "label": ["benign", "malignant"],
            "split": ["train", "test"],
            "group_id": pd.array([None, "p2"], dtype="str"),
        }
    )
    targets = np.array([[0.25, 1.0], [0.0, 0.5]], np.float32)
    mask = np.array([[True, True], [True, False]])
    return AlignedDataset(frame, targets, mask, vocabulary, ("benign", "malignant"))


def judgements(n: int, state: str = "present") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image_id": [f"i{i}" for i in range(n)],
            "concept_id": ["c"] * n,
            "witness": ["expert"] * n,
            "witness_model": ["dr-a"] * n,
            "state": [state] * n,
            "created_at": [datetime.now(UTC)] * n,
        }
    )


def alignment_shard(image_ids: list[str]) -> pa.Table:
    n = len(image_ids)
    return pa.table(
        {
            "image_id": image_ids,
            "concept_id": ["c"] * n,
            "similarity": np.linspace(0, 1, n),
            "null_similarity": np.zeros(n),
            "grid_h": pa.array([2] * n, pa.int64()),
            "grid_w": pa.array([2] * n, pa.int64()),
            "heatmap": pa.array([np.arange(4, dtype=np.float16)] * n, pa.list_(pa.float16())),
        }
    )


def test_a_folder_without_a_run_says_how_to_begin_one(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="medmicn run SOURCE"):
        RunFolder(tmp_path).read_manifest()


def test_a_run_of_another_version_is_refused(run: RunFolder) -> None:
    run.manifest_path.write_text('{"contract": "run/99"}')
    with pytest.raises(ContractViolation, match="expected run/1, found run/99"):
        run.read_manifest()


def test_a_missing_table_names_the_step(run: RunFolder) -> None:
    with pytest.raises(InputRefused, match=r"images\.parquet.*found no file"):
        run.read_images()


def test_a_file_that_is_no_parquet_is_refused(run: RunFolder) -> None:
    (run.path / "images.parquet").write_text("not parquet at all")
    with pytest.raises(ContractViolation, match="expected a Parquet file"):
        run.read_images()


def test_dataset_round_trip(run: RunFolder) -> None:
    run.write_concepts(concepts_frame(["a", "b"]))
    written = dataset(run.vocabulary())
    run.write_dataset(written)
    back = run.read_dataset()
    np.testing.assert_array_equal(back.concepts, written.concepts)
    np.testing.assert_array_equal(back.mask, written.mask)
    assert back.class_names == written.class_names
    assert back.rows("test").tolist() == [1]
    assert back.class_index().tolist() == [0, 1]


def test_a_dataset_for_other_concepts_is_refused(run: RunFolder) -> None:
    run.write_concepts(concepts_frame(["a", "b"]))
    run.write_dataset(dataset(run.vocabulary()))
    run.write_concepts(concepts_frame(["b", "a"]))
    with pytest.raises(VocabularyMismatch, match="vocabulary hash"):
        run.read_dataset()


def test_an_ill_shaped_dataset_is_refused() -> None:
    vocabulary = Vocabulary((Concept("a", "A"),))
    with pytest.raises(ContractViolation, match="expected shape"):
        dataset(vocabulary)


def test_the_ledger_only_grows_and_keeps_its_order(run: RunFolder) -> None:
    assert run.read_judgements().empty
    first = run.append_judgements(judgements(2))
    assert first is not None
    before = first.read_bytes()
    run.append_judgements(judgements(1, "absent"))
    assert first.read_bytes() == before
    assert run.read_judgements()["state"].tolist() == ["present", "present", "absent"]
    assert run.append_judgements(judgements(0)) is None


def test_the_ledger_accepts_rows_with_and_without_optional_values(run: RunFolder) -> None:
    run.append_judgements(judgements(1))
    run.append_judgements(judgements(1).assign(evidence="pale rim", probability=0.5))
    assert len(run.read_judgements()) == 2


def test_alignment_is_replaced_as_a_whole(run: RunFolder) -> None:
    assert run.write_alignment([alignment_shard(["a", "b"]), alignment_shard(["c"])]) == 3
    assert run.write_alignment([alignment_shard(["z"])]) == 1
    assert run.read_alignment_scores()["image_id"].tolist() == ["z"]
    heatmap = next(run.iterate_alignment()).column("heatmap")[0].as_py()
    assert heatmap == [0, 1, 2, 3]


def test_a_failing_alignment_leaves_the_old_one(run: RunFolder) -> None:
    run.write_alignment([alignment_shard(["a"])])

    def shards():
        yield alignment_shard(["b"])
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        run.write_alignment(shards())
    assert run.read_alignment_scores()["image_id"].tolist() == ["a"]
    assert not list(run.path.glob(".alignment*"))


def test_scores_are_read_without_heatmaps(run: RunFolder) -> None:
    run.write_alignment([alignment_shard(["a"])])
    assert "heatmap" not in run.read_alignment_scores()
    assert set(run.read_alignment_scores()) == set(ALIGNMENT.column_names) - {"heatmap"}


def test_only_one_process_works_in_a_run_folder(run: RunFolder) -> None:
    with run.lock(), pytest.raises(ConfigurationError, match="another medmicn process"), RunFolder(run.path).lock():
        pass
    with run.lock():
        pass


def test_receipts_notice_a_changed_file(run: RunFolder) -> None:
    path = run.path / "labels.csv"
    path.write_text("one")
    receipts = run.receipts([path])
    assert run.holds(receipts)
    path.write_text("two")
    assert not run.holds(receipts)
    path.unlink()
    assert not run.holds(receipts)


def test_a_full_disk_keeps_the_old_file_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.txt"
    files.write_text(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.txt"]


def test_csv_mirrors_open_as_utf8_in_spreadsheets(run: RunFolder) -> None:
    run.write_concepts(concepts_frame(["crazy-paving", "größe"]))
    content = (run.path / "concepts.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbf")
    assert pd.read_csv(run.path / "concepts.csv")["proposed_for"].tolist() == ["x; y", "x; y"]


def test_a_table_is_read_a_batch_at_a_time(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    labels = pd.DataFrame({"image_id": [f"i{k // 2}" for k in range(10)], "concept_id": ["a", "b"] * 5})
    labels = labels.assign(present=True, probability=0.5, decided_by="vlm", disagreement=0.0)
    run.write_labels(labels, pd.DataFrame())
    batches = list(run.iterate_rows(LABELS, ["image_id", "probability"], 4))
    assert [batch.num_rows for batch in batches] == [4, 4, 2]
    assert pa.concat_tables(batches).column("image_id").to_pylist() == labels["image_id"].tolist()
    (tmp_path / "images.parquet").write_bytes((tmp_path / "labels.parquet").read_bytes())
    with pytest.raises(ContractViolation, match="contract"):
        next(run.iterate_rows(IMAGES, ["image_id"], 4))
