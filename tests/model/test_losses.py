from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from model.concept_encoder import ConceptCode
from model.config import TrainConfig
from model.losses import (
    LossWeights,
    StepTotals,
    Targets,
    balanced_class_weights,
    concept_loss,
    losses,
    neural_loss,
    task_loss,
)
from model.network import MedMICN, NetworkOutput, Sizes


def test_concept_loss_is_the_mean_over_usable_cells_of_soft_targets() -> None:
    logits, soft = torch.randn(4, 3), torch.rand(4, 3)
    mask = torch.tensor([[True, False, True]] * 4)
    expected = F.binary_cross_entropy(logits[:, [0, 2]].sigmoid(), soft[:, [0, 2]])
    torch.testing.assert_close(concept_loss(logits, soft, mask), expected)


def test_masked_targets_change_neither_loss_nor_gradient() -> None:
    logits = torch.zeros(2, 2, requires_grad=True)
    mask = torch.tensor([[True, False], [True, False]])
    for masked_value in (0.0, 1.0):
        soft = torch.tensor([[1.0, masked_value]] * 2)
        (gradient,) = torch.autograd.grad(concept_loss(logits, soft, mask), logits)
        assert gradient[:, 1].tolist() == [0, 0]
        assert gradient[:, 0].tolist() == pytest.approx([-0.25, -0.25])


def test_concept_loss_without_a_usable_cell_is_zero() -> None:
    logits = torch.randn(2, 2, requires_grad=True)
    loss = concept_loss(logits, torch.rand(2, 2), torch.zeros(2, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_neural_loss_is_bce_for_two_classes() -> None:
    truth = torch.tensor([[0.8, 0.3], [0.4, 0.9]])
    y, weights = torch.tensor([0, 1]), torch.tensor([1.0, 3.0])
    per_image = F.binary_cross_entropy(truth, torch.eye(2), reduction="none").mean(1)
    expected = (per_image * weights).sum() / weights.sum()
    torch.testing.assert_close(neural_loss(truth.logit(), y, weights), expected)


def test_neural_loss_is_ce_over_the_odds_for_more_classes() -> None:
    truth = torch.tensor([[0.8, 0.3, 0.5]])
    odds = truth / (1 - truth)
    expected = -(odds[0, 0] / odds.sum()).log()
    torch.testing.assert_close(neural_loss(truth.logit(), torch.tensor([0]), torch.ones(3)), expected)


def test_total_is_the_weighted_sum() -> None:
    torch.manual_seed(0)
    network = MedMICN(Sizes(5, 4, 3), TrainConfig(dropout=0))
    targets = Targets(torch.tensor([0, 1, 2]), torch.rand(3, 4), torch.ones(3, 4, dtype=torch.bool))
    output, weights = network(torch.randn(3, 5)), torch.tensor([1.0, 2.0, 0.5])
    terms = losses(output, targets, LossWeights(0.3, 0.7, weights))
    task = F.cross_entropy(output.class_logits, targets.classes, weights)
    torch.testing.assert_close(terms.total, task + 0.3 * terms.concept + 0.7 * terms.neural)


def test_a_system_without_concepts_has_only_the_task_loss() -> None:
    targets = Targets(torch.tensor([0]), torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.bool))
    terms = losses(NetworkOutput(torch.tensor([[2.0, 0.0]])), targets, LossWeights(0.1, 0.1, torch.ones(2)))
    assert terms.total == terms.task
    assert terms.concept == terms.neural == 0


def test_class_weights_are_scikit_learns_and_zero_for_an_absent_class() -> None:
    y = torch.tensor([0, 0, 0, 2, 2, 1])
    theirs = compute_class_weight("balanced", classes=np.arange(3), y=y.numpy())
    assert balanced_class_weights(y, 3).tolist() == pytest.approx(theirs.tolist())
    assert balanced_class_weights(y, 4)[3] == 0


def test_the_loss_of_a_code_far_out_is_finite() -> None:
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    code = ConceptCode(torch.zeros(1, 2, 1), logits, logits.sigmoid())
    loss = concept_loss(code.logits, torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(200)
    assert torch.isfinite(logits.grad).all()


def test_focal_loss_is_torchvisions_for_two_classes() -> None:
    logits, y = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    weights = LossWeights(0, 0, torch.ones(2), focal_gamma=2.0)
    theirs = sigmoid_focal_loss(logits[:, 1] - logits[:, 0], y.float(), alpha=-1, gamma=2, reduction="mean")
    torch.testing.assert_close(task_loss(logits, y, weights, torch.tensor(6.0)), theirs)


def test_a_focal_loss_of_gamma_zero_is_smoothed_weighted_cross_entropy() -> None:
    logits, y, classes = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 1]), torch.tensor([1.0, 2.0, 0.5])
    weights = LossWeights(0, 0, classes, label_smoothing=0.1)
    expected = F.cross_entropy(logits, y, classes, label_smoothing=0.1)
    torch.testing.assert_close(task_loss(logits, y, weights, classes[y].sum()), expected)


def test_a_focal_loss_of_certain_images_has_a_finite_gradient() -> None:
    logits = torch.tensor([[80.0, -80.0], [-80.0, 80.0]], requires_grad=True)
    task_loss(
        logits, torch.tensor([0, 0]), LossWeights(0, 0, torch.ones(2), focal_gamma=0.5), torch.tensor(2.0)
    ).backward()
    assert torch.isfinite(logits.grad).all()


def test_the_parts_of_a_step_add_up_to_the_step() -> None:
    torch.manual_seed(0)
    network = MedMICN(Sizes(5, 4, 3), TrainConfig(dropout=0))
    f, targets = torch.randn(7, 5), Targets(torch.arange(7) % 3, torch.rand(7, 4), torch.rand(7, 4) < 0.6)
    weights = LossWeights(0.3, 0.7, torch.tensor([1.0, 2.0, 0.5]), focal_gamma=1.0)
    whole, totals = losses(network(f), targets, weights), StepTotals.of(targets, weights)
    parts = [losses(network(f[rows]), targets.take(rows), weights, totals) for rows in torch.arange(7).split(3)]
    for name in ("total", "task", "concept", "neural"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
