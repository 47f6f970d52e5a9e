"""Cell features of frozen towers on disk, so that fitting heads again costs no second look at the images.

One folder per tower fingerprint; immutable segments of some hundred images, memory-mapped when read. A segment
counts once its list of image ids is there, which is written last: a killed run loses one segment at most.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_contracts.files import write_text, write_with


class CellStore:
    """(h, w, F) float16 features of images, by image id, up to a number of bytes; tiled images have larger grids."""

    def __init__(self, folder: Path, n_features: int, *, max_bytes: int) -> None:
        """Open, or start, the store in `folder`; segments that are damaged or of other features are not used."""
        self.folder = folder
        self.n_features = n_features
        self.max_bytes = max_bytes
        self._segments: list[npt.NDArray[np.float16]] = []
        self._place: dict[str, tuple[int, int]] = {}
        for index in sorted(folder.glob("*.json")):
            self._open(index)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._place

    def __len__(self) -> int:
        return len(self._place)

    def read(self, image_ids: Sequence[str]) -> npt.NDArray[np.float16]:
        """(n, h, w, F) features of images of one grid that are in the store, in the given order."""
        height, width = self.grid(image_ids[0])
        result = np.empty((len(image_ids), height, width, self.n_features), np.float16)
        for i, image_id in enumerate(image_ids):
            segment, row = self._place[image_id]
            result[i] = self._segments[segment][row]
        return result

    def grid(self, image_id: str) -> tuple[int, int]:
        """(h, w) cells of an image that is in the store."""
        height, width = self._segments[self._place[image_id][0]].shape[1:3]
        return height, width

    def add(self, image_ids: Sequence[str], cells: npt.NDArray[np.float16]) -> None:
        """Keep the (n, h, w, F) features as one segment, unless the store is full. Raises `StorageError`."""
        if not image_ids or sum(s.nbytes for s in self._segments) + cells.nbytes > self.max_bytes:
            return
        number = len(list(self.folder.glob("*.json")))
        stem = f"{number:06d}-{image_ids[0][:16].replace('/', '-')}"
        write_with(self.folder / f"{stem}.npy", lambda path: _save(path, cells))
        index = self.folder / f"{stem}.json"
        write_text(index, json.dumps(list(image_ids)))
        self._open(index)

    def _open(self, index: Path) -> None:
        try:
            image_ids = json.loads(index.read_text(encoding="utf-8"))
            segment = np.load(index.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            return  # computed again: a cache has nothing that could be lost
        expected = (len(image_ids), *segment.shape[1:3], self.n_features)
        if segment.shape != expected or segment.dtype != np.float16:
            return
        self._place.update({image_id: (len(self._segments), row) for row, image_id in enumerate(image_ids)})
        self._segments.append(segment)


def _save(path: Path, cells: npt.NDArray[np.float16]) -> None:
    with path.open("wb") as stream:
        np.save(stream, cells, allow_pickle=False)
