"""Null prompts and null scores: what an honest concept score must beat."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from annotation.votes import Votes

NULL_PROMPTS = ("an image", "a picture of something", "blorptic vantrule", "quibbet of the sarnile", "text on a page")
"""Prompts that name nothing visible in a medical image: the empty, the nonsensical and the irrelevant."""

NEGATION = "no {}"
"""A concept denied; a text tower that does not read it takes it for the concept."""


class NullKind(StrEnum):
    """What a concept's score is held against."""

    NULL_PROMPT = "null_prompt"
    """The text names nothing that could be seen: nonsense, "an image", another modality."""
    NEGATION = "negation"
    """The text denies the concept."""
    SHUFFLED = "shuffled"
    """The texts, or fitted heads, of other concepts."""
    PERMUTATION = "permutation"
    """Heads fitted in the same way to judgements that were dealt out to other images."""
    CLASS_NAME = "class_name"
    """What the image's class alone, as it looks, says about the concept."""


class Null(NamedTuple):
    """One control: scores of the same images and concepts that ought to tell less about the concepts.

    Its members (M) are pooled: what the concept must beat is their mean.
    """

    kind: NullKind
    scores: npt.NDArray[np.floating]
    """(M, n, K)"""
    answers: npt.NDArray[np.floating] | None = None
    """(M, n, K) what each member ought to predict, 1, 0 or NaN; None: the concepts' own answers."""
    decides: bool = True
    """Whether a concept that does not beat it fails; else it is only reported."""
    exchangeable: bool = False
    """Whether concepts differ by chance only here, so that all of them together are the null of each."""


def dealt(votes: Votes, rng: np.random.Generator) -> Votes:
    """All judgements of an image given to another image: concepts keep what they have in common."""
    order = rng.permutation(len(votes.value))
    return Votes(votes.value[order], votes.weight[order])


def beside(votes: Votes, others: Votes) -> Votes:
    """Both as columns of one table: what is fitted beside the real judgements is fitted as freely as they are."""
    value = np.concatenate([votes.value, others.value], axis=1)
    return Votes(value, np.concatenate([votes.weight, others.weight], axis=1))
