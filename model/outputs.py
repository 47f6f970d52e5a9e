"""A network's output over many images, as arrays: what metrics, rules and predictions read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from model.data import Inputs, Rows, in_batches
from model.network import NetworkOutput


class Outputs(NamedTuple):
    """What a network says about N images, as arrays; parts that a system lacks have length 0 on their last axis."""

    class_probabilities: npt.NDArray[np.float32]
    """(N, C)"""
    concept_probabilities: npt.NDArray[np.float32]
    """(N, K)"""
    polarity: npt.NDArray[np.float32]
    """(N, K, C)"""
    relevance: npt.NDArray[np.float32]
    """(N, K, C)"""
    rule_truth: npt.NDArray[np.float32]
    """(N, C)"""

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """(N,) index of the most probable class."""
        return self.class_probabilities.argmax(1).astype(np.int64)

    @property
    def has_concepts(self) -> bool:
        """Whether the system predicts concepts."""
        return self.concept_probabilities.shape[1] > 0

    @property
    def has_rules(self) -> bool:
        """Whether the system forms rules."""
        return self.rule_truth.shape[1] > 0


def collect(model: nn.Module, inputs: Inputs, rows: Rows, device: torch.device) -> Outputs:
    """Outputs for these rows, in evaluation mode, batch by batch."""
    model = model.to(device).eval()
    shown = rows if len(rows) else np.zeros(1, np.int64)  # an empty split still has sizes; its one row is cut off
    with torch.inference_mode():
        parts = [as_arrays(model(batch.to(device))) for batch in inputs.batches(in_batches(shown, 64))]
    model.cpu()
    return Outputs(*(np.concatenate(arrays)[: len(rows)] for arrays in zip(*parts, strict=True)))


def as_arrays(output: NetworkOutput) -> Outputs:
    """A network's output as arrays; of what it lacks, (B, 0) and (B, 0, 0)."""
    logits = output.class_logits.float()
    empty = logits.new_zeros(len(logits), 0)
    concepts = empty if output.concepts is None else output.concepts.probabilities
    rule = (empty.unsqueeze(-1), empty.unsqueeze(-1), empty)
    if output.rule is not None:
        rule = (output.rule.polarity, output.rule.relevance, output.rule.truth)
    parts: Sequence[Tensor] = (logits.softmax(1), concepts, *rule)
    return Outputs(*(part.float().cpu().numpy() for part in parts))
