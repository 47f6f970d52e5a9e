"""Med-MICN, read from top to bottom like the paper. Hu et al., NeurIPS 2024 (arXiv 2410.21494).

    f        = backbone(x)
    e_i, ĉ_i = concept encoder(f)
    ŷ        = fuzzy rule over (e, ĉ)
    ỹ        = W_F · [f, e]                     the prediction that is reported; two other fusions can be chosen

A *head* is everything after the backbone. Every system in `model/systems` is a head that returns the same
`NetworkOutput`, so that one trainer and one protocol serve them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_contracts.errors import InputRefused
from model.concept_encoder import ConceptCode, ConceptEncoder, Intervention
from model.config import Fusion, TrainConfig
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
    side_logits: Tensor | None = None  # (B, C) the part of ỹ that features add past the concepts, if ỹ is such a sum


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
        self.fusion = FUSIONS[config.fusion](sizes, config)

    def forward(self, f: Tensor, intervention: Intervention | None = None) -> NetworkOutput:  # (B, F)
        """Fused class logits ỹ, concept logits and rule."""
        f = self.dropout(self.standardise(f))
        concepts = self.concepts(f, intervention)  # e (B, K, m), ĉ (B, K)
        fused = self.fusion(f, concepts.embeddings.flatten(1))  # ỹ (B, C)
        return NetworkOutput(fused.logits, concepts, self.logic(concepts), fused.side_logits)


class Fused(NamedTuple):
    """Class logits, and the part of them that passes the concepts by."""

    logits: Tensor  # (B, C)
    side_logits: Tensor | None  # (B, C)


class Concatenation(nn.Module):
    """ỹ = W_F · [f, e], the paper's: one linear layer that may read the features and leave the concepts alone."""

    def __init__(self, sizes: Sizes, config: TrainConfig) -> None:
        """Make the layer with random weights."""
        super().__init__()
        layer = nn.Linear(sizes.n_features + sizes.n_concepts * config.embedding_size, sizes.n_classes)
        self.weight, self.bias = layer.weight, layer.bias  # W_F

    def forward(self, f: Tensor, e: Tensor) -> Fused:  # (B, F), (B, K·m)
        """ỹ, and W_f · f, the features' part of it; the bias counts to neither."""
        side = F.linear(f, self.weight[:, : f.shape[1]])
        return Fused(side + F.linear(e, self.weight[:, f.shape[1] :], self.bias), side)


class Bottleneck(nn.Module):
    """ỹ = W · e: what is not in the concepts' embeddings cannot be used."""

    def __init__(self, sizes: Sizes, config: TrainConfig) -> None:
        """Make the layer with random weights."""
        super().__init__()
        layer = nn.Linear(sizes.n_concepts * config.embedding_size, sizes.n_classes)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, f: Tensor, e: Tensor) -> Fused:  # (B, F), (B, K·m)
        """ỹ; nothing passes the concepts by."""
        return Fused(F.linear(e, self.weight, self.bias), None)


class Residual(nn.Module):
    """ỹ = W_e · e + W_f · f, where W_f learns only what the concepts leave over.

    In training each image is one of two kinds. Where the side channel is hidden, the concepts learn to decide alone.
    Where it is shown, they count as given (no gradient), so that it fits their remaining errors, as in boosting.
    """

    def __init__(self, sizes: Sizes, config: TrainConfig) -> None:
        """Make the layer; the side channel starts at 0."""
        super().__init__()
        self.side_dropout = config.side_dropout
        self.classes = nn.Linear(sizes.n_concepts * config.embedding_size, sizes.n_classes)
        self.side = nn.Linear(sizes.n_features, sizes.n_classes, bias=False)
        nn.init.zeros_(self.side.weight)

    def forward(self, f: Tensor, e: Tensor) -> Fused:  # (B, F), (B, K·m)
        """ỹ, and the side channel's part of it."""
        explained, side = self.classes(e), self.side(f.detach())
        if not self.training:
            return Fused(explained + side, side)
        hidden = torch.rand(len(f), 1, device=f.device) < self.side_dropout
        return Fused(torch.where(hidden, explained, explained.detach() + side), torch.where(hidden, 0, side))


FUSIONS: dict[Fusion, Callable[[Sizes, TrainConfig], Concatenation | Bottleneck | Residual]] = {
    "concat": Concatenation,
    "bottleneck": Bottleneck,
    "residual": Residual,
}
"""What reads features (B, F) and flattened embeddings (B, K·m), and gives class logits."""


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
