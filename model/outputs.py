"""A network's output over many images, as arrays: what metrics, rules and predictions read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from model.data import Inputs, Rows, in_batches
from model.network import NetworkOutput

Floats = npt.NDArray[np.float32]


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


class Side(NamedTuple):
    """Class logits ỹ of N images, and the part of them that features add past the concepts."""

    logits: Floats
    """(N, C)"""
    side_logits: Floats
    """(N, C)"""

    @property
    def share(self) -> float:
        """Part of the variation of ỹ over classes and images that comes past the concepts.

        cov(side, ỹ) / var(ỹ), of logits less their mean over classes and less each class's mean over images. The
        concepts' share is the rest; a share is below 0 or above 1 where the two parts work against each other.
        """
        total, side = (_contrasts(part) for part in self)
        variation = float((total * total).sum())
        return float((side * total).sum()) / variation if variation > 0 else float("nan")

    @property
    def concepts_predict(self) -> npt.NDArray[np.int64]:
        """(N,) the class that is said without the side channel."""
        return (self.logits - self.side_logits).argmax(1).astype(np.int64)


def collect(model: nn.Module, inputs: Inputs, rows: Rows, device: torch.device) -> Outputs:
    """Outputs for these rows, in evaluation mode, batch by batch; the model is then on the CPU."""
    return collect_with_side(model, inputs, rows, device)[0]


def collect_with_side(
    model: nn.Module, inputs: Inputs, rows: Rows, device: torch.device, *, keep_device: bool = False
) -> tuple[Outputs, Side | None]:
    """`collect`, and what passes the concepts by, for systems that can tell; `keep_device` while it is trained."""
    shown = rows if len(rows) else np.zeros(1, np.int64)  # an empty split still has sizes; its one row is cut off
    parts: list[Outputs] = []
    sides: list[Side] = []
    for output in forwarded(model.to(device), inputs, shown, device):
        parts.append(as_arrays(output))
        if output.side_logits is not None:
            sides.append(Side(*(part.float().cpu().numpy() for part in (output.class_logits, output.side_logits))))
    if not keep_device:
        model.cpu()
    n = len(rows)
    outputs = Outputs(*(np.concatenate(arrays)[:n] for arrays in zip(*parts, strict=True)))
    return outputs, Side(*(np.concatenate(arrays)[:n] for arrays in zip(*sides, strict=True))) if sides else None


def embeddings_of(model: nn.Module, inputs: Inputs, rows: Rows, device: torch.device) -> Floats:
    """(N, K, m) concept embeddings of these rows, in evaluation mode; the model is then on the CPU."""
    parts = [
        output.concepts.embeddings.float().cpu().numpy()
        for output in forwarded(model.to(device), inputs, rows, device)
        if output.concepts is not None
    ]
    model.cpu()
    return np.concatenate(parts)


def forwarded(model: nn.Module, inputs: Inputs, rows: Rows, device: torch.device) -> Iterator[NetworkOutput]:
    """The network's output for these rows, in evaluation mode, batch by batch; the model stays where it is."""
    model.eval()
    for batch in inputs.batches(in_batches(rows, 64)):
        with torch.inference_mode():
            output = model(batch.to(device))
        yield output


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


def _contrasts(logits: Floats) -> npt.NDArray[np.float64]:
    """(N, C) logits less their mean over classes, which decides nothing, and less each class's mean over images."""
    within = logits.astype(np.float64) - logits.mean(1, keepdims=True, dtype=np.float64)
    return within - within.mean(0)
