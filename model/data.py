"""What the networks read: cached features of a frozen backbone, or images for one that is fine-tuned.

Both are `Inputs`: the trainer and the evaluation do not know which one they have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_contracts.errors import ImageRejected
from data_contracts.ports import Pixels
from model.augment import AUGMENTATIONS, NONE, Augmentation
from model.backbones import Backbone

Rows = npt.NDArray[np.int64]
T = TypeVar("T")

_IN_MEMORY_BYTES = 1 << 30
"""Features up to this size are read into memory once."""


class Draw(NamedTuple):
    """Which random copies of the images are meant: the same draw gives the same copies, in any order of batches."""

    seed: int
    epoch: int


class Inputs(Protocol):
    """Batches of network input by row number of a data set."""

    def batches(self, batches_of_rows: Iterable[Rows], draw: Draw | None = None) -> Iterator[Tensor]:
        """One float32 tensor for each array of row numbers, in order; of changed copies where a draw is given."""
        ...


@dataclass(frozen=True)
class FeatureInputs:
    """(B, F) cached features."""

    stored: npt.NDArray[np.float32]
    """(n, F) memory map; where it is too large for the memory, only the rows of one batch are ever read."""
    positions: Rows
    """Row of the map for each row of the data set."""
    views: Rows | None = None
    """(V, N) rows of the map that hold changed copies; −1 for images that have none."""

    @cached_property
    def _in_memory(self) -> Tensor | None:
        return torch.tensor(self.stored) if self.stored.nbytes <= _IN_MEMORY_BYTES else None

    def batches(self, batches_of_rows: Iterable[Rows], draw: Draw | None = None) -> Iterator[Tensor]:
        """(B, F) features of each batch; with a draw, each of the image itself or of one of its copies."""
        positions = self.positions if draw is None or self.views is None else self._drawn(self.views, draw)
        features = self._in_memory
        for rows in batches_of_rows:
            if features is not None:
                yield features[torch.from_numpy(positions[rows])]
            else:
                yield torch.from_numpy(np.asarray(self.stored[positions[rows]], dtype=np.float32))

    def _drawn(self, views: Rows, draw: Draw) -> Rows:
        n_views, n_rows = views.shape
        chosen = np.random.default_rng(draw).integers(0, n_views + 1, n_rows)
        copies = np.concatenate([self.positions[None], np.where(views < 0, self.positions, views)])
        return copies[chosen, np.arange(n_rows)]


@dataclass(frozen=True)
class ImageInputs:
    """(B, 3, S, S) preprocessed images, prepared by threads a little ahead of their use."""

    image_ids: Sequence[str]
    squares: Callable[[str], Pixels]
    """Image id → its (S, S, 3) pixels; raises `ImageRejected`."""
    backbone: Backbone
    n_threads: int = 2
    augmentation: Augmentation = AUGMENTATIONS[NONE]

    def batches(self, batches_of_rows: Iterable[Rows], draw: Draw | None = None) -> Iterator[Tensor]:
        """(B, 3, S, S) images of each batch; raises `ImageRejected` if one became unreadable since it was checked."""
        return ahead((partial(self._load, rows, draw) for rows in batches_of_rows), self.n_threads)

    def _load(self, rows: Rows, draw: Draw | None) -> Tensor:
        return torch.stack([self._image(int(row), draw) for row in rows])

    def _image(self, row: int, draw: Draw | None) -> Tensor:
        image_id = self.image_ids[row]
        try:
            square = self.squares(image_id)
        except ImageRejected as error:
            raise ImageRejected(
                error.reason, f"image {image_id[:12]}…: became unreadable while training ({error.reason})."
            ) from error
        if draw is not None:
            square = changed(square, self.augmentation, np.random.default_rng([*draw, row]))
        return self.backbone.preprocess.scale(square)


def changed(square: Pixels, augmentation: Augmentation, rng: np.random.Generator) -> Pixels:
    """(S, S, 3) uint8 → a changed copy of it."""
    if augmentation.changes_nothing:
        return square
    image = augmentation(torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1))), rng)
    return image.numpy().transpose(1, 2, 0)


def ahead(jobs: Iterable[Callable[[], T]], n_threads: int) -> Iterator[T]:
    """Results of the jobs in their order; each thread works one job ahead of its use."""
    with ThreadPoolExecutor(n_threads) as pool:
        source = iter(jobs)
        waiting: deque[Future[T]] = deque(pool.submit(job) for job in islice(source, n_threads))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(job) for job in islice(source, 1))
            yield result


def in_batches(rows: Rows, batch_size: int) -> list[Rows]:
    """The rows cut into batches; the last one may be smaller."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
