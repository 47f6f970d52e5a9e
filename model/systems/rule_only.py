"""A rule that decides alone; with `dcr` logic the Deep Concept Reasoner (Barbiero et al., ICML 2023)."""

from __future__ import annotations

from torch import Tensor, nn

from model.concept_encoder import ConceptEncoder, Intervention
from model.config import TrainConfig
from model.logic import reasoning_layer
from model.network import Head, NetworkOutput, Sizes, Standardise, require_concepts


class RuleOnly(Head):
    """Features → concepts → rule, and the rule is the prediction."""

    def __init__(self, sizes: Sizes, config: TrainConfig) -> None:
        """Make the network with random weights."""
        super().__init__()
        require_concepts(sizes)
        self.standardise = Standardise(sizes.n_features)
        self.dropout = nn.Dropout(config.dropout)
        self.concepts = ConceptEncoder(sizes.n_features, sizes.n_concepts, config.embedding_size)
        self.logic = reasoning_layer(sizes.n_classes, config)

    def forward(self, f: Tensor, intervention: Intervention | None = None) -> NetworkOutput:
        """(B, F) → rules and concepts; class logits are the log-odds of the rules' truth."""
        concepts = self.concepts(self.dropout(self.standardise(f)), intervention)
        rule = self.logic(concepts)
        return NetworkOutput(rule.logits, concepts, rule)
