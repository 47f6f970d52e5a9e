"""The training loss: L = CE(ỹ, y) + λ1·BCE(ĉ, c) + λ2·L_neural(ŷ_neural, y).

Every term starts from logits, never from a probability that is squashed a second time. The rule's truth values
ŷ_neural are probabilities already, so `L_neural` is taken on their log-odds: for two classes BCE of each truth
value against its class, for more the cross-entropy over classes of those log-odds.

Every term is a sum over a batch divided by what the whole step holds, so that the parts of a step, on several
processes or one after another, add up to the step in one piece.
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
    """λ1, λ2, the weight of each class, and the shape of the classification loss."""

    concept: float
    neural: float
    classes: Tensor  # (C,)
    focal_gamma: float = 0.0
    label_smoothing: float = 0.0


class StepTotals(NamedTuple):
    """What the sums of a step are divided by."""

    class_weight: Tensor  # () sum of the images' class weights
    n_cells: Tensor  # () number of usable concept cells

    @classmethod
    def of(cls, targets: Targets, weights: LossWeights) -> StepTotals:
        """Those of all images of a step, whichever part of them one batch holds."""
        return cls(weights.classes[targets.classes].sum().clamp(min=1e-12), targets.mask.sum().clamp(min=1))


class Losses(NamedTuple):
    """Scalar losses of one batch; `total` is what is minimised."""

    total: Tensor
    task: Tensor
    concept: Tensor
    neural: Tensor


def losses(output: NetworkOutput, targets: Targets, weights: LossWeights, totals: StepTotals | None = None) -> Losses:
    """The loss and its terms, of a batch that is a whole step or, with the step's `totals`, of one part of it.

    Terms that a system has no outputs for are zero.
    """
    totals = totals or StepTotals.of(targets, weights)
    zero = output.class_logits.new_zeros(())
    task = task_loss(output.class_logits, targets.classes, weights, totals.class_weight)
    concept, neural = zero, zero
    if output.concepts is not None:
        concept = concept_loss(output.concepts.logits, targets.concepts, targets.mask, totals.n_cells)
    if output.rule is not None:
        neural = neural_loss(output.rule.logits, targets.classes, weights.classes, totals.class_weight)
    return Losses(task + weights.concept * concept + weights.neural * neural, task, concept, neural)


def task_loss(logits: Tensor, classes: Tensor, weights: LossWeights, total_weight: Tensor) -> Tensor:
    """Weighted cross-entropy of (B, C) logits, smoothed and focal (Lin et al., 2017) where the weights ask for it."""
    per_image = F.cross_entropy(
        logits, classes, weights.classes, reduction="none", label_smoothing=weights.label_smoothing
    )
    if weights.focal_gamma:
        log_p = torch.log_softmax(logits, dim=1).gather(1, classes.unsqueeze(1)).squeeze(1)
        per_image = per_image * (-torch.expm1(log_p)).clamp(min=0) ** weights.focal_gamma
    return per_image.sum() / total_weight


def concept_loss(logits: Tensor, soft_targets: Tensor, mask: Tensor, n_cells: Tensor | None = None) -> Tensor:
    """Mean BCE over the cells whose label may be used; zero when there is none. `n_cells`: those of the whole step."""
    cells = F.binary_cross_entropy_with_logits(logits, soft_targets, reduction="none")
    return torch.where(mask, cells, 0).sum() / (mask.sum().clamp(min=1) if n_cells is None else n_cells)


def neural_loss(
    rule_logits: Tensor, classes: Tensor, class_weights: Tensor, total_weight: Tensor | None = None
) -> Tensor:
    """`L_neural` on the log-odds (B, C) of the rules' truth values, each image weighted by its class."""
    n_classes = rule_logits.shape[1]
    image_weights = class_weights[classes]
    if n_classes > 2:
        weighted = F.cross_entropy(rule_logits, classes, class_weights, reduction="none")
    else:
        one_hot = F.one_hot(classes, n_classes).to(rule_logits.dtype)
        cells = F.binary_cross_entropy_with_logits(rule_logits, one_hot, reduction="none").mean(dim=1)
        weighted = cells * image_weights
    return weighted.sum() / (image_weights.sum().clamp(min=1e-12) if total_weight is None else total_weight)


def balanced_class_weights(classes: Tensor, n_classes: int) -> Tensor:
    """(C,) n / (C·n_c), so that every class weighs the same; 0 for a class without images."""
    counts = torch.bincount(classes, minlength=n_classes).float()
    return torch.where(counts > 0, counts.sum() / (n_classes * counts.clamp(min=1)), 0.0)
