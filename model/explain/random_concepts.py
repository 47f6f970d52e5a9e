"""The control that was taught nonsense: the same system, trained on concept labels that belong to other images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from model.backbones import Backbone
from model.config import TrainConfig
from model.fit import fit
from model.network import Head
from model.prepare import Prepared


def random_concept_head(prepared: Prepared, backbone: Backbone, config: TrainConfig, seed: int) -> Head:
    """The same system trained once more, each image with the concept labels of another image; classes stay right."""
    dataset = prepared.dataset
    order = np.random.default_rng(seed).permutation(len(dataset))
    shuffled = replace(dataset, concepts=dataset.concepts[order], mask=dataset.mask[order])
    once = config.model_copy(update={"seeds": (seed,)})
    return fit(replace(prepared, dataset=shuffled), backbone, once).best.network
