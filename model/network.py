"""Med-MICN, read from top to bottom like the paper. Hu et al., NeurIPS 2024 (arXiv 2410.21494).

    f        = backbone(x)
    e_i, ĉ_i = concept encoder(f)
    ŷ        = fuzzy rule over (e, ĉ)
    ỹ        = W_F · [f, e]                     the prediction that is reported

A *head* is everything after the backbone. Every system in `model/systems` is a head that returns the same
`NetworkOutput`, so that one trainer and one protocol serve them all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_contracts.errors import InputRefused
from model.concept_encoder import ConceptCode, ConceptEncoder, Intervention
from model.config import TrainConfig
from model.logic import Rule, reasoning_layer


class Sizes(NamedTuple):
    """Sizes that a head is made for."""

    n_features: int  # F
    n_concepts: int  # K
    n_classes: int  # C


class NetworkOutput(NamedTuple):
    """What a head says of B images. A system without concepts or without a rule leaves them out."""

    class_logits: Tensor  # (B, C)  ỹ
    concepts: ConceptCode | None = None  # e, ĉ
    rule: Rule | None = None  # ŷ_neural and its terms


class Standardise(nn.Module):
    """Features centred, and divided by one number for all; the identity until `fit` is called.

    One number, because a feature that is rarely active is mostly noise: scaling each to unit deviation amplifies it,
    and costs two points of macro-F1 and one of concept AUROC on WBCAtt's validation images. The statistics are buffers,
    stored with the weights: training, test and saliency maps all see features scaled the same way.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, n_features: int) -> None:
        """Start as the identity on F features."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("deviation", torch.ones(()))

    def fit(self, mean: Tensor, variance: Tensor) -> None:
        """Set the statistics from each feature's mean and variance (F,)."""
        self.mean.copy_(mean)
        self.deviation.copy_(variance.mean().sqrt().clamp(min=1e-6))

    def forward(self, f: Tensor) -> Tensor:  # (B, F)
        """Standardised features (B, F)."""
        return (f - self.mean) / self.deviation


class Head(nn.Module):
    """A network from backbone features to `NetworkOutput`; its first layer standardises them."""

    standardise: Standardise

    def forward(self, f: Tensor, intervention: Intervention | None = None) -> NetworkOutput:  # (B, F)
        """Class logits, and concepts and rule where the system has them, as they follow from corrected concepts."""
        raise NotImplementedError


class MedMICN(Head):
    """Concept encoder, fuzzy rule and fused prediction."""

    def __init__(self, sizes: Sizes, config: TrainConfig) -> None:
        """Make the head with random weights."""
        super().__init__()
        require_concepts(sizes)
        m = config.embedding_size
        self.standardise = Standardise(sizes.n_features)
        self.dropout = nn.Dropout(config.dropout)
        self.concepts = ConceptEncoder(sizes.n_features, sizes.n_concepts, m)
        self.logic = reasoning_layer(sizes.n_classes, config)
        self.fusion = nn.Linear(sizes.n_features + sizes.n_concepts * m, sizes.n_classes)  # W_F

    def forward(self, f: Tensor, intervention: Intervention | None = None) -> NetworkOutput:  # (B, F)
        """Fused class logits ỹ, concept logits and rule."""
        f = self.dropout(self.standardise(f))
        concepts = self.concepts(f, intervention)  # e (B, K, m), ĉ (B, K)
        fused = self.fusion(torch.cat([f, concepts.embeddings.flatten(1)], dim=1))  # ỹ (B, C)
        return NetworkOutput(fused, concepts, self.logic(concepts))


def require_concepts(sizes: Sizes) -> None:
    """Raise `InputRefused` where a network with concepts would be made for none."""
    if sizes.n_concepts == 0:
        raise InputRefused(
            "vocabulary: a network with concepts needs at least 1 concept, got 0; nothing was trained.",
            remedy="Look at `medmicn concepts` for why every concept was dropped, or train family = 'black-box'.",
        )


class ImageNetwork(nn.Module):
    """A backbone and a head: images to `NetworkOutput`. The head computes in float32 whatever the backbone does."""

    def __init__(self, backbone: nn.Module, head: Head) -> None:
        """Join a timm backbone without classifier and a head."""
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor, intervention: Intervention | None = None) -> NetworkOutput:  # (B, 3, S, S)
        """What the head says of these images."""
        f = self.backbone(x)
        with torch.autocast(f.device.type, enabled=False):
            return self.head(f.float(), intervention)
