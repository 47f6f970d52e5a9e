"""One seed's training: epochs, validation, and the epoch that is kept."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from data_contracts.tables import Split
from model.backbones import Backbone
from model.config import TrainConfig
from model.data import Prepared, Rows, in_batches
from model.devices import few_threads, reproducible, resolve_device
from model.losses import Losses, LossWeights, Targets, balanced_class_weights, losses
from model.metrics import confusion_matrix, mean_defined, per_class
from model.network import Head, ImageNetwork, NetworkOutput, Sizes
from model.systems.registry import build_network

OnEpoch = Callable[[int, dict[str, float]], None]
"""Called after each epoch with the seed and that epoch's row of the history."""

_VALIDATION_BATCH = 64

_N_STATISTICS_IMAGES = 1024
"""Images that set the feature scale when the backbone is fine-tuned; a frozen one uses all training images."""


@dataclass(frozen=True)
class Fitted:
    """One trained network."""

    seed: int
    network: Head
    """The head: (B, F) features → `NetworkOutput`; on the CPU, in evaluation mode."""
    backbone: Backbone
    """The one it reads; its own copy if it was fine-tuned."""
    history: pd.DataFrame
    """One row an epoch: train losses, validation macro-F1 and loss, seconds."""
    epoch: int
    """The epoch that was kept, from 1."""
    val_macro_f1: float
    val_loss: float

    @property
    def validation_rank(self) -> tuple[float, float]:
        """Larger is better: macro-F1 first, then loss."""
        return _rank(self.val_macro_f1, self.val_loss)


class Loop:
    """Trains one network of one seed; every random draw comes from the seed."""

    def __init__(self, prepared: Prepared, backbone: Backbone, config: TrainConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.device = resolve_device(config.device)
        self.dataset = prepared.dataset
        self.inputs = prepared.inputs
        self.backbone = backbone if config.freeze_backbone else copy.deepcopy(backbone)
        self.train_rows = self.dataset.rows(Split.TRAIN)
        self.val_rows = self.dataset.rows(Split.VAL)
        self.targets = Targets(
            torch.tensor(self.dataset.class_index()),  # copies: pandas and Arrow hand out read-only memory
            torch.tensor(self.dataset.concepts),
            torch.tensor(self.dataset.mask),
        )
        self.loss_weights = self._loss_weights()
        self.shuffle = np.random.default_rng(seed)

    def run(self, on_epoch: OnEpoch | None = None) -> Fitted:
        """The trained network, at its best validation epoch."""
        with reproducible(self.seed, self.device):
            self._build()
            with few_threads(self._operations_per_step()):
                return self._train(on_epoch)

    def _operations_per_step(self) -> float:
        if not self.config.freeze_backbone:
            return math.inf
        return float(self.config.batch_size * sum(p.numel() for p in self.head.parameters()))

    def _build(self) -> None:
        sizes = Sizes(self.backbone.n_features, len(self.dataset.vocabulary), len(self.dataset.class_names))
        self.head = build_network(sizes, self.config).to(self.device)
        self._set_feature_scale()
        groups = _decayed(self.head, self.config.learning_rate, self.config.weight_decay)
        self.model: nn.Module = self.head
        if not self.config.freeze_backbone:
            self.backbone.module.requires_grad_(True)
            self.model = ImageNetwork(self.backbone.module, self.head).to(self.device)
            groups += _decayed(self.backbone.module, self.config.backbone_learning_rate, self.config.weight_decay)
        self.optimiser = torch.optim.AdamW(groups)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, self.config.epochs)
        self.half = _half_precision(self.config, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.half is torch.float16)

    def _train(self, on_epoch: OnEpoch | None) -> Fitted:
        history: list[dict[str, float]] = []
        best = (-np.inf, -np.inf)
        kept, kept_epoch = _copy_of_state(self.model), 0
        first_candidate = 1 + int(self.config.first_candidate_fraction * self.config.epochs)
        for epoch in range(1, self.config.epochs + 1):
            started_s = time.perf_counter()
            row = {"epoch": float(epoch), **self._train_epoch(), **self._validate()}
            history.append({**row, "seconds": time.perf_counter() - started_s})
            if on_epoch is not None:
                on_epoch(self.seed, history[-1])
            self.schedule.step()
            if epoch < first_candidate:
                continue
            rank = _rank(row["val_macro_f1"], row["val_loss"])
            if kept_epoch == 0 or rank > best or len(self.val_rows) == 0:
                best, kept, kept_epoch = rank, _copy_of_state(self.model), epoch
            elif epoch - kept_epoch >= self.config.patience:
                break
        self.model.load_state_dict(kept)
        return self._fitted(history, kept_epoch)

    def _fitted(self, history: list[dict[str, float]], epoch: int) -> Fitted:
        self.backbone.module.cpu().eval().requires_grad_(False)
        chosen = history[epoch - 1]
        return Fitted(
            self.seed,
            self.head.cpu().eval(),
            self.backbone,
            pd.DataFrame(history).assign(seed=self.seed, kept=[int(row["epoch"]) == epoch for row in history]),
            epoch,
            chosen["val_macro_f1"],
            chosen["val_loss"],
        )

    def _train_epoch(self) -> dict[str, float]:
        self.model.train()
        order = self.shuffle.permutation(self.train_rows)
        batches = in_batches(order, self.config.batch_size)
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches.pop()  # batch normalisation cannot train on one image; shuffling picks another one next time
        sums = torch.zeros(len(Losses._fields), device=self.device)
        for rows, inputs in zip(batches, self.inputs.batches(batches), strict=True):
            terms = self._losses(inputs, rows)
            self.optimiser.zero_grad(set_to_none=True)
            self.scaler.scale(terms.total).backward()
            self.scaler.step(self.optimiser)
            self.scaler.update()
            sums += torch.stack(terms).detach() * len(rows)
        return _named("train", sums / sum(map(len, batches)))

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        self.model.eval()
        if len(self.val_rows) == 0:
            return {"val_macro_f1": float("nan"), "val_loss": float("nan")}
        batches = in_batches(self.val_rows, _VALIDATION_BATCH)
        sums = torch.zeros(len(Losses._fields), device=self.device)
        predicted = []
        for rows, inputs in zip(batches, self.inputs.batches(batches), strict=True):
            output = self._forward(inputs)
            predicted.append(output.class_logits.argmax(1).cpu().numpy())
            sums += torch.stack(losses(output, self._targets(rows), self.loss_weights)) * len(rows)
        y = self.targets.classes[torch.from_numpy(self.val_rows)].numpy()
        confusion = confusion_matrix(y, np.concatenate(predicted), len(self.dataset.class_names))
        means = _named("val", sums / len(self.val_rows))
        return {"val_macro_f1": mean_defined(per_class(confusion).f1), **means}

    def _losses(self, inputs: Tensor, rows: Rows) -> Losses:
        return losses(self._forward(inputs), self._targets(rows), self.loss_weights)

    def _forward(self, inputs: Tensor) -> NetworkOutput:
        with torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None):
            return self.model(inputs.to(self.device, non_blocking=True))

    def _targets(self, rows: Rows) -> Targets:
        return self.targets.take(torch.from_numpy(rows)).to(self.device)

    def _loss_weights(self) -> LossWeights:
        n_classes = len(self.dataset.class_names)
        classes = torch.ones(n_classes)
        if self.config.class_weights:
            classes = balanced_class_weights(self.targets.classes[torch.from_numpy(self.train_rows)], n_classes)
        return LossWeights(self.config.lambda_concept, self.config.lambda_neural, classes.to(self.device))

    @torch.no_grad()
    def _set_feature_scale(self) -> None:
        """Mean and deviation of the training features, in one pass over batches."""
        rows = self.train_rows
        if not self.config.freeze_backbone:
            rows = self.shuffle.permutation(rows)[:_N_STATISTICS_IMAGES]
            self.backbone.module.to(self.device).eval()
        n, total, squares = 0, torch.zeros(1), torch.zeros(1)
        for inputs in self.inputs.batches(in_batches(rows, 32)):
            features = inputs if self.config.freeze_backbone else self.backbone.module(inputs.to(self.device))
            features = features.cpu().double()
            n, total, squares = n + len(features), total + features.sum(0), squares + features.square().sum(0)
        mean = total / n
        self.head.standardise.fit(mean.float(), (squares / n - mean.square()).clamp(min=0).float())


def _half_precision(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """Half type for the backbone: only when it is trained, on a GPU; bfloat16 where the GPU has it."""
    if config.freeze_backbone or not config.mixed_precision or device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _rank(macro_f1: float, loss: float) -> tuple[float, float]:
    # NaN (no validation images, or a diverged loss) is worse than everything.
    return (float(np.nan_to_num(macro_f1, nan=-np.inf)), -float(np.nan_to_num(loss, nan=np.inf)))


def _copy_of_state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}


def _decayed(module: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups: matrices are decayed, biases and normalisation weights are not."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
    ]


def _named(split: str, terms: Tensor) -> dict[str, float]:
    """`train_loss` or `val_loss` for the total, `train_concept_loss` and so on for its terms."""
    names = [f"{split}_loss" if name == "total" else f"{split}_{name}_loss" for name in Losses._fields]
    return dict(zip(names, terms.tolist(), strict=True))
