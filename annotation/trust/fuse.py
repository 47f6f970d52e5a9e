"""Fusion of all witnesses into one label per image and concept, with a probability and the right to abstain."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.special import expit, logit, softmax

from annotation.trust.label_model import Evidence, fit_label_model
from annotation.trust.thresholds import threshold_votes
from annotation.votes import (
    ImageIds,
    Votes,
    alignment_scores,
    combined,
    latest,
    places,
    score_matrix,
    votes_by_witness,
)
from data_contracts.concepts import Vocabulary
from data_contracts.tables import State, Witness

Array = npt.NDArray[np.float64]

NOBODY = "nobody"
"""`decided_by` where no witness said anything: the label abstains."""
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
    max_fit_images: int = Field(5_000, ge=1)
    """Reliabilities are learned on at most so many images and applied to all."""
    chunk_size: int = Field(50_000, ge=1)
    """Images whose labels are computed at once."""
    seed: int = 0
    """Decides which images the reliabilities are learned on."""

    @model_validator(mode="after")
    def _ordered(self) -> FuseOptions:
        if self.abstain_low > self.abstain_high:
            raise ValueError(f"abstain_low {self.abstain_low} is above abstain_high {self.abstain_high}")
        return self


class Fusion:
    """Evidence of one run, the label model learned from it, and the labels that follow."""

    def __init__(
        self,
        judgements: pd.DataFrame,
        alignment: pd.DataFrame | pa.Table | None,
        vocabulary: Vocabulary,
        options: FuseOptions,
        *,
        thresholds: pd.DataFrame | None = None,
        learn_from: Collection[str] | None = None,
    ) -> None:
        """Read the evidence and learn the reliabilities; see `fuse` for the arguments."""
        scores = alignment_scores(alignment)
        standing = latest(judgements)
        self.vocabulary = vocabulary
        self.options = options
        self.image_ids = pd.unique(pd.concat([scores["image_id"], standing["image_id"]], ignore_index=True))
        by_witness = votes_by_witness(standing, self.image_ids, vocabulary)
        voters = {name: votes for name, votes in by_witness.items() if name[0] == Witness.VLM}
        score = score_matrix(scores, self.image_ids, vocabulary)
        if thresholds is not None:
            voters[Witness.ALIGNMENT, "threshold"] = threshold_votes(scores, thresholds, self.image_ids, vocabulary)
            score = np.full_like(score, np.nan)
        self.voters = tuple(voters)
        self._expert = _together(by_witness, Witness.EXPERT, score.shape)
        self._given = _together(by_witness, Witness.GIVEN, score.shape)
        self._opposed = (self._expert.weight > 0) & (self._expert.value == 0.5)
        self._unsettled = self._opposed | (
            _expert_uncertain(standing, self.image_ids, vocabulary) & (self._expert.weight == 0)
        )
        self.evidence = _evidence(score, list(voters.values()), self._expert, self._given)
        self.model = fit_label_model(_rows(self.evidence, self._learners(learn_from)))

    def labels(self) -> pd.DataFrame:
        """LABELS rows: images in order of appearance, concepts in the vocabulary's."""
        parts = list(self.chunks())
        return pd.concat(parts, ignore_index=True) if parts else self._frame(np.arange(0))

    def chunks(self) -> Iterator[pd.DataFrame]:
        """The labels, some images at a time."""
        for start in range(0, len(self.image_ids), self.options.chunk_size):
            yield self._frame(np.arange(start, min(start + self.options.chunk_size, len(self.image_ids))))

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

    def _learners(self, learn_from: Collection[str] | None) -> npt.NDArray[np.int64]:
        """Row numbers of the images that reliabilities are learned on."""
        rows = np.arange(len(self.image_ids))
        if learn_from is not None:
            rows = np.flatnonzero(np.isin(self.image_ids.astype(str), list(learn_from)))
        if len(rows) <= self.options.max_fit_images:
            return rows
        return np.sort(
            np.random.default_rng(self.options.seed).choice(rows, self.options.max_fit_images, replace=False)
        )

    def _frame(self, rows: npt.NDArray[np.int64]) -> pd.DataFrame:
        evidence = _rows(self.evidence, rows)
        from_score = self.model.prior_log_odds(evidence.score)
        votes = self.model.vote_log_odds(evidence.value, evidence.weight)
        probability = self._probability(from_score + votes.sum(0), evidence.decided)
        base = logit(self.model.prevalence)
        scored = np.where(np.isfinite(evidence.score), from_score - base, np.nan)
        decided_by = self._decided_by(rows, probability, scored, np.where(evidence.weight > 0, votes, np.nan))
        disagreement = _disagreement(evidence, expit(from_score), expit(base + votes))
        disagreement[self._opposed[rows]] = 1.0
        present = self._present(rows, probability, decided_by)
        return pd.DataFrame(
            {
                "image_id": np.repeat(self.image_ids[rows], len(self.vocabulary)),
                "concept_id": np.tile(np.asarray(self.vocabulary.ids, object), len(rows)),
                "present": pd.arrays.BooleanArray(present[0].ravel(), present[1].ravel()),
                "probability": probability.ravel(),
                "decided_by": decided_by.ravel(),
                "disagreement": disagreement.ravel(),
            }
        )

    def _probability(self, log_odds: Array, decided: npt.NDArray[np.floating]) -> Array:
        """(n, K) posterior; members of an exclusive group sum to 1, settled cells are exactly 0 or 1."""
        settled = np.isfinite(decided)
        log_odds = np.where(settled, np.where(decided > 0.5, 1, -1) * _EXCLUDED_LOG_ODDS, log_odds)
        probability = expit(log_odds)
        for members in self.vocabulary.groups.values():
            columns = [self.vocabulary.position(member) for member in members]
            if len(columns) > 1:
                # Exactly one member holds: P(k) ∝ odds_k (1 - prevalence_k), the k-th likelihood ratio times its prior.
                # A settled member needs no prior.
                share = np.where(settled[:, columns], 0.0, np.log1p(-self.model.prevalence[columns]))
                probability[:, columns] = softmax(log_odds[:, columns] + share, axis=1)
        return np.where(settled, decided, probability)

    def _decided_by(
        self, rows: npt.NDArray[np.int64], probability: Array, score: Array, votes: Array
    ) -> npt.NDArray[np.object_]:
        """(n, K) the witness, or the two, that moved the label most in the direction it took.

        `score` (n, K) and `votes` (J, n, K) are log-odds, NaN where the witness was silent.
        """
        side = np.where(probability >= 0.5, 1.0, -1.0)
        is_vlm = np.array([witness == Witness.VLM for witness, _ in self.voters], bool)
        vlm = side * _sum_of_said(votes[is_vlm])
        alignment = side * _sum_of_said(np.concatenate([score[None], votes[~is_vlm]]))
        both = np.fmin(vlm, alignment) >= _TOGETHER * np.fmax(np.abs(vlm), np.abs(alignment))
        first = np.nan_to_num(vlm, nan=-np.inf) >= np.nan_to_num(alignment, nan=-np.inf)
        name = np.where(first, str(Witness.VLM), str(Witness.ALIGNMENT)).astype(object)
        name[both & np.isfinite(vlm) & np.isfinite(alignment)] = f"{Witness.VLM}+{Witness.ALIGNMENT}"
        name[np.isnan(vlm) & np.isnan(alignment)] = NOBODY
        name[self._given.weight[rows] > 0] = str(Witness.GIVEN)
        name[(self._expert.weight[rows] > 0) | self._unsettled[rows]] = str(Witness.EXPERT)
        return name

    def _present(
        self, rows: npt.NDArray[np.int64], probability: Array, decided_by: npt.NDArray[np.object_]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """(values, abstained): nothing is called where nobody spoke, the band is entered, or an expert cannot tell."""
        undecided = (probability >= self.options.abstain_low) & (probability <= self.options.abstain_high)
        undecided |= (decided_by == NOBODY) | self._unsettled[rows]
        return probability > 0.5, undecided


def fuse(
    judgements: pd.DataFrame,
    alignment: pd.DataFrame | pa.Table | None,
    vocabulary: Vocabulary,
    options: FuseOptions | None = None,
    *,
    thresholds: pd.DataFrame | None = None,
    learn_from: Collection[str] | None = None,
) -> pd.DataFrame:
    """LABELS of every image that was judged or aligned.

    Experts are final, then given labels; an expert who cannot tell makes the label abstain. Elsewhere votes and
    alignment meet in a label model (see `label_model`), and members of an exclusive group form one categorical.

    Args:
        judgements: The ledger; the last answer of each witness and model stands.
        alignment: ALIGNMENT columns (the heatmap is not needed), or None. The calibrated `probability` is used where
            there is one, else `similarity`.
        vocabulary: The concepts and their order.
        options: Abstain band and limits.
        thresholds: From `fit_thresholds`: alignment then votes by its threshold (the paper's rule) instead of
            contributing its score.
        learn_from: Images on which reliabilities are learned; all if None. Leave the test split out where people
            answered on it, or what they said there would reach the labels of other images.
    """
    settings = options or FuseOptions()
    return Fusion(judgements, alignment, vocabulary, settings, thresholds=thresholds, learn_from=learn_from).labels()


def _together(by_witness: dict[tuple[str, str], Votes], witness: Witness, shape: tuple[int, ...]) -> Votes:
    """All people or sources of one kind as one; silent where none decided (uncertain answers do not decide)."""
    silent = Votes(np.full(shape, 0.5, np.float32), np.zeros(shape, np.float32))
    votes = [
        Votes(v.value.round(), (v.weight == 1).astype(np.float32)) for (w, _), v in by_witness.items() if w == witness
    ]
    return combined([silent, *votes])


def _expert_uncertain(standing: pd.DataFrame, image_ids: ImageIds, vocabulary: Vocabulary) -> npt.NDArray[np.bool_]:
    """(N, K) True where an expert looked and could not tell."""
    result = np.zeros((len(image_ids), len(vocabulary)), bool)
    rows = standing[(standing["witness"] == Witness.EXPERT) & (standing["state"] == State.UNCERTAIN)]
    row, column = places(rows, image_ids, vocabulary)
    known = (row >= 0) & (column >= 0)
    result[row[known], column[known]] = True
    return result


def _evidence(score: npt.NDArray[np.float32], voters: list[Votes], expert: Votes, given: Votes) -> Evidence:
    shape = (0, *score.shape)
    decided = np.where(expert.weight > 0, expert.value, np.where(given.weight > 0, given.value, np.nan))
    return Evidence(
        score,
        np.stack([v.value for v in voters]) if voters else np.zeros(shape, np.float32),
        np.stack([v.weight for v in voters]) if voters else np.zeros(shape, np.float32),
        np.where(decided == 0.5, np.nan, decided),
    )


def _rows(evidence: Evidence, rows: npt.NDArray[np.int64]) -> Evidence:
    score, value, weight, decided = evidence
    return Evidence(score[rows], value[:, rows], weight[:, rows], decided[rows])


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
