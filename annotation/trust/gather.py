"""What the tables of a run say of some images, as arrays: the evidence that witnesses are fused from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from annotation.trust.cuts import Cuts, threshold_votes
from annotation.trust.label_model import Evidence
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
from data_contracts.errors import ConfigurationError
from data_contracts.tables import State, Witness

Voter = tuple[str, str]
"""(witness, its model)."""
BY_THRESHOLD: Voter = (str(Witness.ALIGNMENT), "threshold")
"""Alignment as a voter, where it votes by its cuts instead of contributing its score."""


@dataclass(frozen=True)
class Gathered:
    """What is said of N images and K concepts."""

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

    def rows(self, rows: slice) -> Gathered:
        """The same of some images."""
        cells = (array[rows] for array in (self.by_expert, self.by_given, self.unsettled, self.opposed))
        score, value, weight, decided = self.evidence
        part = Evidence(score[rows], value[:, rows], weight[:, rows], decided[rows])
        return Gathered(self.image_ids[rows], part, *cells)


def voters_of(judgements: Iterable[pd.DataFrame], cuts: Cuts | None) -> tuple[Voter, ...]:
    """The witnesses that vote in these ledgers, by name, so that no order of reading changes it."""
    names: set[Voter] = set()
    for part in judgements:
        rows = part.loc[part["witness"] == Witness.VLM, "witness_model"]
        names |= {(str(Witness.VLM), str(model)) for model in pd.unique(rows)}
    return (*sorted(names), *([BY_THRESHOLD] if cuts is not None else []))


def gather(
    judgements: pd.DataFrame,
    alignment: pd.DataFrame | pa.Table | None,
    vocabulary: Vocabulary,
    voters: tuple[Voter, ...],
    cuts: Cuts | None = None,
) -> Gathered:
    """What the tables say of their images, in order of appearance, alignment's first.

    Args:
        judgements: The ledger; the last answer of each witness and model stands.
        alignment: ALIGNMENT columns, or None.
        vocabulary: The concepts and their order.
        voters: The witnesses of the evidence's first axis.
        cuts: Where alignment votes by its cuts instead of contributing its score.

    Raises:
        ConfigurationError: A witness speaks that is not among the voters.
    """
    scores = alignment_scores(alignment)
    image_ids, judged, coded = _coded(judgements, scores)
    standing = latest(judged)
    rows: Any = np.arange(len(image_ids))
    by_witness = votes_by_witness(standing, rows, vocabulary)
    said = {name: votes for name, votes in by_witness.items() if name[0] == Witness.VLM}
    score = score_matrix(coded, rows, vocabulary)
    if cuts is not None:
        said[BY_THRESHOLD] = threshold_votes(scores, cuts, image_ids, vocabulary)
        score = np.full_like(score, np.nan)
    _require_known(said, voters)
    silent = Votes(np.full(score.shape, 0.5, np.float32), np.zeros(score.shape, np.float32))
    expert, given = _together(by_witness, Witness.EXPERT, silent), _together(by_witness, Witness.GIVEN, silent)
    opposed = (expert.weight > 0) & (expert.value == 0.5)
    unsure = _expert_uncertain(standing, rows, vocabulary) & (expert.weight == 0)
    evidence = _evidence(score, [said.get(name, silent) for name in voters], expert, given)
    return Gathered(image_ids, evidence, expert.weight > 0, given.weight > 0, opposed | unsure, opposed)


def _require_known(said: dict[Voter, Votes], voters: tuple[Voter, ...]) -> None:
    if strangers := sorted(set(said) - set(voters)):
        raise ConfigurationError(
            f"fusion: expected the witnesses {list(voters)}, got {strangers} too; these images got no label.",
            remedy="Learn the reliabilities from images on which every witness spoke.",
        )


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


def _together(by_witness: dict[Voter, Votes], witness: Witness, silent: Votes) -> Votes:
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
