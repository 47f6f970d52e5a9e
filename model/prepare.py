"""From a data set to what the trainer reads: every image is decoded once, and what cannot be used is left out."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from data_contracts.dataset import AlignedDataset
from data_contracts.errors import ImageRejected
from data_contracts.ports import Advance, PixelReader, Pixels, ignore_progress
from data_contracts.tables import Split
from model.augment import AUGMENTATIONS, NONE, Augmentation
from model.backbones import Backbone
from model.data import FeatureInputs, ImageInputs, Inputs, Rows, ahead, changed
from model.feature_store import FeatureStore
from model.parallel import Processes

NOT_FINITE = "not_finite_features"
"""Why an image is left out whose features are not numbers: the backbone cannot see it."""

_SHARD = 32
"""Images in one pass through the backbone, and at most lost to a kill."""


@dataclass(frozen=True)
class Prepared:
    """A data set of usable images only, with its inputs."""

    dataset: AlignedDataset
    inputs: Inputs
    rejected: dict[str, str]
    """Ids of the images that were left out, with the code of the reason: a `RejectReason`, or `NOT_FINITE`."""
    n_reused: int
    """Images whose features or pixels were already on the disk."""
    augmentation: Augmentation = AUGMENTATIONS[NONE]
    """What training images go through."""
    n_views: int = 0
    """Cached changed copies of each training image."""


class InputOptions(NamedTuple):
    """How images are read, and what those of the training split go through."""

    n_threads: int = 2
    augmentation: Augmentation = AUGMENTATIONS[NONE]
    n_views: int = 0
    """Changed copies of each training image whose features are cached; frozen backbone only."""
    pixel_cache_gb: float = 0.0
    """Most that resized pixels may take on the disk; backbone that is fine-tuned only."""


PLAIN = InputOptions()


@dataclass(frozen=True)
class Source:
    """Pixels, and the backbone that is to see them."""

    read: PixelReader
    backbone: Backbone
    device: torch.device
    n_threads: int = 2

    def square(self, image_id: str) -> Pixels:
        """(S, S, 3) resized pixels; raises `ImageRejected`."""
        return self.backbone.preprocess.resize(self.read(image_id))

    def features(self, squares: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        """(n, F) of n squares."""
        images = torch.stack([self.backbone.preprocess.scale(square) for square in squares])
        with torch.inference_mode():
            return self.backbone.module.to(self.device).eval()(images.to(self.device)).float().cpu().numpy()


class Copy(NamedTuple):
    """An image, or its `view`-th changed copy (from 1)."""

    image_id: str
    view: int
    key: str
    """Its name in the store."""


def prepare(
    dataset: AlignedDataset,
    read: PixelReader,
    backbone: Backbone,
    *,
    frozen: bool,
    cache_dir: Path,
    device: torch.device,
    options: InputOptions = PLAIN,
    advance: Advance = ignore_progress,
) -> Prepared:
    """The data set without its unusable images, with cached features (`frozen`) or images to go with it.

    Of several processes the first one fills the caches, and the others read them.
    """
    source = Source(read, backbone, device, options.n_threads)
    make = partial(_features if frozen else _images, dataset, source, cache_dir, options, advance)
    processes = Processes.current()
    if processes.is_first:
        made = make()
        processes.wait()
        return made
    processes.wait()
    return make()


def _features(
    dataset: AlignedDataset,
    source: Source,
    cache_dir: Path,
    options: InputOptions,
    advance: Advance,
) -> Prepared:
    augmentation, n_views = options.augmentation, options.n_views
    backbone = source.backbone
    store = FeatureStore(cache_dir / f"features-{backbone.key[:16]}", backbone.n_features)
    ids = dataset.image_ids
    n_reused = sum(image_id in store for image_id in ids)
    rejected = _fill(store, [Copy(i, 0, i) for i in ids], source, augmentation, advance)
    usable = _without(dataset, rejected)
    training_ids = usable.take(usable.rows(Split.TRAIN)).image_ids
    copies = [[_copy(i, view, augmentation) for i in training_ids] for view in range(1, n_views + 1)]
    _fill(store, [copy for view in copies for copy in view], source, augmentation, ignore_progress)
    views = np.array([_positions(store, usable, copies_of) for copies_of in copies]) if copies else None
    inputs = FeatureInputs(store.rows(), store.positions(usable.image_ids), views)
    return Prepared(usable, inputs, rejected, n_reused, augmentation, n_views)


def _images(
    dataset: AlignedDataset,
    source: Source,
    cache_dir: Path,
    options: InputOptions,
    advance: Advance,
) -> Prepared:
    side = source.backbone.size_px
    n_bytes = side * side * 3
    squares, n_reused = source.square, 0
    if len(dataset) * n_bytes > options.pixel_cache_gb * 1e9:
        rejected = _unreadable(dataset.image_ids, source, advance)
    else:
        method = source.backbone.preprocess.interpolation
        store = FeatureStore(cache_dir / f"pixels-{side}-{method}", n_bytes, of_pixels=True)
        n_reused = sum(image_id in store for image_id in dataset.image_ids)
        rejected = _keep_pixels(store, dataset.image_ids, source, advance)
        squares = _CachedSquares(store, side)
    usable = _without(dataset, rejected)
    inputs = ImageInputs(usable.image_ids, squares, source.backbone, source.n_threads, options.augmentation)
    return Prepared(usable, inputs, rejected, n_reused, options.augmentation)


class _CachedSquares:
    """Image id → its (S, S, 3) resized pixels, from a store."""

    def __init__(self, store: FeatureStore, side_px: int) -> None:
        self._store, self._rows, self._side_px = store, store.rows(), side_px

    def __call__(self, image_id: str) -> Pixels:
        row = self._rows[self._store.positions([image_id])[0]]
        return np.asarray(row).reshape(self._side_px, self._side_px, 3)


# ---- filling ---------------------------------------------------------------------------------------------------


def _fill(
    store: FeatureStore, copies: Sequence[Copy], source: Source, augmentation: Augmentation, advance: Advance
) -> dict[str, str]:
    """Compute and store the features that are missing; returns the images that cannot be used, with the reason."""
    missing = [copy for copy in dict.fromkeys(copies) if copy.key not in store]
    advance(len(copies) - len(missing))
    rejected: dict[str, str] = {}
    for shard, squares, unreadable in _decoded(missing, source, augmentation):
        rejected |= unreadable
        if shard:
            computed = source.features(squares)
            usable = np.flatnonzero(np.isfinite(computed).all(axis=1)).tolist()
            store.append([shard[n].key for n in usable], computed[usable])
            rejected |= {copy.image_id: NOT_FINITE for n, copy in enumerate(shard) if n not in usable}
        advance(len(shard) + len(unreadable))
    return rejected


def _keep_pixels(store: FeatureStore, ids: Sequence[str], source: Source, advance: Advance) -> dict[str, str]:
    missing = [Copy(i, 0, i) for i in dict.fromkeys(ids) if i not in store]
    advance(len(ids) - len(missing))
    rejected: dict[str, str] = {}
    for shard, squares, unreadable in _decoded(missing, source, AUGMENTATIONS[NONE]):
        rejected |= unreadable
        if shard:
            store.append([copy.key for copy in shard], np.stack(squares).reshape(len(shard), -1))
        advance(len(shard) + len(unreadable))
    return rejected


def _unreadable(ids: Sequence[str], source: Source, advance: Advance) -> dict[str, str]:
    """Every image is read once before hours of training depend on it."""
    rejected: dict[str, str] = {}
    for shard, _squares, unreadable in _decoded([Copy(i, 0, i) for i in ids], source, AUGMENTATIONS[NONE]):
        rejected |= unreadable
        advance(len(shard) + len(unreadable))
    return rejected


Decoded = tuple[list[Copy], list[Pixels], dict[str, str]]


def _decoded(copies: Sequence[Copy], source: Source, augmentation: Augmentation) -> Iterator[Decoded]:
    """(copies read, their squares, ids rejected) of each shard, decoded by threads ahead of their use."""
    shards = (copies[start : start + _SHARD] for start in range(0, len(copies), _SHARD))
    return ahead((partial(_decode, shard, source, augmentation) for shard in shards), source.n_threads)


def _decode(shard: Sequence[Copy], source: Source, augmentation: Augmentation) -> Decoded:
    read: list[Copy] = []
    squares: list[Pixels] = []
    rejected: dict[str, str] = {}
    for copy in shard:
        try:
            square = source.square(copy.image_id)
        except ImageRejected as error:
            rejected[copy.image_id] = error.reason
            continue
        if copy.view:
            square = changed(square, augmentation, np.random.default_rng([zlib.crc32(copy.key.encode()), copy.view]))
        read.append(copy)
        squares.append(square)
    return read, squares, rejected


def _copy(image_id: str, view: int, augmentation: Augmentation) -> Copy:
    # Other ranges under the same name make other copies.
    version = zlib.crc32(repr(augmentation).encode())
    return Copy(image_id, view, f"{image_id}~{augmentation.name}-{version:08x}-{view}")


def _positions(store: FeatureStore, dataset: AlignedDataset, copies: Sequence[Copy]) -> Rows:
    """(N,) row in the store of each image's copy; −1 where there is none."""
    where: dict[Any, int] = {copy.image_id: int(store.positions([copy.key])[0]) for copy in copies if copy.key in store}
    return np.array([where.get(image_id, -1) for image_id in dataset.image_ids], dtype=np.int64)


def _without(dataset: AlignedDataset, rejected: dict[str, str]) -> AlignedDataset:
    if not rejected:
        return dataset
    return dataset.take(np.flatnonzero(~dataset.frame["image_id"].isin(list(rejected))).astype(np.int64))
