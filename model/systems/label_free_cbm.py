"""Label-free CBM (Oikarinen et al., ICLR 2023): a sparse linear layer on scores of concepts that a machine labelled.

As published, concepts are learnt apart from the classes, their scores are standardised, and the class layer is an
elastic net with 0.99 of absolute penalty, so that each class rests on few concepts. Two things differ. Scores are
fitted to this data set's concept labels by the loss of all other systems, not to CLIP activations by a cubed cosine,
so that only what follows the concepts is compared. And the strength of the penalty is chosen on validation images,
not for a number of concepts given beforehand.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from model.systems.fitted_classes import FittedClasses

_CLOSEST = 1e-4
"""Corrected probabilities are kept this far from 0 and 1, whose scores would be infinite."""


class LabelFreeCBM(FittedClasses):
    """Concepts first; then a sparse class layer on their scores before the sigmoid."""

    l1_ratio: ClassVar[float] = 0.99

    def scores(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """The log-odds of ĉ: the network's own, or of the correction."""
        corrected = torch.logit(probabilities, eps=_CLOSEST)
        return torch.where(probabilities == logits.sigmoid(), logits, corrected)
