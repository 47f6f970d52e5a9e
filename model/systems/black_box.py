"""The black box: what the features alone can do."""

from __future__ import annotations

from torch import Tensor, nn

from model.concept_encoder import Intervention
from model.config import TrainConfig
from model.network import Head, NetworkOutput, Sizes, Standardise


class BlackBox(Head):
    """Features → classes by one linear layer; no concepts, no rule."""

    def __init__(self, sizes: Sizes, config: TrainConfig) -> None:
        """Make the network with random weights."""
        super().__init__()
        self.standardise = Standardise(sizes.n_features)
        self.dropout = nn.Dropout(config.dropout)
        self.classes = nn.Linear(sizes.n_features, sizes.n_classes)

    def forward(self, f: Tensor, intervention: Intervention | None = None) -> NetworkOutput:
        """(B, F) → classes; it has no concepts to correct."""
        return NetworkOutput(self.classes(self.dropout(self.standardise(f))))
