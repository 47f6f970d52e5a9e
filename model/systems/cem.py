"""Concept embedding model (Espinosa Zarlenga et al., NeurIPS 2022)."""

from __future__ import annotations

from torch import Tensor, nn

from model.concept_encoder import ConceptEncoder, Intervention
from model.config import TrainConfig
from model.network import Head, NetworkOutput, Sizes, Standardise, require_concepts


class ConceptEmbeddingModel(Head):
    """Features → concept embeddings → classes by one linear layer on all of them; trained with RandInt."""

    def __init__(self, sizes: Sizes, config: TrainConfig) -> None:
        """Make the network with random weights."""
        super().__init__()
        require_concepts(sizes)
        self.standardise = Standardise(sizes.n_features)
        self.dropout = nn.Dropout(config.dropout)
        self.concepts = ConceptEncoder(sizes.n_features, sizes.n_concepts, config.embedding_size)
        self.classes = nn.Linear(sizes.n_concepts * config.embedding_size, sizes.n_classes)

    def forward(self, f: Tensor, intervention: Intervention | None = None) -> NetworkOutput:
        """(B, F) → classes and concepts."""
        concepts = self.concepts(self.dropout(self.standardise(f)), intervention)
        return NetworkOutput(self.classes(concepts.embeddings.flatten(1)), concepts)
