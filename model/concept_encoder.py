"""The concept encoder: one embedding and one probability for each concept (METHOD: e_i, ĉ_i)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConceptCode(NamedTuple):
    """K concepts of B images."""

    embeddings: Tensor  # (B, K, m)  e_i
    logits: Tensor  # (B, K)
    probabilities: Tensor  # (B, K)  ĉ_i = σ(logits)


class Intervention(NamedTuple):
    """Truth values that stand in place of the network's own: an expert's correction, or one made in training."""

    values: Tensor  # (B, K) in [0, 1]
    where: Tensor  # (B, K) bool; elsewhere the network's own ĉ_i stays

    def applied_to(self, probabilities: Tensor) -> Tensor:
        """(B, K) ĉ with the corrected cells replaced."""
        return torch.where(self.where, self.values.to(probabilities.dtype), probabilities)


class ConceptEncoder(nn.Module):
    """f (B, F) → e_i = ĉ_i·e⁺_i + (1−ĉ_i)·e⁻_i with ĉ_i = σ(w·[e⁺_i, e⁻_i]), for all concepts at once.

    The contexts e⁺ and e⁻ of all K concepts come out of one matrix product, so that two hundred concepts cost
    little more than one. The scoring vector w is shared: concepts differ in their contexts.
    """

    def __init__(self, n_features: int, n_concepts: int, embedding_size: int) -> None:
        """Make the layer with random weights: (F) → (K, m)."""
        super().__init__()
        self.n_concepts, self.embedding_size = n_concepts, embedding_size
        self.contexts = nn.Linear(n_features, n_concepts * 2 * embedding_size)
        self.score = nn.Linear(2 * embedding_size, 1)

    def forward(self, f: Tensor, intervention: Intervention | None = None) -> ConceptCode:  # (B, F)
        """Embeddings (B, K, m), the network's own logits and, with corrections in place, probabilities (B, K)."""
        context = F.leaky_relu(self.contexts(f)).unflatten(-1, (self.n_concepts, 2 * self.embedding_size))  # (B, K, 2m)
        logits = self.score(context).squeeze(-1)  # (B, K)
        probabilities = logits.sigmoid()  # ĉ
        if intervention is not None:
            probabilities = intervention.applied_to(probabilities)
        present, absent = context.chunk(2, dim=-1)  # e⁺, e⁻: (B, K, m)
        embeddings = torch.lerp(absent, present, probabilities.unsqueeze(-1))  # (B, K, m)
        return ConceptCode(embeddings, logits, probabilities)
