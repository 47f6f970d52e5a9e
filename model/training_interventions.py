"""Interventions made in training: RandInt and concept dropout, both through the argument that every head takes."""

from __future__ import annotations

import torch

from model.concept_encoder import Intervention
from model.config import TrainConfig
from model.losses import Targets

NEUTRAL = 0.5
"""The truth value that says nothing."""


def drawn_intervention(targets: Targets, config: TrainConfig) -> Intervention | None:
    """What replaces the network's own concepts in one training step; None, and nothing drawn, where both are off.

    RandInt (Espinosa Zarlenga et al., Concept Embedding Models, NeurIPS 2022): each concept whose label may be used is
    replaced by that label with `randint_probability`. Concept dropout: each becomes ½ with `concept_dropout`.
    """
    if not (config.randint_probability or config.concept_dropout):
        return None
    draw = torch.rand_like(targets.concepts)
    told = (draw < config.randint_probability) & targets.mask
    hidden = draw >= 1 - config.concept_dropout
    return Intervention(torch.where(told, targets.concepts, NEUTRAL), told | hidden)
