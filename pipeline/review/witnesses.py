"""Where in the ledger and the alignment each image stands, and which words its evidence holds.

Read after the page opened, a few parts at a time: a run of a million images has forty million judgements.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from data_contracts.store import RunFolder
from data_contracts.tables import Witness
from pipeline.review.experts import part_names

_BYTES_AT_ONCE = 48 * 2**20
"""Parts are read together up to this size: few enough for the memory, enough for words to lie close together."""
_COLUMNS = ["concept_id", "witness", "witness_model", "state", "probability", "evidence", "created_at", "request_id"]


def read_rest(connection: duckdb.DuckDBPyConnection, run: RunFolder) -> Iterator[float]:
    """Index what is not indexed yet, a batch at each step; gives the share that is done."""
    read = {name for (name,) in connection.execute("SELECT name FROM read_parts").fetchall()}
    parts = [run.judgements_dir / name for name in sorted(part_names(run) - read)]
    maps = _changed_maps(connection, run)
    total, done = max(1, len(parts) + len(maps)), 0
    for take, paths in ((_take_maps, maps), (_take_judgements, parts)):
        for batch in _batches(paths):
            take(connection, batch)
            done += len(batch)
            yield done / total
    yield 1.0


def _batches(paths: list[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    n_bytes = 0
    for path in paths:
        batch.append(path)
        n_bytes += path.stat().st_size
        if n_bytes >= _BYTES_AT_ONCE:
            yield batch
            batch, n_bytes = list[Path](), 0
    if batch:
        yield batch


def _take_judgements(connection: duckdb.DuckDBPyConnection, parts: list[Path]) -> None:
    rows = (
        "FROM read_parquet($paths, filename = true, hive_partitioning = false) j JOIN images i USING (image_id) "
        "WHERE j.witness <> $expert"
    )
    parameters = {"paths": [str(path) for path in parts], "expert": Witness.EXPERT.value}
    connection.execute("BEGIN")
    try:
        connection.execute(
            f"INSERT INTO places SELECT DISTINCT i.position, parse_filename(j.filename) AS part {rows} ORDER BY ALL",
            parameters,
        )
        connection.execute(
            "INSERT INTO mentions "
            "SELECT DISTINCT unnest(regexp_extract_all(lower(j.evidence), '\\pL{2,}')) AS word, "
            f"i.position {rows} AND j.evidence IS NOT NULL ORDER BY ALL",
            parameters,
        )
        connection.execute("INSERT INTO read_parts SELECT unnest(?)", [[path.name for path in parts]])
        connection.execute("COMMIT")
    except duckdb.Error:
        connection.execute("ROLLBACK")
        raise


def _changed_maps(connection: duckdb.DuckDBPyConnection, run: RunFolder) -> list[Path]:
    """Alignment parts to read; when any known one changed, all of them again: they are replaced together."""
    known: dict[str, int] = dict(connection.execute("SELECT name, mtime_ns FROM map_parts").fetchall())
    now = {path.name: path.stat().st_mtime_ns for path in run.alignment_parts()}
    if any(now.get(name) != mtime for name, mtime in known.items()):
        connection.execute("DELETE FROM map_parts; DELETE FROM map_places")
        known.clear()
    return [run.alignment_dir / name for name in now if name not in known]


def _take_maps(connection: duckdb.DuckDBPyConnection, parts: list[Path]) -> None:
    connection.execute(
        "INSERT INTO map_places SELECT DISTINCT i.position, parse_filename(j.filename) FROM "
        "read_parquet(?, filename = true, hive_partitioning = false) j JOIN images i USING (image_id) ORDER BY ALL",
        [[str(path) for path in parts]],
    )
    names, times = [path.name for path in parts], [path.stat().st_mtime_ns for path in parts]
    connection.execute("INSERT INTO map_parts SELECT unnest(?), unnest(?)", [names, times])


def said_by_witnesses(
    connection: duckdb.DuckDBPyConnection, run: RunFolder, position: int, image_id: str
) -> list[dict[str, Any]]:
    """All that the machine's witnesses (and given labels) said of an image, oldest first."""
    found = connection.execute("SELECT part FROM places WHERE position = ? ORDER BY part", [position]).fetchall()
    rows: list[dict[str, Any]] = []
    for (name,) in found:
        table = pq.read_table(
            run.judgements_dir / name,
            columns=_COLUMNS,
            filters=[("image_id", "==", image_id), ("witness", "!=", Witness.EXPERT.value)],
            partitioning=None,
        )
        rows += table.to_pylist()
    return sorted(rows, key=lambda row: row["created_at"])


class Map(NamedTuple):
    """What the aligner found of one concept in one image."""

    grid: npt.NDArray[np.float32] | None
    """(h, w), higher where the concept is."""
    probability: float | None


def maps_of(connection: duckdb.DuckDBPyConnection, run: RunFolder, position: int, image_id: str) -> dict[str, Map]:
    """Concept id → the aligner's map; empty where the image was not aligned."""
    found: dict[str, Map] = {}
    for (name,) in connection.execute("SELECT part FROM map_places WHERE position = ?", [position]).fetchall():
        path = run.alignment_dir / name
        if not path.is_file():
            continue
        columns = ["concept_id", "probability", "grid_h", "grid_w", "heatmap"]
        table = pq.read_table(path, columns=columns, filters=[("image_id", "==", image_id)], partitioning=None)
        for row in table.to_pylist():
            shape = (row["grid_h"], row["grid_w"])
            grid = np.asarray(row["heatmap"], np.float32).reshape(shape) if row["heatmap"] else None
            found[row["concept_id"]] = Map(grid, row["probability"])
    return found
