"""The tables that may cross a border between rooms: one `Contract` per table.

A contract knows its columns, key, value sets and ranges. `to_arrow` turns a frame into a checked Arrow
table that carries `contract=<table>/<version>`; `check` verifies one that was read. Both collect every
fault in one pass. Extra columns pass through untouched: the named ones are fixed, others are welcome.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import ContractViolation, DropReason, RejectReason

CONTRACT_KEY = b"contract"
VOCABULARY_KEY = b"vocabulary_sha256"
CONCEPT_IDS_KEY = b"concept_ids"
CLASS_NAMES_KEY = b"class_names"


class State(StrEnum):
    """What a witness said of one concept in one image. Absent is not unknown: these never collapse."""

    PRESENT = "present"
    ABSENT = "absent"
    UNCERTAIN = "uncertain"
    NOT_ASSESSED = "not_assessed"


class Witness(StrEnum):
    """Who can say something about a concept in an image."""

    VLM = "vlm"
    ALIGNMENT = "alignment"
    EXPERT = "expert"
    GIVEN = "given"


class ProbabilitySource(StrEnum):
    """How the probability of a judgement came about. Numbers of different sources are not on one scale."""

    STATED = "stated"
    """The model wrote the number down."""
    SAMPLES = "samples"
    """Share of several sampled answers."""
    LOGPROBS = "logprobs"
    """Yes against no among the log-probabilities of the answer's token."""
    MEASURED = "measured"
    """Distance of a measured quantity to its cut (embedded model)."""
    EXCLUDED = "excluded"
    """Left over by the stated probability of another value of the same exclusive group."""


class Split(StrEnum):
    """Parts of a data set."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


class ConceptStatus(StrEnum):
    """Whether a proposed concept is in the vocabulary."""

    KEPT = "kept"
    DROPPED = "dropped"


class ConceptOrigin(StrEnum):
    """Who named a concept."""

    VLM = "vlm"
    USER = "user"
    EMBEDDED = "embedded"
    GIVEN = "given"


@dataclass(frozen=True)
class Column:
    """One column: Arrow type, whether it may be null, and which values are allowed."""

    name: str
    type: pa.DataType
    nullable: bool = False
    values: frozenset[str] | None = None
    """Allowed strings, or None for any."""
    low: float | None = None
    high: float | None = None

    def faults(self, column: pa.ChunkedArray) -> list[str]:
        """What is wrong with the values of this column, as sentences."""
        found = []
        if not self.nullable and column.null_count:
            found.append(f"column {self.name!r}: expected a value in every row, {column.null_count} are null")
        if self.values is not None:
            found += self._value_faults(column)
        if self.low is not None and self.high is not None:
            found += self._range_faults(column)
        return found

    def _value_faults(self, column: pa.ChunkedArray) -> list[str]:
        allowed = sorted(self.values or ())
        odd = [v for v in pc.unique(column).to_pylist() if v is not None and v not in allowed]
        return [f"column {self.name!r}: expected one of {{{', '.join(allowed)}}}, got {odd[0]!r}"] if odd else []

    def _range_faults(self, column: pa.ChunkedArray) -> list[str]:
        inside = pc.and_(pc.greater_equal(column, self.low), pc.less_equal(column, self.high))
        # NaN compares false with everything, so it counts as outside; null stays null and is dropped here.
        n_outside = len(column) - column.null_count - (pc.sum(inside).as_py() or 0)
        return (
            [f"column {self.name!r}: expected numbers in [{self.low}, {self.high}], {n_outside} are not"]
            if n_outside
            else []
        )


@dataclass(frozen=True)
class Contract:
    """Name, version, columns and key of one table."""

    name: str
    version: int
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    by_name: Mapping[str, Column] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {c.name: c for c in self.columns})

    @property
    def tag(self) -> str:
        """What the file's schema metadata carries under `contract`."""
        return f"{self.name}/{self.version}"

    @property
    def column_names(self) -> list[str]:
        """The fixed column names in order."""
        return [c.name for c in self.columns]

    def empty(self) -> pd.DataFrame:
        """A frame with this contract's columns and no row."""
        arrays = [pa.array([], c.type) for c in self.columns]
        return to_pandas(pa.table(arrays, names=self.column_names))

    def to_arrow(
        self, data: pd.DataFrame | pa.Table, where: str, metadata: Mapping[bytes, bytes] | None = None
    ) -> pa.Table:
        """The data as an Arrow table with exactly the contract's types; raises `ContractViolation`.

        Nullable columns that are absent are added as nulls; extra columns keep their inferred type.
        """
        table = data if isinstance(data, pa.Table) else pa.Table.from_pandas(data, preserve_index=False)
        arrays: list[pa.ChunkedArray | pa.Array] = []
        faults: list[str] = []
        for column in self.columns:
            try:
                arrays.append(_cast(table, column))
            except (KeyError, pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
                faults.append(f"column {column.name!r}: expected {column.type}, got {_shown(error)}")
        if faults:
            raise ContractViolation(where, faults)
        extra = [name for name in table.column_names if name not in self.by_name]
        result = pa.table(
            arrays + [table.column(name) for name in extra], names=self.column_names + extra
        ).replace_schema_metadata({CONTRACT_KEY: self.tag.encode(), **(metadata or {})})
        self._check_values(result, where)
        return result

    def check(self, table: pa.Table, where: str, *, columns: Iterable[str] | None = None) -> None:
        """Raise `ContractViolation` unless `table` (as read from `where`) keeps this contract.

        With `columns`, only these were read, so only these are checked, and the key only if it is among them.
        """
        self.check_tag(table.schema, where)
        wanted = set(self.column_names if columns is None else columns) & set(self.column_names)
        faults = []
        for column in self.columns:
            if column.name not in wanted:
                continue
            if column.name not in table.column_names:
                faults.append(f"column {column.name!r} is missing; expected {column.type}")
            elif not _same_type(table.schema.field(column.name).type, column.type):
                faults.append(
                    f"column {column.name!r}: expected {column.type}, found {table.schema.field(column.name).type}"
                )
        if faults:
            raise ContractViolation(where, faults)
        self._check_values(table, where)

    def check_tag(self, schema: pa.Schema, where: str) -> None:
        """Raise `ContractViolation` unless the schema carries this contract and version."""
        found = (schema.metadata or {}).get(CONTRACT_KEY, b"none").decode(errors="replace")
        if found != self.tag:
            raise ContractViolation(
                where,
                [f"contract: expected {self.tag}, found {found}"],
                remedy="The file is from another version or another program; make it again with this one.",
            )

    def _check_values(self, table: pa.Table, where: str) -> None:
        faults = [
            fault
            for column in self.columns
            if column.name in table.column_names
            for fault in column.faults(table.column(column.name))
        ]
        if self.key and all(name in table.column_names for name in self.key):
            faults += _key_faults(table, self.key)
        if faults:
            raise ContractViolation(where, faults)


def to_pandas(table: pa.Table) -> pd.DataFrame:
    """Arrow to pandas with nulls that stay nulls: nullable booleans and integers do not turn into objects."""
    nullable = {pa.bool_(): pd.BooleanDtype(), pa.int64(): pd.Int64Dtype(), pa.int32(): pd.Int32Dtype()}

    def dtype(arrow_type: pa.DataType) -> object:
        return nullable.get(arrow_type)

    with_nulls = {name for name in table.column_names if table.column(name).null_count}
    keep = table.select([n for n in table.column_names if n in with_nulls])
    frame = table.to_pandas()
    if keep.num_columns:
        frame[keep.column_names] = keep.to_pandas(types_mapper=dtype)
    return frame


def _cast(table: pa.Table, column: Column) -> pa.ChunkedArray | pa.Array:
    if column.name not in table.column_names:
        if column.nullable:
            return pa.nulls(table.num_rows, column.type)
        raise KeyError("nothing (the column is missing)")
    values = table.column(column.name)
    if _same_type(values.type, column.type):
        return values
    if values.null_count == len(values):
        # A column without any value has whatever type pandas happened to give it.
        return pa.nulls(len(values), column.type)
    return values.cast(column.type)


def _same_type(found: pa.DataType, expected: pa.DataType) -> bool:
    """Types are equal, apart from the width of string offsets, which is no difference of meaning."""
    if pa.types.is_string(expected):
        return pa.types.is_string(found) or pa.types.is_large_string(found)
    if pa.types.is_list(expected) and (pa.types.is_list(found) or pa.types.is_large_list(found)):
        return bool(found.value_type == expected.value_type)
    if pa.types.is_fixed_size_list(expected):
        return found.equals(pa.list_(expected.value_type, expected.list_size))
    return bool(found == expected)


def _key_faults(table: pa.Table, key: tuple[str, ...]) -> list[str]:
    counts = table.select(list(key)).group_by(list(key)).aggregate([([], "count_all")])
    repeated = counts.filter(pc.greater(counts.column("count_all"), 1))
    if not repeated.num_rows:
        return []
    example = ", ".join(f"{name}={repeated.column(name)[0].as_py()!r}" for name in key)
    return [f"key ({', '.join(key)}): expected unique rows, {repeated.num_rows} keys repeat, such as {example}"]


def _shown(error: Exception) -> str:
    return str(error.args[0] if error.args else error).splitlines()[0][:200]


def _text(name: str, *, nullable: bool = False, values: Iterable[str] | None = None) -> Column:
    return Column(name, pa.string(), nullable, None if values is None else frozenset(values))


def _probability(name: str, *, nullable: bool = False) -> Column:
    return Column(name, pa.float64(), nullable, low=0.0, high=1.0)


IMAGES = Contract(
    "images",
    1,
    (
        _text("image_id"),
        _text("path"),
        _text("label", nullable=True),
        _text("split", nullable=True, values=Split),
        _text("group_id", nullable=True),
        _text("modality"),
        Column("width_px", pa.int64(), nullable=True),
        Column("height_px", pa.int64(), nullable=True),
        _text("format", nullable=True),
        _text("near_duplicate_of", nullable=True),
        _text("rejected", nullable=True, values=RejectReason),
        _text("detail", nullable=True),
        Column("frame", pa.int64(), nullable=True),
    ),
    # Two copies of one file have one image_id: the second row stands with its path, rejected.
    key=("image_id", "path"),
)

CONCEPTS = Contract(
    "concepts",
    2,
    (
        _text("concept_id"),
        _text("name"),
        _text("definition"),
        _text("group", nullable=True),
        Column("proposed_for", pa.list_(pa.string())),
        _text("origin", values=ConceptOrigin),
        _text("status", values=ConceptStatus),
        _text("reason", nullable=True, values=DropReason),
        _text("nearest", nullable=True),
        Column("similarity", pa.float64(), nullable=True),
        Column("position", pa.int64(), nullable=True),
        Column("synonyms", pa.list_(pa.string()), nullable=True),
        _text("contrast", nullable=True),
        # Which questions and wordings it came from, for people.
        Column("provenance", pa.list_(pa.string()), nullable=True),
    ),
    key=("concept_id",),
)

JUDGEMENTS = Contract(
    "judgements",
    2,
    (
        _text("image_id"),
        _text("concept_id"),
        _text("witness", values=Witness),
        _text("witness_model"),
        _text("prompt_sha256", nullable=True),
        _text("state", values=State),
        _probability("probability", nullable=True),
        _text("evidence", nullable=True),
        _text("request_id", nullable=True),
        Column("created_at", pa.timestamp("us", tz="UTC")),
        _text("supersedes", nullable=True),
        _text("probability_source", nullable=True, values=ProbabilitySource),
    ),
    key=(),
)

ALIGNMENT = Contract(
    "alignment",
    2,
    (
        _text("image_id"),
        _text("concept_id"),
        Column("similarity", pa.float64()),
        Column("null_similarity", pa.float64()),
        _probability("probability", nullable=True),
        # Share of the concept's text in a softmax with its reference prompts; null where heads were fitted.
        _probability("contrast", nullable=True),
        Column("grid_h", pa.int64()),
        Column("grid_w", pa.int64()),
        Column("heatmap", pa.list_(pa.float16())),
    ),
    key=("image_id", "concept_id"),
)

LABELS = Contract(
    "labels",
    1,
    (
        _text("image_id"),
        _text("concept_id"),
        Column("present", pa.bool_(), nullable=True),
        _probability("probability"),
        _text("decided_by"),
        Column("disagreement", pa.float64(), low=0.0, high=1.0),
    ),
    key=("image_id", "concept_id"),
)


def dataset_contract(n_concepts: int) -> Contract:
    """The data set's contract for a vocabulary of `n_concepts`."""
    return Contract(
        "dataset",
        1,
        (
            _text("image_id"),
            _text("path"),
            _text("label"),
            _text("split", values=Split),
            _text("group_id", nullable=True),
            Column("concepts", pa.list_(pa.float32(), n_concepts)),
            Column("mask", pa.list_(pa.bool_(), n_concepts)),
        ),
        key=("image_id",),
    )


def vocabulary_of(concepts: pd.DataFrame) -> Vocabulary:
    """The kept concepts of a `concepts` table, ordered by `position`."""
    kept = concepts[concepts["status"] == ConceptStatus.KEPT].sort_values("position", kind="stable")
    return Vocabulary.of(_concept(row) for row in kept.to_dict("records"))


def _concept(row: Mapping[Hashable, Any]) -> Concept:
    return Concept(
        row["concept_id"],
        row["name"],
        row["definition"],
        None if pd.isna(row["group"]) else row["group"],
        # A null list is None or NaN, depending on its neighbours; only lists have a length.
        tuple(row["synonyms"]) if hasattr(row.get("synonyms"), "__len__") else (),
        "" if pd.isna(row.get("contrast")) else row["contrast"],
    )
