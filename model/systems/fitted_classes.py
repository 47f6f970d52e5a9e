"""Heads whose class layer is fitted when the concepts are learnt: the part that sequential systems share.

While the concepts are trained, a running class layer reads them without a gradient, so that the classes cannot shape
them, and so that the epoch is chosen as for every other system. Then `model.systems.finish` fits the layer anew, a
convex problem with one solution, on the concepts as they are in the end.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from model.concept_encoder import ConceptCode, Intervention
from model.config import TrainConfig
from model.network import Head, NetworkOutput, Sizes, Standardise, require_concepts


class FittedClasses(Head):
    """Features → concepts by one linear layer; their standardised scores → classes by a fitted linear layer."""

    l1_ratio: ClassVar[float]
    """Share of the absolute penalty, which makes weights exactly 0, in the elastic net of the class layer."""

    score_mean: Tensor
    score_deviation: Tensor

    def __init__(self, sizes: Sizes, config: TrainConfig) -> None:
        """Make the network with random weights."""
        super().__init__()
        require_concepts(sizes)
        self.standardise = Standardise(sizes.n_features)
        self.dropout = nn.Dropout(config.dropout)
        self.concepts = nn.Linear(sizes.n_features, sizes.n_concepts)
        self.classes = nn.Linear(sizes.n_concepts, sizes.n_classes)
        self.register_buffer("score_mean", torch.zeros(sizes.n_concepts))
        self.register_buffer("score_deviation", torch.ones(sizes.n_concepts))

    def scores(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """(B, K) what the class layer reads of each concept."""
        raise NotImplementedError

    def forward(self, f: Tensor, intervention: Intervention | None = None) -> NetworkOutput:
        """(B, F) → classes and concepts; a concept's embedding is its score."""
        logits = self.concepts(self.dropout(self.standardise(f)))  # (B, K)
        c = logits.sigmoid()
        if intervention is not None:
            c = intervention.applied_to(c)
        scores = self.scores(logits, c)
        standardised = (scores.detach() - self.score_mean) / self.score_deviation
        return NetworkOutput(self.classes(standardised), ConceptCode(scores.unsqueeze(-1), logits, c))

    @torch.no_grad()
    def set_score_scale(self, scores: Tensor) -> None:
        """Let each concept's scores (n, K) have mean 0 and deviation 1; those of a constant concept are 0."""
        deviation = scores.std(0, correction=0)
        self.score_mean.copy_(scores.mean(0))
        self.score_deviation.copy_(torch.where(deviation > 1e-6, deviation, 1.0))
