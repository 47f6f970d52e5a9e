"""Alignment of a whole run: every image and concept gets a heatmap, a score, a null score and a probability.

The work goes shard by shard and memory does not grow with the number of images. Where heads are fitted, judged
images are looked at first; their cell features stay on disk, so that no image passes the tower twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import torch

from annotation.alignment.dense import heatmaps, reference_contrast
from annotation.alignment.heads import Head, heads_of
from annotation.alignment.inputs import AlignmentInputs
from annotation.alignment.source import Cells, CellSource, OnRejected, slices
from data_contracts.concepts import Vocabulary
from data_contracts.ports import Advance, ignore_progress
from data_contracts.tables import ALIGNMENT


def align(
    inputs: AlignmentInputs, *, advance: Advance = ignore_progress, on_rejected: OnRejected | None = None
) -> Iterator[pa.Table]:
    """ALIGNMENT tables, one a shard of `options.shard_size` images, heatmaps included.

    `similarity` is the mean over cells of the cosine with the concept's text; `null_similarity` the same for
    prompts that name nothing, averaged. `probability` is fitted (logistic, cross-fitted) to the judgements from
    the mean cell before normalisation: the chance that the judges would call the concept present, their faults
    included. It is null where nothing was fitted.

    Args:
        inputs: What is aligned.
        advance: Told the number of images that were just looked at.
        on_rejected: Told which image could not be read, and why; it gets no row.

    Raises:
        ConfigurationError: The model cannot be had, or heads must be fitted and there is no judgement.
    """
    return _tables(inputs, inputs.source(advance, on_rejected))


def _tables(inputs: AlignmentInputs, source: CellSource) -> Iterator[pa.Table]:
    if not len(inputs.vocabulary):
        return
    heads = heads_of(inputs, source)
    for shard in slices(inputs.image_ids, inputs.options.shard_size):
        parts = [
            _table(ids, cells[rows], heads[fold], inputs.vocabulary)
            for batch_ids, cells in source.batches(shard)
            for fold, rows, ids in by_head(batch_ids, inputs.folds, len(heads))
        ]
        if parts:
            # Heads and the store group images; the table keeps the order in which they were asked for.
            table = pa.concat_tables(parts)
            place = pd.Index(shard).get_indexer(table.column("image_id").to_pandas())
            yield ALIGNMENT.to_arrow(table.take(np.argsort(place, kind="stable")), "alignment")


@torch.inference_mode()
def _table(image_ids: Sequence[str], cells: Cells, head: Head, vocabulary: Vocabulary) -> pa.Table:
    """ALIGNMENT rows of one batch that shares a head, images in order and concepts in the vocabulary's."""
    features = torch.from_numpy(cells).to(head.text.device).float()
    result = heatmaps(head.project(features), head.text, head.null_text)
    n_images, n_concepts, grid_h, grid_w = result.maps.shape
    maps = result.maps.to(torch.float16).cpu().numpy()
    probability = None if head.probability is None else head.probability(features.mean((1, 2)).cpu().numpy())
    contrast = None
    if head.references is not None:
        text, applies, scale = head.references
        shares = reference_contrast(result.similarity, result.mean_cell @ text.T, applies, scale)
        contrast = shares.cpu().numpy().astype(np.float64)
    columns = {
        "image_id": pa.array(image_ids, pa.string()).take(pa.array(np.repeat(np.arange(n_images), n_concepts))),
        "concept_id": pa.array(vocabulary.ids, pa.string()).take(pa.array(np.tile(np.arange(n_concepts), n_images))),
        "similarity": pa.array(result.similarity.double().cpu().numpy().ravel()),
        "null_similarity": pa.array(np.repeat(result.null_similarity.double().cpu().numpy(), n_concepts)),
        "probability": _probabilities(probability, n_images * n_concepts),
        "contrast": _probabilities(contrast, n_images * n_concepts),
        "grid_h": pa.array(np.full(n_images * n_concepts, grid_h, np.int64)),
        "grid_w": pa.array(np.full(n_images * n_concepts, grid_w, np.int64)),
        "heatmap": pa.ListArray.from_arrays(
            pa.array(np.arange(n_images * n_concepts + 1, dtype=np.int32) * (grid_h * grid_w)), pa.array(maps.ravel())
        ),
    }
    return pa.table(columns)


def _probabilities(probability: npt.NDArray[np.float64] | None, n_rows: int) -> pa.Array:
    if probability is None:
        return pa.nulls(n_rows, pa.float64())
    return pa.array(probability.ravel(), pa.float64(), mask=np.isnan(probability.ravel()))


def by_head(
    image_ids: list[str], folds: Mapping[str, int], n_heads: int
) -> Iterator[tuple[int, npt.NDArray[np.int64], list[str]]]:
    """(head, row numbers, ids) of the images that share a head."""
    fold = np.array([folds[i] if n_heads > 1 else 0 for i in image_ids])
    for number in np.unique(fold):
        rows = np.flatnonzero(fold == number)
        yield int(number), rows, [image_ids[row] for row in rows]
