"""A run's ledger and alignment some images at a time, so that a large run need not fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from data_contracts.store import RunFolder
from data_contracts.tables import ALIGNMENT, JUDGEMENTS, Contract, to_pandas

_JUDGED = (
    *("image_id", "concept_id", "witness", "witness_model", "prompt_sha256", "state", "probability"),
    *("evidence", "created_at"),
)
_SCORED = ("image_id", "concept_id", "similarity", "probability")


class EvidenceShard(NamedTuple):
    """All that is said of some images."""

    image_ids: tuple[str, ...]
    judgements: pd.DataFrame
    """Ledger rows in the order of writing, without what only the journal needs."""
    alignment: pd.DataFrame
    """Alignment rows: similarity and probability."""


class EvidenceShards:
    """The shards of a run's images, in their order; may be gone through as often as needed.

    Parts are written a few hundred images at a time, so a shard reads only the parts its images are in; one part that
    holds everything (an imported sheet) is scanned once a shard, and no more of it kept than the shard's rows.
    """

    def __init__(
        self, run: RunFolder, image_ids: Sequence[str], concept_ids: Sequence[str], *, shard_size: int
    ) -> None:
        self._run = run
        self._image_ids = tuple(image_ids)
        self._concept_ids = list(concept_ids)
        self._shard_size = shard_size

    def __len__(self) -> int:
        """Number of shards; one even where there is no image."""
        return max(-(-len(self._image_ids) // self._shard_size), 1)

    def __iter__(self) -> Iterator[EvidenceShard]:
        """The shards; a single one is read once and kept."""
        if len(self) == 1:
            yield self._only
            return
        for number in range(len(self)):
            yield self._shard(number)

    @cached_property
    def _only(self) -> EvidenceShard:
        return self._shard(0)

    @cached_property
    def _parts(self) -> dict[Path, frozenset[int]]:
        """Which shards each part has rows of."""
        place = pd.Index(self._image_ids)
        found: dict[Path, frozenset[int]] = {}
        for contract, paths in self._tables():
            for path in paths:
                ids = self._run.read_part(path, contract, ["image_id"]).column("image_id").unique().to_pandas()
                rows = place.get_indexer(ids)
                found[path] = frozenset(np.unique(rows[rows >= 0] // self._shard_size).tolist())
        return found

    def _tables(self) -> list[tuple[Contract, list[Path]]]:
        return [(JUDGEMENTS, self._run.judgement_parts()), (ALIGNMENT, self._run.alignment_parts())]

    def _shard(self, number: int) -> EvidenceShard:
        start = number * self._shard_size
        image_ids = self._image_ids[start : start + self._shard_size]
        wanted = pa.array(image_ids, pa.string())
        (_, judged), (_, scored) = self._tables()
        ledger = self._rows(JUDGEMENTS, judged, _JUDGED, wanted, number)
        ledger = ledger.sort_values("created_at", kind="stable", ignore_index=True)
        return EvidenceShard(image_ids, ledger, self._rows(ALIGNMENT, scored, _SCORED, wanted, number))

    def _rows(
        self, contract: Contract, paths: list[Path], columns: Sequence[str], wanted: pa.Array, number: int
    ) -> pd.DataFrame:
        mine = [path for path in paths if number in self._parts[path]]
        parts = [self._run.read_part(path, contract, columns, wanted) for path in mine]
        if not parts:
            return contract.empty()[list(columns)]
        rows = to_pandas(pa.concat_tables(parts, promote_options="permissive"))
        return rows[rows["concept_id"].isin(self._concept_ids)].reset_index(drop=True)
