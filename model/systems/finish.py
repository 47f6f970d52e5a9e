"""What follows the trained epochs in systems whose class layer is fitted afterwards; for all others, nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from data_contracts.tables import Split
from model.config import TrainConfig
from model.data import Rows
from model.devices import resolve_device
from model.loop import Fitted
from model.losses import balanced_class_weights
from model.metrics import confusion_matrix, mean_defined, per_class
from model.network import ImageNetwork
from model.outputs import embeddings_of
from model.prepare import Prepared
from model.systems.elastic_net import LinearClasses, elastic_net_path
from model.systems.fitted_classes import FittedClasses

Floats = npt.NDArray[np.float64]


class ClassPath(NamedTuple):
    """Class layers from strong to weak penalty, and what they read."""

    layers: list[LinearClasses]
    scores: Floats
    """(N, K) standardised concept scores of all images of the data set."""


def finished(fitted: Fitted, prepared: Prepared, config: TrainConfig) -> Fitted:
    """The network with its class layer fitted on training images, its penalty chosen on validation images.

    The layer with the lowest loss there is kept: of a few hundred images macro-F1 is too coarse to tell neighbouring
    penalties apart. Without validation images the middle of the path is kept, unchosen.
    """
    if not isinstance(fitted.network, FittedClasses):
        return fitted
    path = class_path(fitted, prepared, config)
    val = prepared.dataset.rows(Split.VAL)
    if len(val) == 0:
        set_class_layer(fitted.network, path.layers[len(path.layers) // 2])
        return fitted
    y = prepared.dataset.class_index()[val]
    measured = [_measured(layer.logits(path.scores[val]), y) for layer in path.layers]
    best = int(np.argmin([loss for _, loss in measured]))
    set_class_layer(fitted.network, path.layers[best])
    return replace(fitted, val_macro_f1=measured[best][0], val_loss=measured[best][1])


def class_path(fitted: Fitted, prepared: Prepared, config: TrainConfig) -> ClassPath:
    """Class layers fitted on the training images; sets the scale of the network's scores on the way."""
    network, dataset = fitted.network, prepared.dataset
    if not isinstance(network, FittedClasses):
        raise TypeError(f"expected a network with a fitted class layer, got {type(network).__name__}")
    model = network if config.freeze_backbone else ImageNetwork(fitted.backbone.module, network)
    everything: Rows = np.arange(len(dataset))
    embeddings = embeddings_of(model, prepared.inputs, everything, resolve_device(config.device))
    scores = torch.from_numpy(embeddings[..., 0])  # (N, K): an embedding of one number
    train = dataset.rows(Split.TRAIN)
    network.set_score_scale(scores[torch.from_numpy(train)])
    standardised = ((scores - network.score_mean) / network.score_deviation).double().numpy()
    y, n_classes = dataset.class_index()[train], len(dataset.class_names)
    weights = np.ones(len(train))
    if config.class_weights:
        weights = balanced_class_weights(torch.from_numpy(y), n_classes).double().numpy()[y]
    return ClassPath(
        elastic_net_path(standardised[train], y, weights, n_classes, l1_ratio=network.l1_ratio), standardised
    )


@torch.no_grad()
def set_class_layer(network: FittedClasses, layer: LinearClasses) -> None:
    """Put the fitted layer into the network."""
    network.classes.weight.copy_(torch.from_numpy(layer.weights))
    network.classes.bias.copy_(torch.from_numpy(layer.intercept))


def _measured(logits: Floats, y: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Macro-F1, and cross-entropy."""
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    confusion = confusion_matrix(y, logits.argmax(1).astype(np.int64), logits.shape[1])
    return mean_defined(per_class(confusion).f1), -float(log_p[np.arange(len(y)), y].mean())
