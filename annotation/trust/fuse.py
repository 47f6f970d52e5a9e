"""Fusion of all witnesses into one label per image and concept, with a probability and the right to abstain."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.special import expit, logit, softmax

from annotation.trust.cuts import PROBABILITY, Cuts, least_called
from annotation.trust.gather import Gathered, Voter, gather, voters_of
from annotation.trust.label_model import Evidence, LabelModel, fit_label_model
from annotation.trust.sample import Shard, sample_shards
from data_contracts.concepts import Vocabulary
from data_contracts.tables import Witness

Array = npt.NDArray[np.float64]

NOBODY = "nobody"
"""`decided_by` where no witness said anything: the label abstains."""
_BOTH = f"{Witness.VLM}+{Witness.ALIGNMENT}"
_DECIDERS = (str(Witness.VLM), str(Witness.ALIGNMENT), _BOTH, NOBODY, str(Witness.GIVEN), str(Witness.EXPERT))
_TOGETHER = 0.5
"""Two witnesses decide together when the weaker one gives at least this share of the stronger one's log-odds."""
_EXCLUDED_LOG_ODDS = 30.0


class FuseOptions(BaseModel):
    """How witnesses are fused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    abstain_low: float = Field(0.35, ge=0, le=0.5)
    """Below this probability a concept is called absent."""
    abstain_high: float = Field(0.65, ge=0.5, le=1)
    """Above this probability a concept is called present; in between the label abstains."""
    min_precision: float | None = Field(None, gt=0.5, lt=1)
    """Precision that calls of presence are expected to have, per concept: `abstain_high` is raised until the
    probabilities above it average so much. It holds as far as the probabilities do, so audit first. Null: off."""
    min_npv: float | None = Field(None, gt=0.5, lt=1)
    """The same for calls of absence: `abstain_low` is lowered until so many of them are expected to be right."""
    max_fit_images: int = Field(5_000, ge=1)
    """Reliabilities are learned on at most so many images and applied to all."""
    chunk_size: int = Field(50_000, ge=1)
    """Images whose labels are computed at once."""
    seed: int = 0
    """Decides which images the reliabilities are learned on. Those that people settled come first."""

    @model_validator(mode="after")
    def _ordered(self) -> FuseOptions:
        if self.abstain_low > self.abstain_high:
            raise ValueError(f"abstain_low {self.abstain_low} is above abstain_high {self.abstain_high}")
        return self


@dataclass(frozen=True)
class LearnedFusion:
    """What was learned of the witnesses, ready for any number of images: memory is that of one shard."""

    vocabulary: Vocabulary
    options: FuseOptions
    voters: tuple[Voter, ...]
    """In the order of `model`'s first axis."""
    model: LabelModel
    calls: Cuts
    """Where probabilities become calls of presence and absence."""
    undecided: Array
    """(n, K) probabilities of the images learned from, as if no person had settled any; NaN where no witness spoke."""
    thresholds: Cuts | None = None
    """Where alignment votes by its cuts instead of contributing its score."""

    def labels(self, judgements: pd.DataFrame, alignment: pd.DataFrame | pa.Table | None) -> pd.DataFrame:
        """LABELS rows: images in order of appearance, alignment's first; concepts in the vocabulary's order.

        Every answer and score of an image must be in one call.

        Raises:
            ConfigurationError: A witness speaks that was silent where the reliabilities were learned.
        """
        gathered = gather(judgements, alignment, self.vocabulary, self.voters, self.thresholds)
        starts = range(0, max(len(gathered.image_ids), 1), self.options.chunk_size)
        parts = [self._frame(gathered.rows(slice(start, start + self.options.chunk_size))) for start in starts]
        return pd.concat(parts, ignore_index=True)

    def shards(self, shards: Iterable[Shard]) -> Iterator[pd.DataFrame]:
        """The labels of each shard in turn."""
        return (self.labels(judgements, alignment) for judgements, alignment in shards)

    def reliability(self) -> pd.DataFrame:
        """One row per voting witness and concept: witness, witness_model, concept_id, sensitivity, specificity."""
        n_concepts = len(self.vocabulary)
        return pd.DataFrame(
            {
                "witness": np.repeat([w for w, _ in self.voters], n_concepts),
                "witness_model": np.repeat([m for _, m in self.voters], n_concepts),
                "concept_id": np.tile(self.vocabulary.ids, len(self.voters)),
                "sensitivity": self.model.sensitivity.ravel(),
                "specificity": self.model.specificity.ravel(),
            }
        )

    def _frame(self, gathered: Gathered) -> pd.DataFrame:
        evidence = gathered.evidence
        from_score, votes = self.model.parts(evidence)
        probability = posterior(self.model, self.vocabulary, from_score + votes.sum(0), evidence.decided)
        base = logit(self.model.prevalence)
        scored = np.where(np.isfinite(evidence.score), from_score - base, np.nan)
        decided_by = self._decided_by(gathered, probability, scored, np.where(evidence.weight > 0, votes, np.nan))
        disagreement = _disagreement(evidence, expit(from_score), expit(base + votes))
        disagreement[gathered.opposed] = 1.0
        low, high = self.calls.limits(gathered.image_ids, self.vocabulary)
        undecided = (probability >= low) & (probability <= high)
        # What a person settled is called whatever the cuts say.
        undecided &= ~np.isfinite(evidence.decided)
        undecided |= (decided_by == _DECIDERS.index(NOBODY)) | gathered.unsettled
        present = np.where(probability > high, True, np.where(probability < low, False, probability > 0.5))
        n_images, n_concepts = probability.shape
        return pd.DataFrame(
            {
                "image_id": _text(gathered.image_ids).repeat(len(self.vocabulary)),
                "concept_id": _text(self.vocabulary.ids).take(np.tile(np.arange(n_concepts), n_images)),
                "present": pd.arrays.BooleanArray(present.ravel(), undecided.ravel()),
                "probability": probability.ravel(),
                "decided_by": _text(_DECIDERS).take(decided_by.ravel()),
                "disagreement": disagreement.ravel(),
            }
        )

    def _decided_by(self, gathered: Gathered, probability: Array, score: Array, votes: Array) -> npt.NDArray[np.int64]:
        """(n, K) the witness, or the two, that moved the label most in the direction it took, by place in `_DECIDERS`.

        `score` (n, K) and `votes` (J, n, K) are log-odds, NaN where the witness was silent.
        """
        side = np.where(probability >= 0.5, 1.0, -1.0)
        is_vlm = np.array([witness == Witness.VLM for witness, _ in self.voters], bool)
        vlm = side * _sum_of_said(votes[is_vlm])
        alignment = side * _sum_of_said(np.concatenate([score[None], votes[~is_vlm]]))
        both = np.fmin(vlm, alignment) >= _TOGETHER * np.fmax(np.abs(vlm), np.abs(alignment))
        first = np.nan_to_num(vlm, nan=-np.inf) >= np.nan_to_num(alignment, nan=-np.inf)
        name = np.where(first, _DECIDERS.index(Witness.VLM), _DECIDERS.index(Witness.ALIGNMENT))
        name[both & np.isfinite(vlm) & np.isfinite(alignment)] = _DECIDERS.index(_BOTH)
        name[np.isnan(vlm) & np.isnan(alignment)] = _DECIDERS.index(NOBODY)
        name[gathered.by_given] = _DECIDERS.index(Witness.GIVEN)
        name[gathered.by_expert | gathered.unsettled] = _DECIDERS.index(Witness.EXPERT)
        return name


def learn_fusion(
    judgements: pd.DataFrame,
    alignment: pd.DataFrame | pa.Table | None,
    vocabulary: Vocabulary,
    options: FuseOptions | None = None,
    *,
    thresholds: Cuts | None = None,
    learn_from: Collection[str] | None = None,
    voters: tuple[Voter, ...] | None = None,
) -> LearnedFusion:
    """The reliabilities of the witnesses in these tables, to be applied to any images.

    Args:
        judgements: The ledger, or a sample of it (see `sample_shards`); the last answer of each witness and model
            stands.
        alignment: ALIGNMENT columns (the heatmap is not needed), or None. The calibrated `probability` is used where
            there is one, else `similarity`.
        vocabulary: The concepts and their order.
        options: Abstain band and limits.
        thresholds: From `fit_thresholds`: alignment then votes by its cuts (the paper's rule) instead of contributing
            its score.
        learn_from: Images on which reliabilities are learned; all if None. Leave the test split out where people
            answered on it, or what they said there would reach the labels of other images.
        voters: The witnesses that may speak, where these tables are a sample; those that spoke here if None.
    """
    settings = options or FuseOptions()
    names = voters if voters is not None else voters_of([judgements], thresholds)
    shard = (judgements, alignment)
    sample = sample_shards([shard], settings.max_fit_images, seed=settings.seed, among=learn_from)
    evidence = gather(*sample, vocabulary, names, thresholds).evidence
    model = fit_label_model(evidence)
    undecided = posterior(model, vocabulary, model.log_odds(evidence), np.full_like(evidence.decided, np.nan))
    heard = np.isfinite(evidence.score) | (evidence.weight > 0).any(0)
    undecided = np.where(heard, undecided, np.nan)
    calls = _expected_calls(undecided, vocabulary, settings)
    return LearnedFusion(vocabulary, settings, names, model, calls, undecided, thresholds)


def fuse(
    judgements: pd.DataFrame,
    alignment: pd.DataFrame | pa.Table | None,
    vocabulary: Vocabulary,
    options: FuseOptions | None = None,
    *,
    thresholds: Cuts | None = None,
    learn_from: Collection[str] | None = None,
) -> pd.DataFrame:
    """LABELS of every image that was judged or aligned, by reliabilities learned from the same tables.

    Experts are final, then given labels; an expert who cannot tell makes the label abstain. Elsewhere votes and
    alignment meet in a label model (see `label_model`), and members of an exclusive group form one categorical. The
    arguments are those of `learn_fusion`.
    """
    learned = learn_fusion(judgements, alignment, vocabulary, options, thresholds=thresholds, learn_from=learn_from)
    return learned.labels(judgements, alignment)


def posterior(model: LabelModel, vocabulary: Vocabulary, log_odds: Array, decided: npt.NDArray[np.floating]) -> Array:
    """(n, K) probability; members of an exclusive group sum to 1, settled cells are exactly 0 or 1."""
    settled = np.isfinite(decided)
    log_odds = np.where(settled, np.where(decided > 0.5, 1, -1) * _EXCLUDED_LOG_ODDS, log_odds)
    probability = expit(log_odds)
    for members in vocabulary.groups.values():
        columns = [vocabulary.position(member) for member in members]
        if len(columns) > 1:
            # Exactly one member holds: P(k) ∝ odds_k (1 - prevalence_k), the k-th likelihood ratio times its prior.
            # A settled member needs no prior.
            share = np.where(settled[:, columns], 0.0, np.log1p(-model.prevalence[columns]))
            probability[:, columns] = softmax(log_odds[:, columns] + share, axis=1)
    return np.where(settled, decided, probability)


def _expected_calls(probability: Array, vocabulary: Vocabulary, options: FuseOptions) -> Cuts:
    """The abstain band, widened per concept until calls are expected to be as right as is asked for."""
    low, high = expected_limits(probability, options)
    content = {"concept_id": list(vocabulary.ids), "score": PROBABILITY, "threshold": 0.5}
    return Cuts(pd.DataFrame(content | {"abstain_low": low, "abstain_high": high}))


def expected_limits(probability: Array, options: FuseOptions) -> tuple[Array, Array]:
    """(K,) limits below and above which (n, K) probabilities (NaN: not counted) are expected to be right as asked."""
    return 1 - _raised(1 - probability, 1 - options.abstain_low, options.min_npv), _raised(
        probability, options.abstain_high, options.min_precision
    )


def _raised(probability: Array, limit: float, wanted: float | None) -> Array:
    """(K,) the limit, raised until the probabilities above it average `wanted`; what is as likely itself is above."""
    if wanted is None:
        return np.full(probability.shape[1], limit)
    # One that no witness spoke on is never called: as impossible it changes no average that matters.
    least = least_called(np.where(np.isnan(probability), 0.0, probability), wanted)
    return np.maximum(limit, np.minimum(np.nextafter(least, 0), wanted))


def _text(values: Any) -> Any:
    """The texts as pandas holds them: repeating these is far cheaper than converting repeated ones."""
    return pd.array(np.asarray(values, object), dtype="str")


def _sum_of_said(log_odds: Array) -> Array:
    """(J, n, K) → (n, K) sum over witnesses that spoke; NaN where none did."""
    said = np.isfinite(log_odds)
    return np.where(said.any(0), np.where(said, log_odds, 0).sum(0), np.nan)


def _disagreement(evidence: Evidence, from_score: Array, from_votes: Array) -> Array:
    """(n, K) how far apart the witnesses are, each taken alone: the range of their probabilities; 0 for one or none."""
    said = [np.isfinite(evidence.score), *(evidence.weight > 0), np.isfinite(evidence.decided)]
    each = [from_score, *from_votes, evidence.decided]
    highest = np.max([np.where(s, p, -np.inf) for s, p in zip(said, each, strict=True)], axis=0)
    lowest = np.min([np.where(s, p, np.inf) for s, p in zip(said, each, strict=True)], axis=0)
    return np.clip(np.where(np.isfinite(highest), highest - lowest, 0.0), 0, 1)
