from __future__ import annotations

import pytest
import timm
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from model.config import TrainConfig
from model.schedules import parameter_groups, set_step_size, step_fraction


def test_half_a_cosine_is_timms() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([weight], lr=1.0)
    theirs = CosineLRScheduler(optimiser, t_initial=20, t_in_epochs=False)
    for step in range(20):
        theirs.step_update(step)
        assert step_fraction(step, 20, 0) == pytest.approx(optimiser.param_groups[0]["lr"])


def test_warm_up_rises_in_a_straight_line_to_the_full_size() -> None:
    fractions = [step_fraction(step, 20, 4) for step in range(20)]
    assert fractions[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert fractions[4:] == sorted(fractions[4:], reverse=True)
    assert fractions[-1] < 0.02


def test_a_warm_up_longer_than_the_training_is_no_error() -> None:
    assert all(0 < step_fraction(step, 3, 10) < 1 for step in range(3))


def test_every_parameter_is_in_one_group_and_only_matrices_are_decayed() -> None:
    head, backbone = nn.Linear(4, 2), timm.create_model("resnet10t", num_classes=0)
    for layer_decay in (1.0, 0.5):
        groups = parameter_groups(head, backbone, TrainConfig(layer_decay=layer_decay))
        found = [id(p) for group in groups for p in group["params"]]
        expected = [id(p) for module in (head, backbone) for p in module.parameters()]
        assert sorted(found) == sorted(expected)
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for group in groups for p in group["params"])


def test_early_blocks_take_geometrically_smaller_steps() -> None:
    backbone = timm.create_model("resnet10t", num_classes=0)
    config = TrainConfig(layer_decay=0.5, backbone_learning_rate=1e-3)
    groups = parameter_groups(nn.Linear(4, 2), backbone, config)
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    rates = [rate_of[id(next(block.parameters()))] for block in (backbone.conv1, backbone.layer1, backbone.layer4)]
    assert rates[0] < rates[1] < rates[2] <= 1e-3
    assert rates[2] / rates[1] == pytest.approx(2**3)
    set_step_size(groups, 0.1)
    assert groups[0]["lr"] == pytest.approx(0.1 * config.learning_rate)
    set_step_size(groups, 1.0)
    assert groups[0]["lr"] == pytest.approx(config.learning_rate)
