"""Fusion of all witnesses into one label per image and concept, with a probability and the right to abstain."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.special import entr, expit, logit, softmax

from annotation.trust.label_model import Evidence, LabelModel, fit_label_model
from annotation.trust.thresholds import threshold_votes
from annotation.votes import (
    ImageIds,
    Votes,
    alignment_scores,
    combined,
    latest,
    matrix,
    places,
    score_matrix,
    votes_by_witness,
)
from data_contracts.concepts import Vocabulary
from data_contracts.errors import ConfigurationError
from data_contracts.tables import State, Witness

Array = npt.NDArray[np.float64]
Shard = tuple[pd.DataFrame, pd.DataFrame | pa.Table | None]
"""Ledger rows and alignment rows of some images: all that is said of an image is in one shard."""

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
class _Gathered:
    """What the tables say of some images, as arrays."""

    image_ids: npt.NDArray[np.object_]
    evidence: Evidence
    by_expert: npt.NDArray[np.bool_]
    """(N, K) an expert answered, whatever the answer."""
    by_given: npt.NDArray[np.bool_]
    """(N, K) a given label is there."""
    unsettled: npt.NDArray[np.bool_]
    """(N, K) experts oppose each other, or looked and could not tell."""
    opposed: npt.NDArray[np.bool_]
    """(N, K) experts oppose each other."""

    def rows(self, rows: npt.NDArray[np.int64] | slice) -> _Gathered:
        """The same of some images."""
        cells = (array[rows] for array in (self.by_expert, self.by_given, self.unsettled, self.opposed))
        return _Gathered(self.image_ids[rows], _rows(self.evidence, rows), *cells)


@dataclass(frozen=True)
class LearnedFusion:
    """What was learned of the witnesses, ready for any number of images: memory is that of one shard."""

    vocabulary: Vocabulary
    options: FuseOptions
    voters: tuple[tuple[str, str], ...]
    """(witness, its model) in the order of `model`'s first axis."""
    model: LabelModel
    present_above: Array
    """(K,) probability above which a concept is called present."""
    thresholds: pd.DataFrame | None = None
    """Where alignment votes by its threshold instead of contributing its score."""

    def labels(self, judgements: pd.DataFrame, alignment: pd.DataFrame | pa.Table | None) -> pd.DataFrame:
        """LABELS rows of the images in these tables; every answer and score of an image must be in one call.

        Raises:
            ConfigurationError: A witness speaks that was silent where the reliabilities were learned.
        """
        return self._frame(_gathered(judgements, alignment, self.vocabulary, self.thresholds, self.voters)[1])

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

    def _frame(self, gathered: _Gathered) -> pd.DataFrame:
        evidence = gathered.evidence
        from_score, votes = self.model.parts(evidence)
        probability = _posterior(self.model, self.vocabulary, from_score + votes.sum(0), evidence.decided)
        base = logit(self.model.prevalence)
        scored = np.where(np.isfinite(evidence.score), from_score - base, np.nan)
        decided_by = self._decided_by(gathered, probability, scored, np.where(evidence.weight > 0, votes, np.nan))
        disagreement = _disagreement(evidence, expit(from_score), expit(base + votes))
        disagreement[gathered.opposed] = 1.0
        undecided = (probability >= self.options.abstain_low) & (probability <= self.present_above)
        undecided |= (decided_by == _DECIDERS.index(NOBODY)) | gathered.unsettled
        n_images, n_concepts = probability.shape
        return pd.DataFrame(
            {
                "image_id": _text(gathered.image_ids).repeat(len(self.vocabulary)),
                "concept_id": _text(self.vocabulary.ids).take(np.tile(np.arange(n_concepts), n_images)),
                "present": pd.arrays.BooleanArray((probability > 0.5).ravel(), undecided.ravel()),
                "probability": probability.ravel(),
                "decided_by": _text(_DECIDERS).take(decided_by.ravel()),
                "disagreement": disagreement.ravel(),
            }
        )

    def _decided_by(self, gathered: _Gathered, probability: Array, score: Array, votes: Array) -> npt.NDArray[np.int64]:
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
        self.vocabulary = vocabulary
        self.options = options
        self.voters, self._gathered = _gathered(judgements, alignment, vocabulary, thresholds, None)
        self.image_ids = self._gathered.image_ids
        self.evidence = self._gathered.evidence
        learners = _rows(self.evidence, self._learners(learn_from))
        self.model = fit_label_model(learners)
        above = _present_above(self.model, vocabulary, learners, options)
        self.learned = LearnedFusion(vocabulary, options, self.voters, self.model, above, thresholds)

    def labels(self) -> pd.DataFrame:
        """LABELS rows: images in order of appearance, concepts in the vocabulary's."""
        parts = list(self.chunks())
        return pd.concat(parts, ignore_index=True) if parts else self.learned._frame(self._gathered)

    def chunks(self) -> Iterator[pd.DataFrame]:
        """The labels, some images at a time."""
        for start in range(0, len(self.image_ids), self.options.chunk_size):
            yield self.learned._frame(self._gathered.rows(slice(start, start + self.options.chunk_size)))

    def reliability(self) -> pd.DataFrame:
        """One row per voting witness and concept: witness, witness_model, concept_id, sensitivity, specificity."""
        return self.learned.reliability()

    def _learners(self, learn_from: Collection[str] | None) -> npt.NDArray[np.int64]:
        """Row numbers of the images that reliabilities are learned on; settled cells are few and come first."""
        rows = np.arange(len(self.image_ids))
        if learn_from is not None:
            rows = np.flatnonzero(np.isin(self.image_ids.astype(str), list(learn_from)))
        most = self.options.max_fit_images
        if len(rows) <= most:
            return rows
        rng = np.random.default_rng(self.options.seed)
        settled = np.isfinite(self.evidence.decided[rows]).any(1)
        first = rng.permutation(rows[settled])[: most // 2]
        return np.sort(np.concatenate([first, rng.permutation(np.setdiff1d(rows, first))[: most - len(first)]]))


def learn_fusion(
    judgements: pd.DataFrame,
    alignment: pd.DataFrame | pa.Table | None,
    vocabulary: Vocabulary,
    options: FuseOptions | None = None,
    *,
    thresholds: pd.DataFrame | None = None,
    learn_from: Collection[str] | None = None,
) -> LearnedFusion:
    """The reliabilities of the witnesses in these tables (see `fuse` for the arguments), to be applied to others."""
    settings = options or FuseOptions()
    return Fusion(judgements, alignment, vocabulary, settings, thresholds=thresholds, learn_from=learn_from).learned


def sample_shards(shards: Iterable[Shard], n_images: int, *, seed: int = 0) -> Shard:
    """Answers and scores of `n_images` images of a stream, those that people settled first; one pass, little memory.

    Half of the sample at most goes to images with an expert's or a given answer. The choice is by the hash of the
    image id, so that it does not depend on how the stream is cut. Leave the test split's people out of the stream.
    """
    kept: list[tuple[pd.DataFrame, pd.DataFrame]] = []
    rank: pd.Series = pd.Series(dtype="float64")
    for judgements, alignment in shards:
        scores = alignment_scores(alignment)
        rank = _best(pd.concat([rank, _ranks(judgements, scores, seed)]), n_images)
        kept = [_of_images(*part, rank.index) for part in [*kept, (judgements, scores)]]
    if not kept:
        raise ValueError("sample_shards: expected at least one shard, got none")
    judgements, scores = (pd.concat([part[side] for part in kept], ignore_index=True) for side in (0, 1))
    return judgements, scores


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


def disagreements(
    labels: pd.DataFrame,
    judgements: pd.DataFrame,
    alignment: pd.DataFrame | pa.Table | None,
    vocabulary: Vocabulary,
    *,
    at_least: float = 0.5,
    n_rows: int | None = None,
) -> pd.DataFrame:
    """Every cell on which witnesses disagree, most informative first.

    Columns: image_id, concept_id, `probability` of the fused label, `disagreement`, `information` and one column for
    each witness: what it says the probability is (1 or 0 for a plain answer, NaN where it was silent).
    `information` is how much an expert's answer is expected to tell, in bits: the entropy of the fused probability.
    Cells that a person decided are left out. For a stream, call it once a shard with `n_rows`, concatenate, and sort
    by `information` again.

    Args:
        labels: From `fuse`.
        judgements: The ledger.
        alignment: ALIGNMENT columns, or None.
        vocabulary: The concepts.
        at_least: Least disagreement listed: how far apart the probabilities of two witnesses are.
        n_rows: At most so many rows; all if None.
    """
    people = [str(Witness.EXPERT), str(Witness.GIVEN)]
    open_cells = labels[(labels["disagreement"] >= at_least) & ~labels["decided_by"].isin(people)]
    information = _entropy_bits(open_cells["probability"].to_numpy(np.float64))
    chosen = open_cells.assign(information=information).sort_values("information", ascending=False, kind="stable")
    chosen = chosen.head(n_rows) if n_rows is not None else chosen
    chosen = chosen[["image_id", "concept_id", "probability", "disagreement", "information"]].reset_index(drop=True)
    image_ids = np.asarray(pd.unique(chosen["image_id"]), object)
    row, column = places(chosen, image_ids, vocabulary)
    said = votes_by_witness(judgements[judgements["image_id"].isin(image_ids)], image_ids, vocabulary)
    for (witness, model), votes in said.items():
        if witness not in people:
            value = np.where(votes.weight > 0, votes.value, np.nan)
            chosen[f"{witness} {model}".strip()] = value[row, column]
    chosen[str(Witness.ALIGNMENT)] = matrix(alignment_scores(alignment), "probability", image_ids, vocabulary)[
        row, column
    ]
    return chosen


def _gathered(
    judgements: pd.DataFrame,
    alignment: pd.DataFrame | pa.Table | None,
    vocabulary: Vocabulary,
    thresholds: pd.DataFrame | None,
    expected: tuple[tuple[str, str], ...] | None,
) -> tuple[tuple[tuple[str, str], ...], _Gathered]:
    """The voters, in the `expected` order where there is one, and what all witnesses say."""
    names_of_images, judged, scores = _coded(judgements, alignment_scores(alignment))
    standing = latest(judged)
    image_ids: Any = np.arange(len(names_of_images))
    by_witness = votes_by_witness(standing, image_ids, vocabulary)
    voters = {name: votes for name, votes in by_witness.items() if name[0] == Witness.VLM}
    score = score_matrix(scores, image_ids, vocabulary)
    if thresholds is not None:
        voters[Witness.ALIGNMENT, "threshold"] = threshold_votes(scores, thresholds, image_ids, vocabulary)
        score = np.full_like(score, np.nan)
    names = tuple(voters) if expected is None else expected
    if strangers := sorted(set(voters) - set(names)):
        raise ConfigurationError(
            f"fusion: expected the witnesses {list(names)}, got {strangers} too; these images got no label.",
            remedy="Learn the reliabilities from images on which every witness spoke.",
        )
    silent = _silent(score.shape)
    expert, given = _together(by_witness, Witness.EXPERT, silent), _together(by_witness, Witness.GIVEN, silent)
    opposed = (expert.weight > 0) & (expert.value == 0.5)
    unsure = _expert_uncertain(standing, image_ids, vocabulary) & (expert.weight == 0)
    evidence = _evidence(score, [voters.get(name, silent) for name in names], expert, given)
    return names, _Gathered(names_of_images, evidence, expert.weight > 0, given.weight > 0, opposed | unsure, opposed)


def _coded(
    judgements: pd.DataFrame, scores: pd.DataFrame
) -> tuple[npt.NDArray[np.object_], pd.DataFrame, pd.DataFrame]:
    """The images in order of appearance, scores first, and both tables with their row in it as `image_id`.

    Texts are looked up once here instead of at every use: that is most of the time that fusion takes.
    """
    codes, image_ids = pd.factorize(pd.concat([scores["image_id"], judgements["image_id"]], ignore_index=True))
    few = {name: judgements[name].astype("category") for name in ("concept_id", "witness", "witness_model")}
    return (
        np.asarray(image_ids, object),
        judgements.assign(image_id=codes[len(scores) :], **few),
        scores.assign(image_id=codes[: len(scores)], concept_id=scores["concept_id"].astype("category")),
    )


def _posterior(model: LabelModel, vocabulary: Vocabulary, log_odds: Array, decided: npt.NDArray[np.floating]) -> Array:
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


def _present_above(model: LabelModel, vocabulary: Vocabulary, evidence: Evidence, options: FuseOptions) -> Array:
    """(K,) `abstain_high`, raised until the probabilities above it average `min_precision`."""
    above = np.full(len(vocabulary), options.abstain_high)
    if options.min_precision is None or not len(evidence.score):
        return above
    undecided = np.full_like(evidence.decided, np.nan)
    probability = -np.sort(-_posterior(model, vocabulary, model.log_odds(evidence), undecided), axis=0)
    expected = probability.cumsum(0) / np.arange(1, len(probability) + 1)[:, None]
    # `expected` falls from the surest image on: the last that keeps it high enough is the least sure one called.
    n_called = (expected >= options.min_precision).sum(0)
    least = np.where(n_called > 0, np.take_along_axis(probability, np.maximum(n_called - 1, 0)[None], 0)[0], 1.0)
    return np.maximum(above, np.minimum(np.nextafter(least, 0), options.min_precision))


def _entropy_bits(probability: Array) -> Array:
    return (entr(probability) + entr(1 - probability)) / np.log(2)


def _ranks(judgements: pd.DataFrame, scores: pd.DataFrame, seed: int) -> pd.Series:
    """Image id → place in the queue for the sample: a hash in [0, 1), 1 less where a person settled a cell."""
    image_ids = pd.Index(pd.unique(pd.concat([scores["image_id"], judgements["image_id"]], ignore_index=True)))
    hashed = pd.util.hash_array(np.asarray(image_ids, object), hash_key=f"{seed:016d}"[:16]) / 2.0**64
    people = judgements["witness"].isin([Witness.EXPERT, Witness.GIVEN])
    return pd.Series(hashed - image_ids.isin(judgements.loc[people, "image_id"]), index=image_ids)


def _best(rank: pd.Series, n_images: int) -> pd.Series:
    """The images to keep: at most half of them settled ones, the rest in the order of their hash."""
    rank = rank[~rank.index.duplicated()]
    settled = rank[rank < 0].nsmallest(n_images // 2)
    rest = rank.drop(settled.index)
    return pd.concat([settled, rest.iloc[np.argsort((rest % 1).to_numpy(), kind="stable")[: n_images - len(settled)]]])


def _of_images(
    judgements: pd.DataFrame, scores: pd.DataFrame, image_ids: pd.Index
) -> tuple[pd.DataFrame, pd.DataFrame]:
    return judgements[judgements["image_id"].isin(image_ids)], scores[scores["image_id"].isin(image_ids)]


def _text(values: Sequence[str] | npt.NDArray[np.object_]) -> Any:
    """The texts as pandas holds them: repeating these is far cheaper than converting repeated ones."""
    return pd.array(np.asarray(values, object), dtype="str")


def _silent(shape: tuple[int, ...]) -> Votes:
    return Votes(np.full(shape, 0.5, np.float32), np.zeros(shape, np.float32))


def _together(by_witness: dict[tuple[str, str], Votes], witness: Witness, silent: Votes) -> Votes:
    """All people or sources of one kind as one; silent where none decided (uncertain answers do not decide)."""
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


def _rows(evidence: Evidence, rows: npt.NDArray[np.int64] | slice) -> Evidence:
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
