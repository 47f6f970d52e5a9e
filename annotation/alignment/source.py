"""Cell features of many images, one batch after another, with decoding ahead of the tower."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from annotation.alignment.features import CellStore
from annotation.alignment.options import AlignOptions
from annotation.alignment.tiles import Layout, stitched
from annotation.alignment.towers import Aligner
from data_contracts.errors import ImageRejected
from data_contracts.ports import Advance, PixelReader, Pixels

_Key = TypeVar("_Key", bound=Hashable)

Cells = npt.NDArray[np.float16]
OnRejected = Callable[[str, ImageRejected], None]


class CellSource:
    """Cell features of images: from the store where they are, else from the tower with decoding ahead of it."""

    def __init__(
        self,
        aligner: Aligner,
        read: PixelReader,
        store: CellStore,
        options: AlignOptions,
        advance: Advance,
        on_rejected: OnRejected | None,
    ) -> None:
        """`advance` counts every image once, however often it is looked at."""
        self.aligner = aligner
        self.options = options
        self._read = read
        self._store = store
        self._advance = advance
        self._on_rejected = on_rejected
        self._rejected: set[str] = set()
        self._counted: set[str] = set()

    def shards(self, image_ids: Sequence[str]) -> Iterator[tuple[list[str], Cells]]:
        """`batches` of all images, shard after shard."""
        for shard in slices(image_ids, self.options.shard_size):
            yield from self.batches(shard)

    def batches(self, shard: Sequence[str]) -> Iterator[tuple[list[str], Cells]]:
        """(ids, (n, h, w, F)) of the readable images of one shard; what was computed is stored at its end.

        The images of one batch have one grid.
        """
        stored = [i for i in shard if i in self._store]
        for same in _together(stored, self._store.grid).values():
            for ids in slices(same, self.options.batch_size):
                yield ids, self._store.read(ids)
                self._count(ids)
        computed: dict[Layout, list[tuple[list[str], Cells]]] = {}
        for layout, ids, tiles in self._decoded([i for i in shard if i not in self._store and i not in self._rejected]):
            cells = self._cells(layout, tiles)
            computed.setdefault(layout, []).append((ids, cells))
            yield ids, cells
            self._count(ids)
        for parts in computed.values():
            self._store.add([i for ids, _ in parts for i in ids], np.concatenate([c for _, c in parts]))

    def _cells(self, layout: Layout, tiles: npt.NDArray[np.uint8]) -> Cells:
        """(n, h, w, F) cells of (n, T, H, W, 3) tiles, at most a batch of tiles at a time in the tower."""
        flat = tiles.reshape(-1, *tiles.shape[2:])
        parts = [
            self.aligner.features(flat[start : start + self.options.batch_size]).cells.half().cpu().numpy()
            for start in range(0, len(flat), self.options.batch_size)
        ]
        cells = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if layout.n_tiles == 1 or self.aligner.tiling is None:
            return cells
        overlap = self.aligner.tiling.overlap((cells.shape[1], cells.shape[2]))
        return stitched(cells.reshape(len(tiles), layout.n_tiles, *cells.shape[1:]), layout, overlap)

    def _decoded(self, image_ids: Sequence[str]) -> Iterator[tuple[Layout, list[str], npt.NDArray[np.uint8]]]:
        """(layout, ids, (n, T, H, W, 3)) preprocessed, in order of each layout, at most two batches ahead."""
        ready: dict[Layout, list[tuple[str, Pixels]]] = {}
        with ThreadPoolExecutor(self.options.n_decoders) as decoders:
            for image_id, (layout, tiles) in self._in_order(decoders, image_ids):
                waiting = ready.setdefault(layout, [])
                waiting.append((image_id, tiles))
                if len(waiting) * layout.n_tiles >= self.options.batch_size:
                    yield layout, *_stacked(ready.pop(layout))
        for layout, waiting in ready.items():
            yield layout, *_stacked(waiting)

    def _in_order(
        self, decoders: ThreadPoolExecutor, image_ids: Sequence[str]
    ) -> Iterator[tuple[str, tuple[Layout, Pixels]]]:
        waiting: deque[tuple[str, Future[tuple[Layout, Pixels]]]] = deque()
        for image_id in image_ids:
            waiting.append((image_id, decoders.submit(self._decode, image_id)))
            if len(waiting) > 2 * self.options.batch_size:
                yield from self._result(*waiting.popleft())
        while waiting:
            yield from self._result(*waiting.popleft())

    def _decode(self, image_id: str) -> tuple[Layout, Pixels]:
        return self.aligner.tiles(self._read(image_id))

    def _result(
        self, image_id: str, future: Future[tuple[Layout, Pixels]]
    ) -> Iterator[tuple[str, tuple[Layout, Pixels]]]:
        try:
            yield image_id, future.result()
        except ImageRejected as rejection:
            self._rejected.add(image_id)
            self._count([image_id])
            if self._on_rejected is not None:
                self._on_rejected(image_id, rejection)

    def _count(self, image_ids: Sequence[str]) -> None:
        """Advance by the images that were not counted before: fitted images are looked at twice, counted once."""
        new = [i for i in image_ids if i not in self._counted]
        self._counted.update(new)
        if new:
            self._advance(len(new))


def slices(items: Sequence[str], size: int) -> Iterator[list[str]]:
    """The items in order, `size` at a time."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _together(items: Sequence[str], key: Callable[[str], _Key]) -> dict[_Key, list[str]]:
    """The items of each key, in order."""
    result: dict[_Key, list[str]] = {}
    for item in items:
        result.setdefault(key(item), []).append(item)
    return result


def _stacked(ready: list[tuple[str, Pixels]]) -> tuple[list[str], npt.NDArray[np.uint8]]:
    return [i for i, _ in ready], np.stack([tiles for _, tiles in ready])
