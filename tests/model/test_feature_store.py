from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_contracts.errors import RejectReason, StorageError
from model.backbones import build_backbone
from model.data import in_batches
from model.feature_store import FeatureStore
from model.prepare import prepare


def rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 5)).astype(np.float32)


def test_what_was_appended_is_found_by_id_in_a_new_process(tmp_path: Path) -> None:
    first, second = rows(3), rows(2, 1)
    store = FeatureStore(tmp_path, 5)
    store.append(["a", "b", "c"], first)
    store.append(["d d", "é"], second)
    again = FeatureStore(tmp_path, 5)
    np.testing.assert_array_equal(again.rows()[again.positions(["é", "a", "d d"])], [second[1], first[0], second[0]])
    assert "b" in again
    assert "x" not in again


@pytest.mark.parametrize(
    ("file", "n_lost_bytes"), [("rows.f32", 1), ("rows.f32", 21), ("index.txt", 1), ("index.txt", 9)]
)
def test_a_torn_end_costs_only_the_rows_it_touches(tmp_path: Path, file: str, n_lost_bytes: int) -> None:
    FeatureStore(tmp_path, 5).append(["a", "b", "c"], rows(3))
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-n_lost_bytes])
    store = FeatureStore(tmp_path, 5)
    n_whole = len(store)
    assert n_whole in {1, 2}
    store.append(["new"], rows(1, 7))
    again = FeatureStore(tmp_path, 5)
    np.testing.assert_array_equal(again.rows()[:n_whole], rows(3)[:n_whole])
    np.testing.assert_array_equal(again.rows()[again.positions(["new"])], rows(1, 7))


def test_an_altered_row_and_what_follows_are_not_trusted(tmp_path: Path) -> None:
    FeatureStore(tmp_path, 5).append(["a", "b", "c"], rows(3))
    path = tmp_path / "rows.f32"
    damaged = bytearray(path.read_bytes())
    damaged[25] ^= 1
    path.write_bytes(bytes(damaged))
    store = FeatureStore(tmp_path, 5)
    assert "a" in store
    assert "b" not in store
    assert "c" not in store


def test_opening_changes_nothing_on_the_disk(tmp_path: Path) -> None:
    FeatureStore(tmp_path, 5).append(["a", "b"], rows(2))
    path = tmp_path / "index.txt"
    path.write_bytes(path.read_bytes() + b"half a li")
    before = path.read_bytes()
    assert len(FeatureStore(tmp_path, 5)) == 2
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        FeatureStore(tmp_path / "file" / "store", 5)


def test_features_are_computed_once_and_unreadable_images_left_out(squares, with_unreadable, tmp_path: Path) -> None:
    backbone = build_backbone("embedded", size_px=32)
    dataset = squares.dataset().take(np.arange(8))
    settings = {"frozen": True, "cache_dir": tmp_path, "device": torch.device("cpu")}
    advanced: list[int] = []
    first = prepare(dataset, with_unreadable, backbone, advance=advanced.append, **settings)
    assert first.rejected == {"blue-0": RejectReason.TRUNCATED, "red-4": RejectReason.TRUNCATED}
    assert len(first.dataset) == 6
    assert sum(advanced) == 8
    n_reads = squares.n_reads
    again = prepare(first.dataset, squares, backbone, **settings)
    assert squares.n_reads == n_reads
    assert again.n_reused == 6


def test_cached_features_are_the_backbones_own(squares, tmp_path: Path) -> None:
    backbone = build_backbone("embedded", size_px=32)
    dataset = squares.dataset().take(np.arange(5))
    prepared = prepare(dataset, squares, backbone, frozen=True, cache_dir=tmp_path, device=torch.device("cpu"))
    (batch,) = prepared.inputs.batches([np.array([3, 1])])
    images = torch.stack([backbone.preprocess(squares(dataset.image_ids[n])) for n in (3, 1)])
    with torch.no_grad():
        torch.testing.assert_close(batch, backbone.module(images), rtol=1e-4, atol=1e-5)


def test_images_come_in_the_order_asked_for(squares, tmp_path: Path) -> None:
    backbone = build_backbone("embedded", size_px=32)
    dataset = squares.dataset().take(np.arange(9))
    prepared = prepare(dataset, squares, backbone, frozen=False, cache_dir=tmp_path, device=torch.device("cpu"))
    order = np.array([8, 2, 5, 0, 7])
    found = torch.cat(list(prepared.inputs.batches(in_batches(order, 2))))
    expected = torch.stack([backbone.preprocess(squares(dataset.image_ids[n])) for n in order])
    torch.testing.assert_close(found, expected)
