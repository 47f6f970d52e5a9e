"""Images to learn from, drawn from a stream of shards in one pass and little memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import pandas as pd
import pyarrow as pa

from annotation.votes import alignment_scores
from data_contracts.tables import Witness

Shard = tuple[pd.DataFrame, pd.DataFrame | pa.Table | None]
"""Ledger rows and alignment rows of some images: all that is said of an image is in one shard."""


def sample_shards(
    shards: Iterable[Shard], n_images: int, *, seed: int = 0, among: Collection[str] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Answers and scores of `n_images` images of a stream, those that people settled first.

    Half of the sample at most goes to images with an expert's or a given answer. The choice is by the hash of the
    image id, so that it does not depend on how the stream is cut, and a sample of a larger sample is the same.

    Args:
        shards: The stream; at least one shard.
        n_images: Images in the sample; all where there are no more.
        seed: Decides the hashes.
        among: Images to choose from; all if None.
    """
    kept: list[tuple[pd.DataFrame, pd.DataFrame]] = []
    rank: pd.Series = pd.Series(dtype="float64")
    allowed = None if among is None else pd.Index(list(among))
    for judgements, alignment in shards:
        part = (judgements, alignment_scores(alignment))
        if allowed is not None:
            part = _of_images(*part, allowed)
        rank = _best(pd.concat([rank, _ranks(*part, seed)]), n_images)
        kept = [_of_images(*one, rank.index) for one in [*kept, part]]
    if not kept:
        raise ValueError("sample_shards: expected at least one shard, got none")
    judgements, scores = (pd.concat([part[side] for part in kept], ignore_index=True) for side in (0, 1))
    return judgements, scores


def _ranks(judgements: pd.DataFrame, scores: pd.DataFrame, seed: int) -> pd.Series:
    """Image id → place in the queue for the sample: a hash in [0, 1), 1 less where a person settled a cell."""
    image_ids = pd.Index(pd.unique(pd.concat([scores["image_id"], judgements["image_id"]], ignore_index=True)))
    hashed = pd.util.hash_array(np.asarray(image_ids, object), hash_key=f"{seed:016d}"[:16]) / 2.0**64
    people = judgements["witness"].isin([Witness.EXPERT, Witness.GIVEN])
    return pd.Series(hashed - image_ids.isin(judgements.loc[people, "image_id"]), index=image_ids)


def _best(rank: pd.Series, n_images: int) -> pd.Series:
    """The images to keep: at most half of them settled ones, the rest in the order of their hash."""
    rank = rank[~rank.index.duplicated()]
    if len(rank) <= n_images:
        return rank
    settled = rank[rank < 0].nsmallest(n_images // 2)
    rest = rank.drop(settled.index)
    return pd.concat([settled, rest.iloc[np.argsort((rest % 1).to_numpy(), kind="stable")[: n_images - len(settled)]]])


def _of_images(
    judgements: pd.DataFrame, scores: pd.DataFrame, image_ids: pd.Index
) -> tuple[pd.DataFrame, pd.DataFrame]:
    return judgements[judgements["image_id"].isin(image_ids)], scores[scores["image_id"].isin(image_ids)]
