"""Cells on which witnesses contradict each other, those first whose answer would tell most."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from scipy.special import entr

from annotation.votes import ImageIds, alignment_scores, latest, matrix, places
from data_contracts.concepts import Vocabulary
from data_contracts.tables import State, Witness

DISAGREEMENT_COLUMNS = ["image_id", "concept_id", "probability", "disagreement", "information", "decided_by"]
"""The columns before those of the witnesses."""


def disagreements(
    labels: pd.DataFrame,
    judgements: pd.DataFrame,
    alignment: pd.DataFrame | pa.Table | None,
    vocabulary: Vocabulary,
    *,
    at_least: float = 0.5,
) -> pd.DataFrame:
    """Every cell on which two witnesses, or two experts, say the opposite, most informative first.

    Columns: `DISAGREEMENT_COLUMNS`, then one text column for each witness: its state, with the probability that it
    stated, empty where it was silent. `information` is what an expert's answer can be expected to tell: the entropy
    of the fused probability, in bits, times how far the witnesses are apart. It is 1 where experts oppose each other,
    and 0 where a person settled the cell: then it is known who was wrong.

    Args:
        labels: From `fuse`.
        judgements: The ledger.
        alignment: ALIGNMENT columns, or None; its probability is an answer like another.
        vocabulary: The concepts.
        at_least: Cells whose witnesses' probabilities, each reckoned with its reliability, are so far apart are listed
            too, though nobody said the opposite.
    """
    standing, scores = latest(judgements), alignment_scores(alignment)
    image_ids = np.asarray(pd.unique(labels["image_id"]), object)
    row, column = places(labels, image_ids, vocabulary)
    opposed, by_experts = _opposed(standing, scores, image_ids, vocabulary)
    listed = opposed[row, column] | (labels["disagreement"].to_numpy(np.float64) >= at_least)
    entropy = _entropy_bits(labels["probability"].to_numpy(np.float64))
    information = np.where(by_experts[row, column], 1.0, entropy * labels["disagreement"].to_numpy(np.float64))
    found = labels.assign(information=information)[listed]
    found = found.sort_values("information", ascending=False, kind="stable", ignore_index=True)
    return found[DISAGREEMENT_COLUMNS].join(_said(found, standing, scores))


def most_informative(parts: Iterable[pd.DataFrame], n_rows: int) -> tuple[pd.DataFrame, int]:
    """The `n_rows` most informative disagreements of a stream of shards, and how many there are in all."""
    kept, total = pd.DataFrame(columns=DISAGREEMENT_COLUMNS), 0
    for part in parts:
        total += len(part)
        both = pd.concat([frame for frame in (kept, part) if len(frame)] or [part], ignore_index=True)
        kept = both.sort_values("information", ascending=False, kind="stable", ignore_index=True).head(n_rows)
    texts = [name for name in kept if name not in DISAGREEMENT_COLUMNS]
    return kept.fillna(dict.fromkeys(texts, "")), total


def _opposed(
    standing: pd.DataFrame, scores: pd.DataFrame, image_ids: ImageIds, vocabulary: Vocabulary
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(N, K) True where witnesses said the opposite, and where experts did."""
    by_expert = standing["witness"] == Witness.EXPERT
    present, absent = ((standing["state"] == state) for state in (State.PRESENT, State.ABSENT))
    yes, no = (_cells(standing[said], image_ids, vocabulary) for said in (present, absent))
    probability = matrix(scores, "probability", image_ids, vocabulary)
    yes, no = yes | (probability > 0.5), no | (probability < 0.5)
    experts = [_cells(standing[by_expert & said], image_ids, vocabulary) for said in (present, absent)]
    return yes & no, experts[0] & experts[1]


def _cells(rows: pd.DataFrame, image_ids: ImageIds, vocabulary: Vocabulary) -> npt.NDArray[np.bool_]:
    result = np.zeros((len(image_ids), len(vocabulary)), bool)
    row, column = places(rows, image_ids, vocabulary)
    known = (row >= 0) & (column >= 0)
    result[row[known], column[known]] = True
    return result


def _said(cells: pd.DataFrame, standing: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """What each witness said of the cells, as text, in their order."""
    keys = pd.MultiIndex.from_frame(cells[["image_id", "concept_id"]].astype("object"))
    here = standing[standing["image_id"].isin(cells["image_id"])]
    here = here[here["state"] != State.NOT_ASSESSED]
    columns = {}
    for (witness, model), rows in here.groupby(["witness", "witness_model"], sort=True, observed=True):
        text = rows["state"].astype("object") + _in_words(rows["probability"])
        columns[f"{witness} {model}".strip()] = _aligned(rows, text, keys)
    own = scores[scores["image_id"].isin(cells["image_id"])]
    if len(own):
        known = own["probability"].notna()
        state = np.where(own["probability"] > 0.5, State.PRESENT.value, State.ABSENT.value)
        bare = "similarity " + own["similarity"].map("{:.3f}".format)
        text = pd.Series(state, own.index).astype("object") + _in_words(own["probability"])
        columns[str(Witness.ALIGNMENT)] = _aligned(own, text.where(known, bare), keys)
    return pd.DataFrame(columns, index=cells.index, dtype="str")


def _aligned(rows: pd.DataFrame, text: pd.Series, keys: pd.MultiIndex) -> npt.NDArray[np.object_]:
    index = pd.MultiIndex.from_frame(rows[["image_id", "concept_id"]].astype("object"))
    return pd.Series(text.to_numpy(object), index).reindex(keys).fillna("").to_numpy(object)


def _in_words(probability: pd.Series) -> pd.Series:
    """` 0.90`, or nothing where no probability was stated."""
    stated = pd.to_numeric(probability).astype("float64")
    return stated.map(" {:.2f}".format).where(stated.notna(), "")


def _entropy_bits(probability: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray((entr(probability) + entr(1 - probability)) / np.log(2), np.float64)
