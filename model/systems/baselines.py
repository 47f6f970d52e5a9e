"""The baselines, each as small as its idea."""

from __future__ import annotations

from torch import Tensor, nn

from model.concept_encoder import ConceptCode, ConceptEncoder, Intervention
from model.config import TrainConfig
from model.logic import reasoning_layer
from model.network import Head, NetworkOutput, Sizes, Standardise, require_concepts


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


class ConceptBottleneck(Head):
    """Features → concept probabilities → classes, both steps linear, trained jointly: no way round the concepts."""

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


class RuleOnly(Head):
    """Features → concepts → rule, and the rule decides alone (Deep Concept Reasoner with `dcr` logic)."""

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
