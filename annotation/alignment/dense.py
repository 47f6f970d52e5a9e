"""Heatmaps and scores: cosines between every cell of an image and every concept's text."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Heatmaps(NamedTuple):
    """Cosines of one batch of images with K concept texts and some null prompts."""

    maps: Tensor
    """(B, K, h, w) P[h, w, i] = cos(V[h, w], t_i)."""
    similarity: Tensor
    """(B, K) s_i = mean of P over cells: not the cosine of the pooled embedding."""
    null_similarity: Tensor
    """(B,) the same mean for the null prompts, averaged over them; NaN without any."""
    mean_cell: Tensor
    """(B, D) mean of the unit cells: its dot product with a unit text is that text's similarity."""


@torch.inference_mode()
def heatmaps(cells: Tensor, text: Tensor, null_text: Tensor | None = None) -> Heatmaps:
    """Heatmaps and scores of (B, h, w, D) cells for (K, D) unit text rows and (M, D) unit null rows.

    Cells need not be normalised; a cell of length zero has cosine 0 with everything.
    """
    unit = F.normalize(cells.flatten(1, 2), dim=-1)  # (B, h*w, D)
    maps = (unit @ text.T).permute(0, 2, 1).unflatten(2, cells.shape[1:3])
    # The mean of cosines is linear in the unit cells, so scores need no map of their own.
    mean_cell = unit.mean(1)
    if null_text is None or not len(null_text):
        null = torch.full((len(cells),), torch.nan, device=cells.device)
    else:
        null = (mean_cell @ null_text.T).mean(1)
    return Heatmaps(maps, mean_cell @ text.T, null, mean_cell)


@torch.inference_mode()
def reference_contrast(similarity: Tensor, references: Tensor, applies: Tensor, scale: float) -> Tensor:
    """(B, K) share of each concept in a softmax with its reference prompts (as MONET scores concepts), 0-1.

    A raw cosine says how much an image resembles a text, most of which is being an image at all; the references
    carry that part too, and it cancels.

    Args:
        similarity: (B, K) of the concepts.
        references: (B, R) of all reference prompts.
        applies: (K, R) True where a reference is one of the concept's.
        scale: The model's own factor of cosines in its softmax.
    """
    gaps = scale * (references[:, None, :] - similarity[:, :, None])  # (B, K, R)
    return 1 / (1 + torch.where(applies, gaps.double().exp(), 0.0).sum(2))
