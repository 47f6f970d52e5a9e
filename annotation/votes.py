"""Long tables as arrays: what each witness said of every image and concept, as evidence of graded weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from scipy.special import logit

from data_contracts.concepts import Vocabulary
from data_contracts.tables import State, Witness, to_pandas

ImageIds = Sequence[str] | npt.NDArray[np.object_]
"""The images of an (N, K) array, in order."""

UNCERTAIN_WEIGHT = 0.2
"""What an `uncertain` answer counts for beside a decided one, before its own indecision is taken off."""

_STATE_VALUE = {State.PRESENT: 1.0, State.ABSENT: 0.0, State.UNCERTAIN: 0.5}
_KEY = ["image_id", "concept_id", "witness", "witness_model"]


class Votes(NamedTuple):
    """One witness's answers; rows are images, columns the vocabulary's concepts."""

    value: npt.NDArray[np.float32]
    """(N, K) probability of presence that was stated: 1 or 0 for a plain answer, 0.5 where there is none."""
    weight: npt.NDArray[np.float32]
    """(N, K) from 0 (not assessed, or as undecided as can be) to 1 (decided)."""


def latest(judgements: pd.DataFrame) -> pd.DataFrame:
    """The rows that stand: the last answer of each witness and model about each image and concept.

    The ledger is append-only, so later rows supersede earlier ones.
    """
    return judgements.drop_duplicates(_KEY, keep="last")


def votes_of(rows: pd.DataFrame, image_ids: ImageIds, vocabulary: Vocabulary) -> Votes:
    """The votes in `rows` (standing answers, one per image and concept); other images and concepts are ignored."""
    shape = (len(image_ids), len(vocabulary))
    votes = Votes(np.full(shape, 0.5, np.float32), np.zeros(shape, np.float32))
    row, column = places(rows, image_ids, vocabulary)
    value = rows["state"].astype("object").map(_STATE_VALUE).to_numpy(np.float32)
    stated = pd.to_numeric(rows["probability"]).to_numpy(np.float32, na_value=np.nan)
    value = np.where(np.isnan(stated), value, _consistent(stated, value))
    uncertain = (rows["state"] == State.UNCERTAIN).to_numpy(bool)
    weight = np.where(uncertain, UNCERTAIN_WEIGHT * np.abs(2 * value - 1), 1.0)
    known = (row >= 0) & (column >= 0) & ~np.isnan(value)
    votes.value[row[known], column[known]] = value[known]
    votes.weight[row[known], column[known]] = weight[known]
    return votes


def votes_by_witness(
    judgements: pd.DataFrame, image_ids: ImageIds, vocabulary: Vocabulary
) -> dict[tuple[str, str], Votes]:
    """(witness, its model or person) → its votes, in the order in which they first spoke."""
    standing = latest(judgements)
    return {
        (str(witness), str(model)): votes_of(rows, image_ids, vocabulary)
        for (witness, model), rows in standing.groupby(["witness", "witness_model"], sort=False)
    }


def combined(votes: Sequence[Votes]) -> Votes:
    """The weighted mean of several witnesses' votes; its weight is that of the most decided one."""
    total = np.sum([v.weight for v in votes], axis=0)
    mean = np.sum([v.weight * v.value for v in votes], axis=0) / np.where(total > 0, total, 1)
    weight = np.max([v.weight for v in votes], axis=0)
    return Votes(np.where(total > 0, mean, 0.5).astype(np.float32), weight.astype(np.float32))


def training_votes(judgements: pd.DataFrame, image_ids: ImageIds, vocabulary: Vocabulary) -> Votes:
    """What an aligner may learn from: experts before given labels before the mean of all others.

    Its own earlier scores are left out.
    """
    by_witness = votes_by_witness(judgements, image_ids, vocabulary)
    ranks = (Witness.EXPERT, Witness.GIVEN, Witness.VLM)
    tiers = [[v for (witness, _), v in by_witness.items() if witness == rank] for rank in ranks]
    result = combined([_nothing(len(image_ids), len(vocabulary))])
    for tier in reversed([combined(t) for t in tiers if t]):
        said = tier.weight > 0
        result = Votes(np.where(said, tier.value, result.value), np.where(said, tier.weight, result.weight))
    return result


def matrix(frame: pd.DataFrame, column: str, image_ids: ImageIds, vocabulary: Vocabulary) -> npt.NDArray[np.float32]:
    """(N, K) values of one column of a long table; NaN where there is no row or no value."""
    result = np.full((len(image_ids), len(vocabulary)), np.nan, np.float32)
    row, place = places(frame, image_ids, vocabulary)
    known = (row >= 0) & (place >= 0)
    result[row[known], place[known]] = frame[column].to_numpy(np.float32, na_value=np.nan)[known]
    return result


def alignment_scores(table: pd.DataFrame | pa.Table | None) -> pd.DataFrame:
    """image_id, concept_id, similarity and probability of an ALIGNMENT table; no row for None."""
    columns = ["image_id", "concept_id", "similarity", "probability"]
    if table is None:
        return pd.DataFrame({name: pd.Series(dtype="str" if "id" in name else "float64") for name in columns})
    return to_pandas(table.select(columns)) if isinstance(table, pa.Table) else table[columns]


def score_matrix(scores: pd.DataFrame, image_ids: ImageIds, vocabulary: Vocabulary) -> npt.NDArray[np.float32]:
    """(N, K) alignment scores, NaN where missing: log-odds of `probability` where a concept has it, else similarity."""
    similarity = matrix(scores, "similarity", image_ids, vocabulary)
    probability = matrix(scores, "probability", image_ids, vocabulary)
    fitted = np.isfinite(probability).any(0)
    return np.where(fitted, logit(np.clip(probability, 1e-4, 1 - 1e-4)), similarity)


def places(
    frame: pd.DataFrame, image_ids: ImageIds, vocabulary: Vocabulary
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Row and column of each table row in an (N, K) array; -1 where the image or concept is not there."""
    rows = pd.Index(image_ids).get_indexer(frame["image_id"])
    return rows, pd.Index(vocabulary.ids).get_indexer(frame["concept_id"])


def _consistent(stated: npt.NDArray[np.float32], value: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The stated probability, kept on the side of 0.5 that the state names; NaN where nothing was assessed."""
    kept = np.where(value > 0.5, np.maximum(stated, 0.5), np.where(value < 0.5, np.minimum(stated, 0.5), stated))
    return np.where(np.isnan(value), np.nan, kept).astype(np.float32)


def _nothing(n_images: int, n_concepts: int) -> Votes:
    return Votes(np.full((n_images, n_concepts), 0.5, np.float32), np.zeros((n_images, n_concepts), np.float32))
