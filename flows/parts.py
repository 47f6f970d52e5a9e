"""What a run folder says of some of its images, read part by part: a large run need not fit in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from data_contracts.concepts import Vocabulary
from data_contracts.shards import EvidenceShard, EvidenceShards
from data_contracts.store import RunFolder
from data_contracts.tables import JUDGEMENTS, LABELS, to_pandas

_ROWS_AT_ONCE = 800_000


def evidence_of(run: RunFolder, image_ids: Collection[str], vocabulary: Vocabulary) -> EvidenceShard:
    """All that the ledger and the alignment say of these images and concepts."""
    (shard,) = EvidenceShards(run, list(image_ids), vocabulary.ids, shard_size=max(len(image_ids), 1))
    return shard


def judgements_with(run: RunFolder, evidence: str) -> pd.DataFrame:
    """image_id and concept_id of the ledger's rows that rest on this evidence."""
    columns = ["image_id", "concept_id"]
    parts = [
        part.filter(pc.fill_null(pc.equal(part.column("evidence"), evidence), False)).select(columns)
        for part in run.iterate_judgements([*columns, "evidence"])
    ]
    return to_pandas(pa.concat_tables(parts, promote_options="permissive")) if parts else JUDGEMENTS.empty()[columns]


def label_shards(run: RunFolder, columns: Sequence[str]) -> Callable[[], Iterator[pd.DataFrame]]:
    """Calls for the fused labels from their beginning, some rows at a time."""
    return lambda: (to_pandas(rows) for rows in run.iterate_rows(LABELS, columns, _ROWS_AT_ONCE))


def some_images(image_ids: Iterable[str], n_most: int) -> list[str]:
    """At most `n_most` of the images, by the hash of their ids: hardly any other when images are added."""
    every = list(image_ids)
    if len(every) <= n_most:
        return every
    return sorted(every, key=lambda image_id: hashlib.sha256(image_id.encode()).digest())[:n_most]
