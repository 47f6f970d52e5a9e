"""A trained head taken apart: what it says of images when their concepts are set, one way or another, by hand.

Two ways lead to a class: through the concepts (embeddings e and truth values ĉ), and past them, from the features
straight to the class layer. `HeadPaths` lets images go one way with their own values and the other way with those of
no image in particular (the training mean), or of another image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from data_contracts.concepts import Vocabulary
from data_contracts.dataset import AlignedDataset
from model.backbones import Backbone
from model.concept_encoder import ConceptCode, ConceptEncoder, Intervention
from model.config import TrainConfig
from model.data import Inputs, Rows, in_batches
from model.network import Head, NetworkOutput

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_BATCH = 1024


@dataclass(frozen=True)
class Seen:
    """Images of one split as a head sees them, with what is known of them."""

    features: Tensor  # (N, F)
    y: Ints  # (N,)
    targets: Floats  # (N, K) concept labels in [0, 1]
    mask: Bools  # (N, K) where the label may be used
    groups: list[object] | None = None
    """Patients, where they are known."""

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Ints) -> Seen:
        """These images only."""
        groups = None if self.groups is None else [self.groups[int(n)] for n in rows]
        return Seen(self.features[torch.from_numpy(rows)], self.y[rows], self.targets[rows], self.mask[rows], groups)


@dataclass(frozen=True)
class Subject:
    """A trained head, and the images by which it is examined."""

    head: Head
    """On the CPU, in evaluation mode."""
    config: TrainConfig
    vocabulary: Vocabulary
    class_names: tuple[str, ...]
    train: Seen
    val: Seen
    held_out: Seen
    split: str
    """Name of the held-out split."""


def seen_of(dataset: AlignedDataset, rows: Rows, features: Tensor) -> Seen:
    """These rows of a data set, with their features (n, F)."""
    patients = dataset.frame["group_id"].iloc[rows]
    groups = [row if patient is None else patient for row, patient in zip(rows.tolist(), patients, strict=True)]
    known = patients.notna().any()
    return Seen(
        features, dataset.class_index()[rows], dataset.concepts[rows], dataset.mask[rows], groups if known else None
    )


def features_of(inputs: Inputs, rows: Rows, backbone: Backbone, *, frozen: bool, device: torch.device) -> Tensor:
    """(n, F) backbone features of these rows: cached ones, or computed now where the backbone was fine-tuned."""
    if not len(rows):
        return torch.zeros(0, backbone.n_features)
    batches = inputs.batches(in_batches(rows, 64))
    if frozen:
        return torch.cat(list(batches))
    module = backbone.module.to(device).eval()
    with torch.inference_mode():
        found = [module(batch.to(device)).float().cpu() for batch in batches]
    module.cpu()
    return torch.cat(found)


class HeadPaths:
    """A head whose concepts can be set by hand."""

    def __init__(self, head: Head) -> None:
        """Examine this head, on the CPU."""
        self.head = head.cpu().eval()
        self._encoder = next((m for m in head.modules() if isinstance(m, ConceptEncoder)), None)

    def code(self, features: Tensor) -> ConceptCode | None:
        """The head's own concepts of (N, F) features; None where it has none."""
        codes = [output.concepts for output in self._outputs(features, None, None)]
        if not codes or codes[0] is None:
            return None
        return _joined([code for code in codes if code is not None])

    def logits(self, features: Tensor, code: ConceptCode | None = None) -> Tensor:
        """(N, C) class logits, with these concepts in place of the head's own."""
        return torch.cat([output.class_logits for output in self._outputs(features, code, None)])

    def corrected(self, features: Tensor, correction: Intervention) -> Tensor:
        """(N, C) class logits after corrections of truth values; what an embedding holds besides stays its own."""
        return torch.cat([output.class_logits for output in self._outputs(features, None, correction)])

    def side_logits(self, features: Tensor) -> Tensor | None:
        """(N, C) the part of the logits that passes the concepts by; None where the head has no such sum."""
        sides = [output.side_logits for output in self._outputs(features, None, None)]
        return None if not sides or sides[0] is None else torch.cat([side for side in sides if side is not None])

    def _outputs(
        self, features: Tensor, code: ConceptCode | None, correction: Intervention | None
    ) -> Iterator[NetworkOutput]:
        for start in range(0, len(features), _BATCH):
            rows = slice(start, start + _BATCH)
            own = None if code is None else ConceptCode(*(part[rows] for part in code))
            given = None if correction is None else Intervention(*(part[rows] for part in correction))
            with torch.inference_mode(), self._set(own):
                yield self.head(features[rows], given if own is None else self._as_intervention(own))

    def _as_intervention(self, code: ConceptCode) -> Intervention | None:
        """Heads without embeddings know a concept by its truth value only, so that setting it sets all."""
        if self._encoder is not None:
            return None
        return Intervention(code.probabilities, torch.ones_like(code.probabilities, dtype=torch.bool))

    @contextmanager
    def _set(self, code: ConceptCode | None) -> Iterator[None]:
        if code is None or self._encoder is None:
            yield
            return

        def replaced(_module: nn.Module, _inputs: object, _own: object) -> ConceptCode:
            return code

        handle = self._encoder.register_forward_hook(replaced)
        try:
            yield
        finally:
            handle.remove()


def mean_code(code: ConceptCode, n_images: int) -> ConceptCode:
    """The mean concepts of these images, given to `n_images`: what is known of no image in particular."""
    return ConceptCode(*(part.mean(0, keepdim=True).expand(n_images, *part.shape[1:]) for part in code))


def shuffled_code(code: ConceptCode, order: Ints) -> ConceptCode:
    """Each image's concepts replaced by those of the image at `order`."""
    where = torch.from_numpy(order)
    return ConceptCode(*(part[where] for part in code))


def with_some(code: ConceptCode, other: ConceptCode, concepts: Ints) -> ConceptCode:
    """The code, with these concepts (columns) taken from the other one."""
    where = torch.zeros(code.probabilities.shape[1], dtype=torch.bool)
    where[torch.from_numpy(concepts)] = True
    return ConceptCode(
        torch.where(where[None, :, None], other.embeddings, code.embeddings),
        torch.where(where, other.logits, code.logits),
        torch.where(where, other.probabilities, code.probabilities),
    )


def _joined(codes: list[ConceptCode]) -> ConceptCode:
    return ConceptCode(*(torch.cat(parts) for parts in zip(*codes, strict=True)))
