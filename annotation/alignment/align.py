"""Alignment of a whole run: every image and concept gets a heatmap, a score, a null score and a probability.

The work goes shard by shard and memory does not grow with the number of images. Where heads are fitted, judged
images are looked at first; their cell features stay on disk, so that no image passes the tower twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from annotation.alignment.adapt import CrossFit, cross_fit, fold_of
from annotation.alignment.dense import heatmaps, reference_contrast
from annotation.alignment.features import CellStore
from annotation.alignment.nulls import NEGATION, NULL_PROMPTS
from annotation.alignment.options import AlignOptions
from annotation.alignment.projections import projections
from annotation.alignment.source import Cells, CellSource, OnRejected, slices
from annotation.alignment.towers import Aligner, load_aligner
from annotation.votes import Votes, training_votes
from data_contracts.concepts import Vocabulary
from data_contracts.errors import ConfigurationError
from data_contracts.ports import Advance, PixelReader, ignore_progress
from data_contracts.tables import ALIGNMENT


class _References(NamedTuple):
    """Prompts that concepts are contrasted with."""

    text: Tensor
    """(R, D) unit rows."""
    applies: Tensor
    """(K, R) True where a reference is one of the concept's."""
    scale: float
    """The model's own factor of cosines."""


class _Head(NamedTuple):
    """What turns cell features into maps and probabilities."""

    project: Callable[[Tensor], Tensor]
    text: Tensor
    null_text: Tensor
    probability: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float64]] | None
    """(n, F) mean features → (n, K), or None for a head that nothing was fitted to."""
    references: _References | None = None
    """None for a fitted head: it reads judgements, not texts, and its probability needs no reference."""


def align(  # noqa: PLR0913  (the border's agreed names)
    image_ids: Sequence[str],
    read: PixelReader,
    vocabulary: Vocabulary,
    judgements: pd.DataFrame,
    options: AlignOptions,
    *,
    groups: Mapping[str, str] | None = None,
    cache_dir: Path,
    advance: Advance = ignore_progress,
    on_rejected: OnRejected | None = None,
) -> Iterator[pa.Table]:
    """ALIGNMENT tables, one a shard of `options.shard_size` images, heatmaps included.

    `similarity` is the mean over cells of the cosine with the concept's text; `null_similarity` the same for
    prompts that name nothing, averaged. `probability` is fitted (logistic, cross-fitted) to the judgements from
    the mean cell before normalisation: the chance that the judges would call the concept present, their faults
    included. It is null where nothing was fitted.

    Args:
        image_ids: Images to align; each once.
        read: Gives the pixels of an image.
        vocabulary: The concepts and their order.
        judgements: The ledger; used only to fit heads, so leave out what people said of test images.
        options: Model, batches, folds.
        groups: Image id → patient; images of one patient are never on both sides of a fit.
        cache_dir: Where cell features may stay between runs.
        advance: Told the number of images that were just looked at.
        on_rejected: Told which image could not be read, and why; it gets no row.

    Raises:
        ConfigurationError: The model cannot be had, or heads must be fitted and there is no judgement.
    """
    source = cell_source(read, options, cache_dir, advance, on_rejected)
    return _tables(image_ids, vocabulary, judgements, source, folds_of(image_ids, groups, options))


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


def folds_of(image_ids: Sequence[str], groups: Mapping[str, str] | None, options: AlignOptions) -> dict[str, int]:
    """Image id → fold; images of one group are in one."""
    names = groups or {}
    folds = fold_of((names.get(i) or i for i in image_ids), options.n_folds, options.seed)
    return dict(zip(image_ids, folds.tolist(), strict=True))


def _tables(
    image_ids: Sequence[str],
    vocabulary: Vocabulary,
    judgements: pd.DataFrame,
    source: CellSource,
    folds: Mapping[str, int],
) -> Iterator[pa.Table]:
    if not len(vocabulary):
        return
    heads = _heads(image_ids, vocabulary, judgements, source, folds)
    for shard in slices(image_ids, source.options.shard_size):
        parts = [
            _table(ids, cells[rows], heads[fold], vocabulary)
            for batch_ids, cells in source.batches(shard)
            for fold, rows, ids in _by_fold(batch_ids, folds, len(heads))
        ]
        if parts:
            # Heads and the store group images; the table keeps the order in which they were asked for.
            table = pa.concat_tables(parts)
            place = pd.Index(shard).get_indexer(table.column("image_id").to_pandas())
            yield ALIGNMENT.to_arrow(table.take(np.argsort(place, kind="stable")), "alignment")


def _heads(
    image_ids: Sequence[str],
    vocabulary: Vocabulary,
    judgements: pd.DataFrame,
    source: CellSource,
    folds: Mapping[str, int],
) -> list[_Head]:
    """One head a fold, or a single one for everything where nothing is fitted."""
    aligner, options = source.aligner, source.options
    text = aligner.embed_concepts(concept_wordings(vocabulary))
    null_text = aligner.embed_text(NULL_PROMPTS)
    if not options.adapts:
        references = _references(vocabulary, aligner)
        return [_Head(aligner.project, _tensor(text, aligner), _tensor(null_text, aligner), None, references)]
    ids, features, votes = fit_data(image_ids, vocabulary, judgements, source)
    fit = cross_fit(features, votes, np.array([folds[i] for i in ids]), options.n_folds)
    return [_fitted_head(fit, fold, features, text, null_text, aligner) for fold in range(options.n_folds)]


def fit_data(
    image_ids: Sequence[str], vocabulary: Vocabulary, judgements: pd.DataFrame, source: CellSource
) -> tuple[list[str], npt.NDArray[np.float32], Votes]:
    """Judged images (at most `max_fit_images`), their (n, F) mean cell features and votes.

    Raises:
        ConfigurationError: There is no judged image.
    """
    votes = training_votes(judgements, image_ids, vocabulary)
    judged = [image_id for image_id, weight in zip(image_ids, votes.weight.max(1), strict=True) if weight > 0]
    chosen = _sample(judged, source.options.max_fit_images)
    pooled = [(ids, cells.astype(np.float32).mean((1, 2))) for ids, cells in source.shards(chosen)]
    if not pooled:
        raise ConfigurationError(
            f"aligner {source.options.model!r}: expected judged images to fit its projections to, got none; "
            "nothing was aligned.",
            remedy="Run `medmicn judge` first, import labels, or choose a pretrained aligner with adapt = false.",
        )
    ids = [image_id for batch, _ in pooled for image_id in batch]
    rows = pd.Index(image_ids).get_indexer(ids)
    return ids, np.concatenate([rows_of for _, rows_of in pooled]), Votes(votes.value[rows], votes.weight[rows])


def _fitted_head(
    fit: CrossFit,
    fold: int,
    features: npt.NDArray[np.float32],
    text: npt.NDArray[np.float32],
    null_text: npt.NDArray[np.float32],
    aligner: Aligner,
) -> _Head:
    probe = fit.probes[fold]
    heads = projections(probe, text, features, null_text)
    weight, bias = _tensor(heads.image_weight, aligner), _tensor(heads.image_bias, aligner)

    def project(cells: Tensor) -> Tensor:
        return cells @ weight.T + bias

    def probability(mean_cells: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        return fit.probability(probe(mean_cells), fold)

    return _Head(project, _tensor(heads.text(text), aligner), _tensor(heads.text(null_text), aligner), probability)


def concept_texts(vocabulary: Vocabulary) -> list[str]:
    """What the text tower reads for each concept: its name, with its group or definition where names repeat."""
    counts = pd.Series(vocabulary.names).str.lower().value_counts()
    return [
        concept.name
        if counts[concept.name.lower()] == 1
        else f"{concept.name}, {concept.group or concept.definition or concept.concept_id}"
        for concept in vocabulary
    ]


def concept_wordings(vocabulary: Vocabulary) -> list[tuple[str, ...]]:
    """For each concept its text and its synonyms; their embeddings are averaged."""
    return [
        (text, *(synonym for synonym in concept.synonyms if synonym.strip()))
        for text, concept in zip(concept_texts(vocabulary), vocabulary, strict=True)
    ]


def reference_texts(vocabulary: Vocabulary) -> tuple[list[str], npt.NDArray[np.bool_]]:
    """(R texts, (K, R) whose they are): null prompts for all, each concept's negation and what it is confused with."""
    texts, owners = list(NULL_PROMPTS), [list(range(len(vocabulary)))] * len(NULL_PROMPTS)
    for k, (text, concept) in enumerate(zip(concept_texts(vocabulary), vocabulary, strict=True)):
        own = [NEGATION.format(text)] + ([concept.contrast] if concept.contrast.strip() else [])
        texts += own
        owners += [[k]] * len(own)
    applies = np.zeros((len(vocabulary), len(texts)), bool)
    for r, concepts in enumerate(owners):
        applies[concepts, r] = True
    return texts, applies


def _references(vocabulary: Vocabulary, aligner: Aligner) -> _References:
    texts, applies = reference_texts(vocabulary)
    text = _tensor(aligner.embed_text(texts), aligner)
    return _References(text, torch.from_numpy(applies).to(aligner.device), aligner.text_scale)


@torch.inference_mode()
def _table(image_ids: Sequence[str], cells: Cells, head: _Head, vocabulary: Vocabulary) -> pa.Table:
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


def _by_fold(
    image_ids: list[str], folds: Mapping[str, int], n_heads: int
) -> Iterator[tuple[int, npt.NDArray[np.int64], list[str]]]:
    """(head, row numbers, ids) of the images that share a head."""
    fold = np.array([folds[i] if n_heads > 1 else 0 for i in image_ids])
    for number in np.unique(fold):
        rows = np.flatnonzero(fold == number)
        yield int(number), rows, [image_ids[row] for row in rows]


def _sample(image_ids: Sequence[str], n_max: int) -> list[str]:
    """At most `n_max` of the images, chosen by hash, so that the choice hardly changes when images are added."""
    if len(image_ids) <= n_max:
        return list(image_ids)
    by_hash = sorted((hashlib.sha256(i.encode()).digest(), i) for i in image_ids)
    chosen = {i for _, i in by_hash[:n_max]}
    return [i for i in image_ids if i in chosen]


def _tensor(array: npt.NDArray[np.floating], aligner: Aligner) -> Tensor:
    return torch.as_tensor(np.asarray(array, np.float32), device=aligner.device)
