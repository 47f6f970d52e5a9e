"""The sequential concept bottleneck model (Koh et al., ICML 2020)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from model.systems.fitted_classes import FittedClasses


class SequentialCBM(FittedClasses):
    """Concepts first, from their labels alone; then a linear class layer on their probabilities, ridge-penalised."""

    l1_ratio: ClassVar[float] = 0.0

    def scores(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """The probabilities ĉ."""
        return probabilities
