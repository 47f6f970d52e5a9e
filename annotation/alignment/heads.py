"""Heads: what turns cell features into maps and probabilities, fitted to judgements or as the model came."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from annotation.alignment.adapt import Probe, cross_fit
from annotation.alignment.inputs import AlignmentInputs
from annotation.alignment.nulls import NEGATION, NULL_PROMPTS
from annotation.alignment.projections import projections
from annotation.alignment.source import CellSource
from annotation.alignment.towers import Aligner
from annotation.votes import Votes, training_votes
from data_contracts.concepts import Vocabulary
from data_contracts.errors import ConfigurationError


class References(NamedTuple):
    """Prompts that concepts are contrasted with."""

    text: Tensor
    """(R, D) unit rows."""
    applies: Tensor
    """(K, R) True where a reference is one of the concept's."""
    scale: float
    """The model's own factor of cosines."""


class Head(NamedTuple):
    """What turns cell features into maps and probabilities."""

    project: Callable[[Tensor], Tensor]
    text: Tensor
    null_text: Tensor
    probability: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float64]] | None = None
    """(n, F) mean features → (n, K), or None for a head that nothing was fitted to."""
    references: References | None = None
    """None for a fitted head: it reads judgements, not texts, and its probability needs no reference."""


class FitData(NamedTuple):
    """What heads are fitted to."""

    image_ids: list[str]
    """Judged images, at most `max_fit_images` of them."""
    features: npt.NDArray[np.float32]
    """(n, F) their mean cell features."""
    votes: Votes
    """(n, K)"""
    folds: npt.NDArray[np.int64]
    """(n,)"""


def fit_data(inputs: AlignmentInputs, source: CellSource) -> FitData:
    """The judged images, and what heads learn of them.

    Raises:
        ConfigurationError: There is no judged image.
    """
    image_ids = inputs.image_ids
    votes = training_votes(inputs.judgements, image_ids, inputs.vocabulary)
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
    return FitData(
        ids,
        np.concatenate([rows_of for _, rows_of in pooled]),
        Votes(votes.value[rows], votes.weight[rows]),
        np.array([inputs.folds[i] for i in ids], np.int64),
    )


def heads_of(inputs: AlignmentInputs, source: CellSource) -> list[Head]:
    """One head a fold, or a single one for everything where nothing is fitted."""
    if not inputs.options.adapts:
        return [plain_head(inputs.vocabulary, source.aligner)]
    found = fit_data(inputs, source)
    fit = cross_fit(found.features, found.votes, found.folds, inputs.options.n_folds)
    texts = concept_rows(inputs.vocabulary, source.aligner)

    def probability(fold: int) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float64]]:
        return lambda mean_cells: fit.probability(fit.probes[fold](mean_cells), fold)

    return [
        fitted_head(probe, found.features, texts, source.aligner)._replace(probability=probability(fold))
        for fold, probe in enumerate(fit.probes)
    ]


class TextRows(NamedTuple):
    """Unit rows of texts as the text tower gives them."""

    concepts: npt.NDArray[np.float32]
    """(K, D)"""
    nulls: npt.NDArray[np.float32]
    """(M, D) of prompts that name nothing."""


def concept_rows(vocabulary: Vocabulary, aligner: Aligner) -> TextRows:
    """Texts of the concepts and of the null prompts."""
    return TextRows(aligner.embed_concepts(concept_wordings(vocabulary)), aligner.embed_text(NULL_PROMPTS))


def plain_head(vocabulary: Vocabulary, aligner: Aligner) -> Head:
    """The model's own head."""
    rows = concept_rows(vocabulary, aligner)
    text, null_text = _tensor(rows.concepts, aligner), _tensor(rows.nulls, aligner)
    return Head(aligner.project, text, null_text, references=_references(vocabulary, aligner))


def fitted_head(probe: Probe, features: npt.NDArray[np.float32], rows: TextRows, aligner: Aligner) -> Head:
    """A probe as a head, without a probability."""
    found = projections(probe, rows.concepts, features, rows.nulls)
    weight, bias = _tensor(found.image_weight, aligner), _tensor(found.image_bias, aligner)

    def project(cells: Tensor) -> Tensor:
        return cells @ weight.T + bias

    return Head(project, _tensor(found.text(rows.concepts), aligner), _tensor(found.text(rows.nulls), aligner))


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


def _references(vocabulary: Vocabulary, aligner: Aligner) -> References:
    texts, applies = reference_texts(vocabulary)
    text = _tensor(aligner.embed_text(texts), aligner)
    return References(text, torch.from_numpy(applies).to(aligner.device), aligner.text_scale)


def _sample(image_ids: Sequence[str], n_max: int) -> list[str]:
    """At most `n_max` of the images, chosen by hash, so that the choice hardly changes when images are added."""
    if len(image_ids) <= n_max:
        return list(image_ids)
    by_hash = sorted((hashlib.sha256(i.encode()).digest(), i) for i in image_ids)
    chosen = {i for _, i in by_hash[:n_max]}
    return [i for i in image_ids if i in chosen]


def _tensor(array: npt.NDArray[np.floating], aligner: Aligner) -> Tensor:
    return torch.as_tensor(np.asarray(array, np.float32), device=aligner.device)
