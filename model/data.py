"""What the networks read: cached features of a frozen backbone, or images for one that is fine-tuned.

Both are `Inputs`: the trainer and the evaluation do not know which one they have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_contracts.dataset import AlignedDataset
from data_contracts.errors import ImageRejected, RejectReason
from data_contracts.ports import Advance, PixelReader, ignore_progress
from model.backbones import Backbone
from model.feature_store import FeatureStore

Rows = npt.NDArray[np.int64]

_SHARD = 32
"""Images in one pass through the backbone, and at most lost to a kill."""


class Inputs(Protocol):
    """Batches of network input by row number of a data set."""

    def batches(self, batches_of_rows: Iterable[Rows]) -> Iterator[Tensor]:
        """One float32 tensor for each array of row numbers, in order."""
        ...


@dataclass(frozen=True)
class FeatureInputs:
    """(B, F) cached features."""

    stored: npt.NDArray[np.float32]
    """(n, F) memory map; only the rows of one batch are ever in memory."""
    positions: Rows
    """Row of the map for each row of the data set."""

    def batches(self, batches_of_rows: Iterable[Rows]) -> Iterator[Tensor]:
        """(B, F) features of each batch."""
        for rows in batches_of_rows:
            yield torch.from_numpy(np.asarray(self.stored[self.positions[rows]], dtype=np.float32))


@dataclass(frozen=True)
class ImageInputs:
    """(B, 3, S, S) preprocessed images, decoded by threads a little ahead of their use."""

    image_ids: Sequence[str]
    read: PixelReader
    backbone: Backbone
    n_threads: int = 2

    def batches(self, batches_of_rows: Iterable[Rows]) -> Iterator[Tensor]:
        """(B, 3, S, S) images of each batch; raises `ImageRejected` if one became unreadable since it was checked."""
        ids = ([self.image_ids[row] for row in rows] for rows in batches_of_rows)
        for _ids, images, rejected in prepared_batches(ids, self.read, self.backbone, self.n_threads):
            if rejected:
                image_id, reason = next(iter(rejected.items()))
                raise ImageRejected(reason, f"image {image_id[:12]}…: became unreadable while training ({reason}).")
            yield images


@dataclass(frozen=True)
class Prepared:
    """A data set of readable images only, with its inputs."""

    dataset: AlignedDataset
    inputs: Inputs
    rejected: dict[str, RejectReason]
    """Ids of the images that were left out, with the reason."""
    n_reused: int
    """Images whose features were already on the disk."""


def prepare(
    dataset: AlignedDataset,
    read: PixelReader,
    backbone: Backbone,
    *,
    frozen: bool,
    cache_dir: Path,
    device: torch.device,
    n_threads: int = 2,
    advance: Advance = ignore_progress,
) -> Prepared:
    """The data set without its unreadable images, with cached features (`frozen`) or images to go with it."""
    if not frozen:
        rejected = _unreadable(dataset.image_ids, read, backbone, n_threads, advance)
        usable = _without(dataset, rejected)
        return Prepared(usable, ImageInputs(usable.image_ids, read, backbone, n_threads), rejected, 0)
    store = FeatureStore(cache_dir / f"features-{backbone.key[:16]}", backbone.n_features)
    n_reused = sum(image_id in store for image_id in dataset.image_ids)
    rejected = fill(store, dataset.image_ids, read, backbone, device=device, n_threads=n_threads, advance=advance)
    usable = _without(dataset, rejected)
    inputs = FeatureInputs(store.rows(), store.positions(usable.image_ids))
    return Prepared(usable, inputs, rejected, n_reused)


def fill(
    store: FeatureStore,
    image_ids: Sequence[str],
    read: PixelReader,
    backbone: Backbone,
    *,
    device: torch.device,
    n_threads: int = 2,
    advance: Advance = ignore_progress,
) -> dict[str, RejectReason]:
    """Compute and store the features that are missing; returns the images that could not be read."""
    missing = list(dict.fromkeys(i for i in image_ids if i not in store))
    advance(len(image_ids) - len(missing))
    rejected: dict[str, RejectReason] = {}
    module = backbone.module.to(device).eval()
    shards = (missing[start : start + _SHARD] for start in range(0, len(missing), _SHARD))
    for ids, images, unreadable in prepared_batches(shards, read, backbone, n_threads):
        rejected |= unreadable
        if ids:
            with torch.inference_mode():
                computed = module(images.to(device)).float().cpu().numpy()
            store.append(ids, computed)
        advance(len(ids) + len(unreadable))
    return rejected


Batch = tuple[list[str], Tensor, dict[str, RejectReason]]


def prepared_batches(
    batches_of_ids: Iterable[Sequence[str]], read: PixelReader, backbone: Backbone, n_threads: int
) -> Iterator[Batch]:
    """(ids read, (n, 3, S, S) images, ids rejected) of each batch; each thread decodes one batch ahead."""
    with ThreadPoolExecutor(n_threads) as pool:
        source = iter(batches_of_ids)
        waiting: deque[Future[Batch]] = deque(
            pool.submit(_load, ids, read, backbone) for ids in islice(source, n_threads)
        )
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(pool.submit(_load, ids, read, backbone) for ids in islice(source, 1))
            yield batch


def in_batches(rows: Rows, batch_size: int) -> list[Rows]:
    """The rows cut into batches; the last one may be smaller."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def _load(ids: Sequence[str], read: PixelReader, backbone: Backbone) -> Batch:
    images: dict[str, Tensor] = {}
    rejected: dict[str, RejectReason] = {}
    for image_id in ids:
        try:
            images[image_id] = backbone.preprocess(read(image_id))
        except ImageRejected as error:
            rejected[image_id] = error.reason
    size = (0, 3, backbone.size_px, backbone.size_px)
    stacked = torch.stack([images[i] for i in ids if i in images]) if images else torch.empty(size)
    return [i for i in ids if i in images], stacked, rejected


def _unreadable(
    ids: Sequence[str], read: PixelReader, backbone: Backbone, n_threads: int, advance: Advance
) -> dict[str, RejectReason]:
    """Every image is read once before hours of training depend on it."""
    rejected: dict[str, RejectReason] = {}
    shards = (ids[start : start + _SHARD] for start in range(0, len(ids), _SHARD))
    for found, _images, unreadable in prepared_batches(shards, read, backbone, n_threads):
        rejected |= unreadable
        advance(len(found) + len(unreadable))
    return rejected


def _without(dataset: AlignedDataset, rejected: dict[str, RejectReason]) -> AlignedDataset:
    if not rejected:
        return dataset
    return dataset.take(np.flatnonzero(~dataset.frame["image_id"].isin(list(rejected))).astype(np.int64))
