"""How large each optimiser step is: by depth in the backbone, and by how far the training has come."""

from __future__ import annotations

import math
from typing import Any

from timm.optim import param_groups_layer_decay
from torch import nn

from model.config import TrainConfig


def step_fraction(step: int, n_steps: int, n_warmup: int) -> float:
    """Part of the full step size at `step` (from 0) of `n_steps`: a straight rise, then half a cosine towards 0."""
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    done = (step - n_warmup) / max(1, n_steps - n_warmup)
    return (1 + math.cos(math.pi * min(1.0, done))) / 2


def parameter_groups(head: nn.Module, backbone: nn.Module | None, config: TrainConfig) -> list[dict[str, Any]]:
    """Optimiser groups, each with its full step size as `lr` and again as `full_lr`, which schedules multiply.

    Matrices are decayed, biases and normalisation weights are not. With `layer_decay` below 1 the blocks of the
    backbone, as timm groups them by depth, have step sizes that fall geometrically towards the image (ELECTRA, BEiT).
    """
    groups = _decayed(head, config.learning_rate, config.weight_decay)
    if backbone is not None:
        groups += _backbone_groups(backbone, config)
    groups = [group for group in groups if group["params"]]
    return [group | {"full_lr": group["lr"]} for group in groups]


def set_step_size(groups: list[dict[str, Any]], fraction: float) -> None:
    """Set every group's `lr` to this part of its full one."""
    for group in groups:
        group["lr"] = group["full_lr"] * fraction


def _backbone_groups(backbone: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    if config.layer_decay == 1:
        return _decayed(backbone, config.backbone_learning_rate, config.weight_decay)
    return [
        {
            "params": list(group["params"]),
            "lr": config.backbone_learning_rate * float(group["lr_scale"]),
            "weight_decay": float(group["weight_decay"]),
        }
        for group in param_groups_layer_decay(
            backbone, weight_decay=config.weight_decay, layer_decay=config.layer_decay
        )
    ]


def _decayed(module: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
    ]
