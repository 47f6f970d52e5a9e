"""What an alignment looks at: the same for the alignment itself, its controls and its null maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd

from annotation.alignment.adapt import fold_of
from annotation.alignment.features import CellStore
from annotation.alignment.options import AlignOptions
from annotation.alignment.source import CellSource, OnRejected
from annotation.alignment.towers import load_aligner
from data_contracts.concepts import Vocabulary
from data_contracts.ports import Advance, PixelReader, ignore_progress


@dataclass(frozen=True)
class AlignmentInputs:
    """Images, concepts and judgements, and how they are looked at."""

    image_ids: Sequence[str]
    """Images to align; each once. Their folds depend on each one's own id or group only."""
    read: PixelReader
    """Gives the pixels of an image."""
    vocabulary: Vocabulary
    """The concepts and their order."""
    judgements: pd.DataFrame = field(repr=False)
    """The ledger; heads are fitted to it, so leave out what people said of test images."""
    options: AlignOptions
    """Model, batches, folds."""
    cache_dir: Path
    """Where cell features may stay between runs: what was looked at once is not read again."""
    groups: Mapping[str, str] | None = field(default=None, repr=False)
    """Image id → patient; images of one patient are never on both sides of a fit."""

    @cached_property
    def folds(self) -> dict[str, int]:
        """Image id → fold; images of one group are in one."""
        names = self.groups or {}
        folds = fold_of((names.get(i) or i for i in self.image_ids), self.options.n_folds, self.options.seed)
        return dict(zip(self.image_ids, folds.tolist(), strict=True))

    def source(self, advance: Advance = ignore_progress, on_rejected: OnRejected | None = None) -> CellSource:
        """Their cell features; raises `ConfigurationError` when the model cannot be had."""
        return cell_source(self.read, self.options, self.cache_dir, advance, on_rejected)


def cell_source(
    read: PixelReader,
    options: AlignOptions,
    cache_dir: Path,
    advance: Advance = ignore_progress,
    on_rejected: OnRejected | None = None,
) -> CellSource:
    """Cell features of images by the model of `options`, kept under `cache_dir`."""
    aligner = load_aligner(
        options.model,
        device=options.device,
        templates=options.templates,
        value_features=options.value_features,
        tiling=options.tiling,
    )
    store = CellStore(
        cache_dir / "cells" / aligner.fingerprint[:16],
        aligner.cell_shape[2],
        max_bytes=int(options.max_cache_gb * 1e9),
    )
    return CellSource(aligner, read, store, options, advance, on_rejected)
