"""The table of predictions: its columns, and how finished parts become one Parquet and one CSV file."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_contracts.files import write_with
from data_contracts.spreadsheet import harmless

DETAILS = ("path", "image_id", "class", "probability", "rejected", "rule", "rule_holds", "maps")
"""Columns that are no probability of a class or concept. `rejected`: why there is no class, or not to be relied on."""


PREDICTIONS, LEFT_OUT = "predictions", "left_out"


def concept_column(concept_id: str) -> str:
    """Column of a concept's probability: its id, unless a detail has that name."""
    return f"concept {concept_id}" if concept_id in DETAILS else concept_id


def part_schema(class_names: Sequence[str], concept_ids: Sequence[str]) -> pa.Schema:
    """Columns of every part, in order: the details, one probability a class, one a concept."""
    types = {"probability": pa.float32(), "rule_holds": pa.bool_()}
    details = [pa.field(name, types.get(name, pa.string())) for name in DETAILS]
    classes = [pa.field(f"probability {name}", pa.float32()) for name in class_names]
    return pa.schema([*details, *classes, *(pa.field(concept_column(c), pa.float32()) for c in concept_ids)])


def write_joined(out: Path, parts: Sequence[Path]) -> None:
    """Write `predictions.parquet` and `.csv`, and `left_out.csv`, from the parts, one of them in memory at a time."""
    write_with(out / f"{PREDICTIONS}.parquet", lambda file: _as_parquet(file, parts))
    write_with(out / f"{PREDICTIONS}.csv", lambda file: _as_csv(file, parts, _predicted))
    write_with(out / f"{LEFT_OUT}.csv", lambda file: _as_csv(file, parts, _left_out))


def _predicted(table: pa.Table) -> pa.Table:
    return table.filter(pc.is_valid(table["class"]))


def _left_out(table: pa.Table) -> pa.Table:
    return table.filter(pc.is_null(table["class"])).select(["path", "rejected"]).rename_columns(["path", "reason"])


def _as_parquet(file: Path, parts: Sequence[Path]) -> None:
    with pq.ParquetWriter(file, pq.read_schema(parts[0]), compression="zstd") as writer:
        for part in parts:
            writer.write_table(_predicted(pq.read_table(part)))


def _as_csv(file: Path, parts: Sequence[Path], chosen: Callable[[pa.Table], pa.Table]) -> None:
    with file.open("w", encoding="utf-8-sig", newline="") as stream:
        for number, part in enumerate(parts):
            readable = _readable(chosen(pq.read_table(part)))
            # Quoted text, since a path may hold a line end.
            readable.to_csv(stream, index=False, header=number == 0, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)


def _readable(table: pa.Table) -> pd.DataFrame:
    """Probabilities with four digits, as a person reads them; text that no spreadsheet takes for a formula."""
    frame = table.to_pandas()
    numbers = {f.name: frame[f.name].astype("float64").round(4) for f in table.schema if pa.types.is_floating(f.type)}
    texts = {f.name: frame[f.name].map(_shielded) for f in table.schema if pa.types.is_string(f.type)}
    return frame.assign(**numbers, **texts)


def _shielded(value: object) -> object:
    return harmless(value) if isinstance(value, str) else value
