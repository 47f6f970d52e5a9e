"""A fitted probe written as projections of image and text into one joint space.

So it stays an ordinary open_clip head: the dot product of an image's mean cell with a concept's text is the
probe's score, and the cosine at a single cell is the concept's heatmap there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from annotation.alignment.adapt import Array, Probe

_TEXT_RIDGE = 0.01
_SHARED_SCALE = 3.0


class Projections(NamedTuple):
    """A probe as open_clip sees it."""

    image_weight: Array
    """(D, F) the image head's weight."""
    image_bias: Array
    """(D,) the image head's bias."""
    text_weight: Array
    """(D, D) the text head's weight."""

    def text(self, text: npt.NDArray[np.floating]) -> Array:
        """(n, D) text features in the joint space, rows of unit length."""
        return _unit(text @ self.text_weight.T)


def text_projection(text: npt.NDArray[np.floating]) -> Array:
    """(D, D) map that pushes concept texts apart, so that each can have a map of its own.

    Sentence embeddings of concepts of one kind are nearly parallel. This is the inverse square root of their
    ridged second moment: what all concepts share shrinks, unrelated text keeps its distance from all of them.
    """
    moment = np.asarray(text, np.float64).T @ text + _TEXT_RIDGE * np.eye(text.shape[1])
    values, vectors = np.linalg.eigh(moment)
    return (vectors * values**-0.5) @ vectors.T * _TEXT_RIDGE**0.5


def projections(
    probe: Probe,
    text: npt.NDArray[np.floating],
    features: npt.NDArray[np.floating],
    null_text: npt.NDArray[np.floating],
) -> Projections:
    """The probe as projections into the joint space of the (K, D) concept texts.

    Besides the concepts' directions, image embeddings get one constant component that no concept text and no null
    text shares (the offset between images and texts that contrastive models have too). It keeps a cell's length
    nearly constant, so that its cosines rank images as the probe does, and is `_SHARED_SCALE` times as long as the
    rest. A similarity of 0 then means: as in the average image.
    """
    text_weight = text_projection(text)
    unit = _unit(text @ text_weight.T)
    inverse = np.linalg.pinv(unit)  # (D, K)
    weight = inverse @ probe.weight
    centred = probe(features) @ inverse.T
    length = np.sqrt((centred**2).sum(1).mean()) if len(features) else 0.0
    shared = _direction_apart(np.concatenate([unit, null_text @ text_weight.T]))
    bias = _SHARED_SCALE * (length or 1.0) * shared - weight @ probe.centre
    return Projections(weight, bias, text_weight)


def _direction_apart(rows: Array) -> Array:
    """(D,) a fixed unit direction orthogonal to all `rows`; zeros when they span the space."""
    direction = np.random.default_rng(0).standard_normal(rows.shape[1])
    apart = direction - np.linalg.pinv(rows) @ (rows @ direction)
    length = np.linalg.norm(apart)
    return apart / length if length > 1e-6 * np.linalg.norm(direction) else np.zeros_like(apart)


def _unit(rows: npt.NDArray[np.floating]) -> Array:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows, np.float64) / np.where(lengths > 0, lengths, 1)
