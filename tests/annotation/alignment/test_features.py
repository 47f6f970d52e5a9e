from __future__ import annotations

from pathlib import Path

import numpy as np

from annotation.alignment.features import CellStore

SHAPE = (2, 3, 4)


def cells(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, *SHAPE)).astype(np.float16)


def open_store(folder: Path, max_bytes: int = 10**6) -> CellStore:
    return CellStore(folder, SHAPE[2], max_bytes=max_bytes)


def test_what_was_added_is_there_after_reopening(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.add(["a", "b"], cells(2))
    store.add(["c"], cells(1, seed=1))
    again = open_store(tmp_path)
    assert [i in again for i in "abcd"] == [True, True, True, False]
    np.testing.assert_array_equal(again.read(["c", "a"]), np.concatenate([cells(1, seed=1), cells(2)[:1]]))


def test_a_segment_without_its_index_or_cut_off_is_not_used(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.add(["a"], cells(1))
    store.add(["b"], cells(1))
    store.add(["c"], cells(1))
    segments = sorted(tmp_path.glob("*.npy"))
    segments[0].with_suffix(".json").unlink()
    segments[1].write_bytes(segments[1].read_bytes()[:-10])
    again = open_store(tmp_path)
    assert [i in again for i in "abc"] == [False, False, True]
    again.add(["a", "b"], cells(2, seed=5))
    np.testing.assert_array_equal(open_store(tmp_path).read(["b"]), cells(2, seed=5)[1:])


def test_another_shape_is_not_mistaken_for_this_one(tmp_path: Path) -> None:
    open_store(tmp_path).add(["a"], cells(1))
    assert "a" not in CellStore(tmp_path, 6, max_bytes=10**6)


def test_a_full_store_takes_no_more(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_bytes=2 * 24 * 2)
    store.add(["a", "b"], cells(2))
    store.add(["c"], cells(1))
    assert "c" not in store
    assert len(store) == 2


def test_tiled_images_keep_their_larger_grid(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    large = np.random.default_rng(3).random((1, 5, 3, 4)).astype(np.float16)
    store.add(["a"], cells(1))
    store.add(["big"], large)
    again = open_store(tmp_path)
    assert (again.grid("a"), again.grid("big")) == ((2, 3), (5, 3))
    np.testing.assert_array_equal(again.read(["big"]), large)
