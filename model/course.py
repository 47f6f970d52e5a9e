"""How far the training of one seed has come, and which epoch it keeps: the rule of early stopping in one place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.config import TrainConfig
from model.data import Rows
from model.losses import Losses
from model.resume import State


@dataclass
class Course:
    """The running epoch, and the best one so far."""

    epoch: int = 1
    """The one that is running."""
    step: int = 0
    """Optimiser steps that are done in it."""
    order: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    """Its training images in the order in which they are shown."""
    sums: Tensor = field(default_factory=lambda: torch.zeros(len(Losses._fields)))
    """Its losses so far, each step's mean times its images."""
    spent_s: float = 0.0
    """Its seconds before the training was last interrupted."""
    history: list[dict[str, float]] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the best epoch."""
    kept_epoch: int = 0
    finished: bool = False
    diverged: bool = False
    """Whether the loss was no number in the last epoch; the one before it is then the last that counts."""

    def begin_epoch(self, order: Rows, device: torch.device) -> None:
        """Start the running epoch."""
        self.order, self.spent_s = order, 0.0
        self.sums = torch.zeros(len(Losses._fields), device=device)

    def close_epoch(
        self, row: dict[str, float], weights: Callable[[], dict[str, Tensor]], config: TrainConfig, n_val: int
    ) -> None:
        """Take the row of the epoch that has ended: keep its weights if it is the best, and go on or stop.

        Before the first candidate the latest epoch is kept, so that a training that diverges early leaves one.
        """
        self.history.append(row)
        if not (math.isfinite(row["train_loss"]) and (n_val == 0 or math.isfinite(row["val_loss"]))):
            self.diverged = self.finished = True
            return
        first_candidate = 1 + int(config.first_candidate_fraction * config.epochs)
        if self.kept_epoch < first_candidate or n_val == 0 or self._beats_kept(row):
            self.kept, self.kept_epoch = weights(), self.epoch
        elif self.epoch - self.kept_epoch >= config.patience:
            self.finished = True
        self.epoch, self.step = self.epoch + 1, 0
        self.finished = self.finished or self.epoch > config.epochs

    def _beats_kept(self, row: dict[str, float]) -> bool:
        return validation_rank(row) > validation_rank(self.history[self.kept_epoch - 1])

    @property
    def kept_row(self) -> dict[str, float]:
        """The history's row of the kept epoch."""
        return self.history[self.kept_epoch - 1]

    def state(self) -> State:
        """All of it, to be stored."""
        names = ("epoch", "step", "spent_s", "history", "kept_epoch", "finished", "diverged")
        state = State({"order": torch.from_numpy(self.order), "sums": self.sums}, {n: getattr(self, n) for n in names})
        state.put("kept", self.kept)
        return state

    @classmethod
    def of(cls, state: State, device: torch.device) -> Course:
        """What `state` gave."""
        fields: dict[str, Any] = {key: value for key, value in state.values.items() if key in cls.__dataclass_fields__}
        order, sums = state.tensors["order"].numpy(), state.tensors["sums"].to(device)
        return cls(**fields, order=order, sums=sums, kept=state.part("kept"))


def validation_rank(row: dict[str, float]) -> tuple[float, float]:
    """Larger is better: macro-F1 first, then loss. What is no number is worse than everything."""
    macro_f1, loss = row["val_macro_f1"], row["val_loss"]
    return (float(np.nan_to_num(macro_f1, nan=-np.inf)), -float(np.nan_to_num(loss, nan=np.inf)))
