"""Numbers of images on disk: appended as they are computed, verified when opened, read through a memory map.

A store is one folder for one backbone with one preprocessing (`Backbone.key`), with two files: `rows.f32`, the
features as raw little-endian float32 rows, and `index.txt`, one line `image_id crc32` a row. Resized pixels are kept
the same way, in `rows.u8`. A row counts when its
line is whole and its checksum holds; whatever follows the first row that does not (a killed run, a torn page)
is overwritten. Opening a store changes nothing, so any number may read while one process writes. Image ids are content
hashes, so a row never goes stale.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_contracts.files import storage_error

_FLOATS, _BYTES = np.dtype("<f4"), np.dtype("u1")


class FeatureStore:
    """Append-only rows of `n_features` numbers, one row per image id."""

    def __init__(self, folder: Path, n_features: int, *, of_pixels: bool = False) -> None:
        """Open the folder, or make it, for float32 features or `of_pixels` for uint8; raises `StorageError`."""
        self.folder = folder
        self.n_features = n_features
        self._type = _BYTES if of_pixels else _FLOATS
        self._rows_path = folder / ("rows.u8" if of_pixels else "rows.f32")
        self._index_path = folder / "index.txt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._rows_path.touch()
            self._index_path.touch()
            self._position, self._n_index_bytes = self._whole_rows()
        except OSError as error:
            raise storage_error(folder, error) from error

    def __len__(self) -> int:
        return len(self._position)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._position

    def positions(self, image_ids: Iterable[str]) -> npt.NDArray[np.int64]:
        """Row number of each image; raises KeyError for one that is not stored."""
        return np.array([self._position[image_id] for image_id in image_ids], dtype=np.int64)

    def rows(self) -> npt.NDArray[Any]:
        """(n, F) memory map of all rows, read-only."""
        return self._map(len(self))

    def append(self, image_ids: Sequence[str], features: npt.NDArray[Any]) -> None:
        """Add rows and put them on the disk, the rows before their index lines; raises `StorageError`."""
        block = np.ascontiguousarray(features, dtype=self._type)
        lines = "".join(f"{i} {zlib.crc32(row.data):08x}\n" for i, row in zip(image_ids, block, strict=True))
        try:
            _write_at(self._rows_path, len(self) * self.n_features * self._type.itemsize, block.tobytes())
            _write_at(self._index_path, self._n_index_bytes, lines.encode())
        except OSError as error:
            raise storage_error(self.folder, error) from error
        self._n_index_bytes += len(lines.encode())
        for image_id in image_ids:
            self._position[image_id] = len(self._position)

    def _map(self, n_rows: int) -> npt.NDArray[Any]:
        if n_rows == 0:
            return np.empty((0, self.n_features), dtype=self._type)
        return np.memmap(self._rows_path, dtype=self._type, mode="r", shape=(n_rows, self.n_features))

    def _whole_rows(self) -> tuple[dict[str, int], int]:
        """Row numbers by image id, and the length of the index lines they come from."""
        lines = self._index_path.read_bytes().split(b"\n")[:-1]  # what follows the last line end is torn
        n_whole_rows = self._rows_path.stat().st_size // (self.n_features * self._type.itemsize)
        stored = self._map(n_whole_rows)
        position: dict[str, int] = {}
        n_bytes = 0
        for line, row in zip(lines, stored, strict=False):
            if not _holds(line, row) or (image_id := line[:-9].decode()) in position:
                break
            position[image_id] = len(position)
            n_bytes += len(line) + 1
        return position, n_bytes


def _holds(line: bytes, row: npt.NDArray[Any]) -> bool:
    return line[-9:] == f" {zlib.crc32(np.ascontiguousarray(row).data):08x}".encode()


def _write_at(path: Path, offset: int, data: bytes) -> None:
    """Put `data` on the disk at `offset`, which becomes the end of the file but for it."""
    with path.open("r+b") as stream:
        stream.truncate(offset)
        stream.seek(offset)
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
