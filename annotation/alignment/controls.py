"""Scores of the judged images beside the scores of controls: what the honesty and leak tests look at.

What counts as a control depends on where a score comes from. A fitted head has read judgements, so its null is a head
fitted in the same way, in one fit with the real ones, to judgements dealt out to other images. An untouched model has
read texts, so its nulls are texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.special import softmax
from torch.nn import functional as F

from annotation.alignment.adapt import CrossFit, cross_fit, principal_directions
from annotation.alignment.heads import FitData, concept_texts, concept_wordings, fit_data
from annotation.alignment.inputs import AlignmentInputs
from annotation.alignment.nulls import NEGATION, NULL_PROMPTS, Null, NullKind, beside, dealt
from annotation.alignment.source import CellSource
from annotation.votes import Votes
from data_contracts.concepts import Vocabulary

Array = npt.NDArray[np.float64]

N_PERMUTATIONS = 2
"""Times judgements are dealt out anew; their mean is the null."""


class Controls(NamedTuple):
    """Judged images (n) and concepts (K) with scores and controls, all cross-fitted."""

    image_ids: list[str]
    folds: npt.NDArray[np.int64]
    """(n,) which head scored the image: scores of different heads are not compared."""
    answers: Array
    """(n, K) what was judged: 1, 0, or NaN where nobody decided."""
    own: Array
    """(n, K) the concepts' own scores."""
    class_score: Array | None
    """(n, K) rate of presence expected from the class as the image looks; None without classes."""
    nulls: list[Null]

    def scores(self, vocabulary: Vocabulary) -> pd.DataFrame:
        """image_id, concept_id, score, class_score, fold: what `class_leak` takes."""
        n_images, n_concepts = self.own.shape
        return pd.DataFrame(
            {
                "image_id": np.repeat(np.asarray(self.image_ids, object), n_concepts),
                "concept_id": np.tile(np.asarray(vocabulary.ids, object), n_images),
                "score": self.own.ravel(),
                "class_score": np.nan if self.class_score is None else self.class_score.ravel(),
                "fold": np.repeat(self.folds, n_concepts),
            }
        )


def controls(inputs: AlignmentInputs, *, labels: Mapping[str, str] | None = None) -> Controls:
    """Scores and controls of at most `options.max_fit_images` judged images.

    After `align` with the same inputs no image is read again, and the scores are those it gave.

    Args:
        inputs: As given to `align`.
        labels: Image id → class, of train and val only; without them there is no class control.

    Raises:
        ConfigurationError: Nothing was judged.
    """
    source, options = inputs.source(), inputs.options
    found = fit_data(inputs, source)
    if not options.adapts:
        return _text_controls(inputs.vocabulary, found, source, labels or {})
    return fitted_controls(
        found.image_ids,
        found.features,
        found.votes,
        found.folds,
        options.n_folds,
        labels=labels,
        seed=options.seed,
    )


def fitted_controls(
    image_ids: Sequence[str],
    features: npt.NDArray[np.floating],
    votes: Votes,
    folds: npt.NDArray[np.int64],
    n_folds: int,
    *,
    labels: Mapping[str, str] | None = None,
    seed: int = 0,
    n_permutations: int = N_PERMUTATIONS,
) -> Controls:
    """Controls of heads fitted to (n, K) votes from (n, F) mean cell features; see `controls`.

    Without permutations (each costs as much as the heads) nothing is left for the honesty test to decide on.
    """
    reduced = _reduced(np.asarray(features, np.float64))
    own = cross_fit(reduced, votes, folds, n_folds).held_out
    answers = _answers(votes)
    rng = np.random.default_rng(seed)
    others = [dealt(votes, rng) for _ in range(n_permutations)]
    # Heads of related concepts rightly predict each other, so here other concepts' scores are for information.
    nulls = _shuffled(own, decides=False)
    if others:
        # Fitted beside the real columns: how freely all are fitted decides how far chance can go.
        n_concepts = own.shape[1]
        scores = np.stack(
            [cross_fit(reduced, beside(votes, v), folds, n_folds).held_out[:, n_concepts:] for v in others]
        )
        said = np.stack([_answers(v) for v in others])
        nulls.insert(0, Null(NullKind.PERMUTATION, scores, said, exchangeable=True))
    class_score = _class_scores(image_ids, reduced, answers, folds, n_folds, labels or {})
    if class_score is not None:
        nulls.append(Null(NullKind.CLASS_NAME, class_score[None], decides=False))
    return Controls(list(image_ids), folds, answers, own, class_score, nulls)


def _text_controls(vocabulary: Vocabulary, found: FitData, source: CellSource, labels: Mapping[str, str]) -> Controls:
    """Controls of a model that nothing was fitted to: other texts."""
    aligner = source.aligner
    mean_cells = _mean_unit_cells(found.image_ids, source)
    own = mean_cells @ aligner.embed_concepts(concept_wordings(vocabulary)).T.astype(np.float64)
    denied = mean_cells @ aligner.embed_text([NEGATION.format(t) for t in concept_texts(vocabulary)]).T
    empty = mean_cells @ aligner.embed_text(NULL_PROMPTS).T
    nulls = [Null(NullKind.NEGATION, denied[None]), *_shuffled(own, decides=True)]
    nulls += [Null(NullKind.NULL_PROMPT, np.broadcast_to(e[:, None], own.shape)[None]) for e in empty.T]
    answers = _answers(found.votes)
    names = sorted(set(labels.values()))
    class_score = None
    if len(names) > 1:
        looks = softmax(aligner.text_scale * (mean_cells @ aligner.embed_text(names).T), axis=1)
        is_class = _one_hot(found.image_ids, labels, names)
        class_score = looks @ _rates(answers, is_class)
        nulls.append(Null(NullKind.CLASS_NAME, class_score[None], decides=False))
    # One head scored all images.
    return Controls(found.image_ids, np.zeros(len(own), np.int64), answers, own, class_score, nulls)


def _mean_unit_cells(image_ids: Sequence[str], source: CellSource) -> Array:
    """(n, D) mean of each image's unit cells in the joint space."""
    parts: dict[str, Array] = {}
    for ids, cells in source.shards(image_ids):
        with torch.inference_mode():
            at = source.aligner.project(torch.from_numpy(cells).to(source.aligner.device).float())
            rows = F.normalize(at.flatten(1, 2), dim=-1).mean(1).double().cpu().numpy()
        parts |= dict(zip(ids, rows, strict=True))
    return np.stack([parts[image_id] for image_id in image_ids])


def _answers(votes: Votes) -> Array:
    """(n, K) decided votes as 1 or 0; NaN elsewhere."""
    decided = (votes.weight == 1) & (votes.value != 0.5)
    return np.where(decided, votes.value > 0.5, np.nan)


def _shuffled(own: Array, *, decides: bool) -> list[Null]:
    """All other concepts' scores in place of each concept's own; nothing where there is one concept only."""
    turned = [np.roll(own, step, axis=1) for step in range(1, own.shape[1])]
    return [Null(NullKind.SHUFFLED, np.stack(turned), decides=decides)] if turned else []


def _class_scores(
    image_ids: Sequence[str],
    features: Array,
    answers: Array,
    folds: npt.NDArray[np.int64],
    n_folds: int,
    labels: Mapping[str, str],
) -> Array | None:
    """(n, K) presence expected from the class as the pixels show it, fitted as the concepts are; None without two."""
    names = sorted({labels[i] for i in image_ids if i in labels})
    if len(names) < 2:
        return None
    is_class = _one_hot(image_ids, labels, names)
    known = np.broadcast_to(is_class.sum(1, keepdims=True), is_class.shape)
    fit = cross_fit(features, Votes(is_class.astype(np.float32), known.astype(np.float32)), folds, n_folds)
    result = np.zeros(answers.shape)
    for fold in range(n_folds):
        rows = folds == fold
        result[rows] = _looks(fit, fold, rows) @ _rates(answers[~rows], is_class[~rows])
    return result


def _looks(fit: CrossFit, fold: int, rows: npt.NDArray[np.bool_]) -> Array:
    """(n, C) chance of each class for the images of a fold."""
    chance = np.nan_to_num(fit.probability(fit.held_out[rows], fold))
    return chance / np.maximum(chance.sum(1, keepdims=True), 1e-12)


def _rates(answers: Array, is_class: Array) -> Array:
    """(C, K) share of presence among the answers of each class; 0.5 where there is none."""
    said = is_class.T @ np.isfinite(answers)
    present = is_class.T @ np.nan_to_num(answers)
    return np.divide(present, said, out=np.full(said.shape, 0.5), where=said > 0)


def _one_hot(image_ids: Sequence[str], labels: Mapping[str, str], names: Sequence[str]) -> Array:
    """(n, C) 1 for the class of each image; all 0 where it is not known."""
    label = np.array([labels.get(i, "") for i in image_ids], object)
    return np.stack([label == name for name in names], 1).astype(np.float64)


def _reduced(features: Array) -> Array:
    """The features in their own principal directions: the same fits, each from a much smaller decomposition."""
    return features @ principal_directions(features)
