"""The page's private database, built once from the run's tables."""

from __future__ import annotations

from collections.abc import Callable

import duckdb
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from data_contracts.store import RunFolder
from data_contracts.tables import IMAGES, LABELS
from pipeline.review.wide import Cells

SHOWN = ("image_id", "path", "label", "split", "group_id", "modality", "width_px", "height_px")
"""What the page says of an image."""
_BATCH_ROWS = 400_000
_CHUNK_IMAGES = 200_000

Advance = Callable[[str, float], None]
"""Progress: what is being read, and the share of it that is done."""


def build(connection: duckdb.DuckDBPyConnection, run: RunFolder, concept_ids: tuple[str, ...], tell: Advance) -> None:
    """Fill an empty database with the run's images and labels, and empty tables for what people and witnesses say.

    Memory: about 4 bytes a label and 500 an image while it builds, and what the database may take.
    """
    images = _accepted(run, tell)
    cells = Cells.blank(images.num_rows, len(concept_ids))
    _read_labels(run, cells, images, concept_ids, tell)
    tell("writing", 0.0)
    _store(connection, images, cells)
    # What was read is in the database now: give the memory back before people look at pages for hours.
    del images, cells
    pa.default_memory_pool().release_unused()
    connection.execute(
        """
        CREATE TABLE said (seq BIGINT, position INTEGER, concept VARCHAR, reviewer VARCHAR, state VARCHAR,
                           request_id VARCHAR, supersedes VARCHAR, evidence VARCHAR, at_us BIGINT);
        CREATE TABLE contested (position INTEGER, concept VARCHAR);
        CREATE TABLE expert_parts (name VARCHAR);
        CREATE TABLE read_parts (name VARCHAR);
        CREATE TABLE places (position INTEGER, part VARCHAR);
        CREATE TABLE mentions (word VARCHAR, position INTEGER);
        CREATE TABLE map_parts (name VARCHAR, mtime_ns BIGINT);
        CREATE TABLE map_places (position INTEGER, part VARCHAR);
        """
    )


def hashes(image_ids: pd.Series) -> npt.NDArray[np.uint64]:
    """(N,) a 64-bit number an id; an id is looked up by it and then compared."""
    return pd.util.hash_array(image_ids.to_numpy(dtype=object), categorize=False)


def _accepted(run: RunFolder, tell: Advance) -> pa.Table:
    tell("images", 0.0)
    batches = list(run.iterate_rows(IMAGES, [*SHOWN, "rejected"], _BATCH_ROWS))
    images = pa.concat_tables(batches) if batches else IMAGES.to_arrow(IMAGES.empty(), "images")
    return images.filter(pc.is_null(images.column("rejected"))).drop_columns(["rejected"])


def _read_labels(run: RunFolder, cells: Cells, images: pa.Table, concept_ids: tuple[str, ...], tell: Advance) -> None:
    if not run.table_path(LABELS).is_file() or not concept_ids:
        return
    positions = pd.Index(images.column("image_id").to_pandas())
    expected, done = max(1, len(positions) * len(concept_ids)), 0
    columns = ["image_id", "concept_id", "present", "probability", "disagreement"]
    for batch in run.iterate_rows(LABELS, columns, _BATCH_ROWS):
        cells.fill(batch, positions, concept_ids)
        done += batch.num_rows
        tell("labels", min(1.0, done / expected))


def _store(connection: duckdb.DuckDBPyConnection, images: pa.Table, cells: Cells) -> None:
    """Write images and cells side by side, some at a time: copies of everything would not fit."""
    for first in range(0, max(1, images.num_rows), _CHUNK_IMAGES):
        last = min(first + _CHUNK_IMAGES, images.num_rows)
        described = images.slice(first, last - first)
        numbers = pa.array(np.arange(first, last, dtype=np.int32))
        described = described.append_column("position", numbers)
        described = described.append_column("id_hash", pa.array(hashes(described.column("image_id").to_pandas())))
        # Registered by name: DuckDB reads Arrow memory in place.
        connection.register("described", described)
        connection.register("given_cells", cells.of_images(first, last).table())
        connection.execute(
            f"""
            {"INSERT INTO images" if first else "CREATE TABLE images AS"}
            SELECT i.*, lower(i.path) AS path_lower, c.* FROM described i POSITIONAL JOIN given_cells c
            """
        )
        connection.unregister("described")
        connection.unregister("given_cells")
