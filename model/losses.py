"""The training loss: L = CE(ỹ, y) + λ1·BCE(ĉ, c) + λ2·L_neural(ŷ_neural, y).

Every term starts from logits, never from a probability that is squashed a second time. The rule's truth values
ŷ_neural are probabilities already, so `L_neural` is taken on their log-odds: for two classes BCE of each truth
value against its class, for more the cross-entropy over classes of those log-odds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.network import NetworkOutput


class Targets(NamedTuple):
    """What is known of B images."""

    classes: Tensor  # (B,) int64
    concepts: Tensor  # (B, K) soft targets in [0, 1]
    mask: Tensor  # (B, K) bool; False where the label abstains

    def take(self, rows: Tensor) -> Targets:
        """The targets of these rows."""
        return Targets(self.classes[rows], self.concepts[rows], self.mask[rows])

    def to(self, device: torch.device) -> Targets:
        """The same targets on a device."""
        return Targets(*(tensor.to(device, non_blocking=True) for tensor in self))


class LossWeights(NamedTuple):
    """λ1, λ2 and the weight of each class."""

    concept: float
    neural: float
    classes: Tensor  # (C,)


class Losses(NamedTuple):
    """Scalar losses of one batch; `total` is what is minimised."""

    total: Tensor
    task: Tensor
    concept: Tensor
    neural: Tensor


def losses(output: NetworkOutput, targets: Targets, weights: LossWeights) -> Losses:
    """The loss and its terms. Terms that a system has no outputs for are zero."""
    zero = output.class_logits.new_zeros(())
    task = F.cross_entropy(output.class_logits, targets.classes, weights.classes)
    concept, neural = zero, zero
    if output.concepts is not None:
        concept = concept_loss(output.concepts.logits, targets.concepts, targets.mask)
    if output.rule is not None:
        neural = neural_loss(output.rule.logits, targets.classes, weights.classes)
    return Losses(task + weights.concept * concept + weights.neural * neural, task, concept, neural)


def concept_loss(logits: Tensor, soft_targets: Tensor, mask: Tensor) -> Tensor:
    """Mean BCE over the cells whose label may be used; zero when there is none."""
    cells = F.binary_cross_entropy_with_logits(logits, soft_targets, reduction="none")
    return torch.where(mask, cells, 0).sum() / mask.sum().clamp(min=1)


def neural_loss(rule_logits: Tensor, classes: Tensor, class_weights: Tensor) -> Tensor:
    """`L_neural` on the log-odds (B, C) of the rules' truth values, each image weighted by its class."""
    n_classes = rule_logits.shape[1]
    if n_classes > 2:
        return F.cross_entropy(rule_logits, classes, class_weights)
    one_hot = F.one_hot(classes, n_classes).to(rule_logits.dtype)
    cells = F.binary_cross_entropy_with_logits(rule_logits, one_hot, reduction="none").mean(dim=1)
    image_weights = class_weights[classes]
    return (cells * image_weights).sum() / image_weights.sum().clamp(min=1e-12)


def balanced_class_weights(classes: Tensor, n_classes: int) -> Tensor:
    """(C,) n / (C·n_c), so that every class weighs the same; 0 for a class without images."""
    counts = torch.bincount(classes, minlength=n_classes).float()
    return torch.where(counts > 0, counts.sum() / (n_classes * counts.clamp(min=1)), 0.0)
