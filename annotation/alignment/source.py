"""Cell features of many images, one batch after another, with decoding ahead of the tower."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from annotation.alignment.features import CellStore
from annotation.alignment.options import AlignOptions
from annotation.alignment.towers import Aligner
from data_contracts.errors import ImageRejected
from data_contracts.ports import Advance, PixelReader, Pixels

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
        """(ids, (n, h, w, F)) of the readable images of one shard; what was computed is stored at its end."""
        stored = [i for i in shard if i in self._store]
        for ids in slices(stored, self.options.batch_size):
            yield ids, self._store.read(ids)
            self._count(ids)
        computed: list[tuple[list[str], Cells]] = []
        for ids, pixels in self._decoded([i for i in shard if i not in self._store and i not in self._rejected]):
            cells = self.aligner.features(pixels).cells.half().cpu().numpy()
            computed.append((ids, cells))
            yield ids, cells
            self._count(ids)
        if computed:
            self._store.add([i for ids, _ in computed for i in ids], np.concatenate([c for _, c in computed]))

    def _decoded(self, image_ids: Sequence[str]) -> Iterator[tuple[list[str], npt.NDArray[np.uint8]]]:
        """(ids, (n, H, W, 3)) preprocessed, in order, at most two batches ahead of the tower."""
        ready: list[tuple[str, Pixels]] = []
        with ThreadPoolExecutor(self.options.n_decoders) as decoders:
            for image_id, pixels in self._in_order(decoders, image_ids):
                ready.append((image_id, pixels))
                if len(ready) == self.options.batch_size:
                    yield [i for i, _ in ready], np.stack([p for _, p in ready])
                    ready = []
        if ready:
            yield [i for i, _ in ready], np.stack([p for _, p in ready])

    def _in_order(self, decoders: ThreadPoolExecutor, image_ids: Sequence[str]) -> Iterator[tuple[str, Pixels]]:
        waiting: deque[tuple[str, Future[Pixels]]] = deque()
        for image_id in image_ids:
            waiting.append((image_id, decoders.submit(self._decode, image_id)))
            if len(waiting) > 2 * self.options.batch_size:
                yield from self._result(*waiting.popleft())
        while waiting:
            yield from self._result(*waiting.popleft())

    def _decode(self, image_id: str) -> Pixels:
        return self.aligner.preprocess(self._read(image_id))

    def _result(self, image_id: str, future: Future[Pixels]) -> Iterator[tuple[str, Pixels]]:
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
