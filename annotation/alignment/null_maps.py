"""Heatmaps that know nothing of the concept: what a concept's map must beat where people marked where it is.

A fitted head's null is a head fitted in the same way to judgements that were dealt out to other images; an untouched
model's null is the map of prompts that name nothing, which is one and the same for all concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from annotation.alignment.adapt import cross_fit
from annotation.alignment.align import by_head
from annotation.alignment.dense import heatmaps
from annotation.alignment.heads import Head, concept_rows, fit_data, fitted_head, plain_head
from annotation.alignment.inputs import AlignmentInputs
from annotation.alignment.nulls import beside, dealt
from annotation.alignment.source import CellSource


class NullMaps:
    """Null maps of any of the images that `inputs` are about."""

    def __init__(self, inputs: AlignmentInputs) -> None:
        """Fit what is to be fitted; raises `ConfigurationError` when there is nothing to fit it to."""
        self._inputs = inputs
        self._source = inputs.source()
        self._heads = _null_heads(inputs, self._source)

    def __call__(self, image_ids: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
        """Image id → (K, h, w) null map of each concept, for the readable ones of these images."""
        result: dict[str, npt.NDArray[np.float32]] = {}
        for batch_ids, cells in self._source.shards(image_ids):
            for number, rows, ids in by_head(batch_ids, self._inputs.folds, len(self._heads)):
                result |= dict(zip(ids, self._maps(cells[rows], self._heads[number]), strict=True))
        return result

    def _maps(self, cells: npt.NDArray[np.float16], head: Head) -> npt.NDArray[np.float32]:
        """(n, K, h, w) of cells that share a head."""
        with torch.inference_mode():
            projected = head.project(torch.from_numpy(cells).to(head.text.device).float())
            if self._inputs.options.adapts:
                return heatmaps(projected, head.text).maps.float().cpu().numpy()
            empty = heatmaps(projected, head.null_text).maps.mean(1, keepdim=True).float().cpu().numpy()
        return np.repeat(empty, len(self._inputs.vocabulary), axis=1)


def _null_heads(inputs: AlignmentInputs, source: CellSource) -> list[Head]:
    if not inputs.options.adapts:
        return [plain_head(inputs.vocabulary, source.aligner)]
    found = fit_data(inputs, source)
    others = dealt(found.votes, np.random.default_rng(inputs.options.seed))
    fit = cross_fit(found.features, beside(found.votes, others), found.folds, inputs.options.n_folds)
    rows, n_concepts = concept_rows(inputs.vocabulary, source.aligner), len(inputs.vocabulary)
    return [
        fitted_head(replace(probe, weight=probe.weight[n_concepts:]), found.features, rows, source.aligner)
        for probe in fit.probes
    ]
