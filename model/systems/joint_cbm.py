"""The joint concept bottleneck model (Koh et al., ICML 2020)."""

from __future__ import annotations

from torch import Tensor, nn

from model.concept_encoder import ConceptCode, Intervention
from model.config import TrainConfig
from model.network import Head, NetworkOutput, Sizes, Standardise, require_concepts


class JointCBM(Head):
    """Features → concept probabilities → classes, both steps linear and trained together: no way round the concepts.

    Together means that the classes shape the concepts too: a probability may carry more than its concept.
    """

    def __init__(self, sizes: Sizes, config: TrainConfig) -> None:
        """Make the network with random weights."""
        super().__init__()
        require_concepts(sizes)
        self.standardise = Standardise(sizes.n_features)
        self.dropout = nn.Dropout(config.dropout)
        self.concepts = nn.Linear(sizes.n_features, sizes.n_concepts)
        self.classes = nn.Linear(sizes.n_concepts, sizes.n_classes)

    def forward(self, f: Tensor, intervention: Intervention | None = None) -> NetworkOutput:
        """(B, F) → classes and concepts; a concept's embedding is its probability."""
        logits = self.concepts(self.dropout(self.standardise(f)))  # (B, K)
        c = logits.sigmoid()
        if intervention is not None:
            c = intervention.applied_to(c)
        return NetworkOutput(self.classes(c), ConceptCode(c.unsqueeze(-1), logits, c))
