"""`RunFolder`: the only code that knows the file names of a run. Reads are checked, writes are atomic."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_contracts.concepts import Vocabulary
from data_contracts.dataset import AlignedDataset
from data_contracts.errors import ConfigurationError, ContractViolation, InputRefused
from data_contracts.files import sha256_of_file, storage_error, write_text, write_with
from data_contracts.manifest import FileReceipt, RunManifest
from data_contracts.spreadsheet import csv_appender, read_csv, write_csv
from data_contracts.tables import (
    ALIGNMENT,
    CLASS_NAMES_KEY,
    CONCEPT_IDS_KEY,
    CONCEPTS,
    IMAGES,
    JUDGEMENTS,
    LABELS,
    VOCABULARY_KEY,
    Contract,
    dataset_contract,
    to_pandas,
    vocabulary_of,
)

T = TypeVar("T")


class RunFolder:
    """A run on disk. Opening one that does not exist yet is allowed; `exists` tells."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    # ---- places -------------------------------------------------------------------------------------

    @property
    def manifest_path(self) -> Path:
        """`run.json`."""
        return self.path / "run.json"

    @property
    def journal_dir(self) -> Path:
        """Folder of the VLM journal."""
        return self.path / "journal"

    @property
    def judgements_dir(self) -> Path:
        """Folder of the ledger's parts."""
        return self.path / "judgements"

    @property
    def alignment_dir(self) -> Path:
        """Folder of the alignment's parts."""
        return self.path / "alignment"

    @property
    def model_dir(self) -> Path:
        """Folder of the checkpoint, metrics and curves."""
        return self.path / "model"

    @property
    def models_dir(self) -> Path:
        """Folder of the models that are not in use: earlier ones, refused ones, and the one being trained."""
        return self.path / "models"

    @property
    def drift_dir(self) -> Path:
        """Folder of the baseline, the drift tests, and of what a person is asked and answered."""
        return self.path / "drift"

    @property
    def explanations_dir(self) -> Path:
        """Folder of rules and maps."""
        return self.path / "explanations"

    @property
    def cache_dir(self) -> Path:
        """Folder of what can be computed again: features of frozen towers."""
        return self.path / "cache"

    @property
    def report_path(self) -> Path:
        """`report.html`."""
        return self.path / "report.html"

    @property
    def audit_path(self) -> Path:
        """`audit.csv`."""
        return self.path / "audit.csv"

    @property
    def labels_csv_path(self) -> Path:
        """`labels.csv`, one row an image and one column a concept."""
        return self.path / "labels.csv"

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.manifest_path.is_file()

    # ---- manifest -----------------------------------------------------------------------------------

    def read_manifest(self) -> RunManifest:
        """The manifest; raises `InputRefused` where no run was begun."""
        if not self.exists:
            raise InputRefused(
                f"{self.path}: expected a run folder (with run.json), found none.",
                remedy="Begin one with `medmicn run SOURCE`, or name another with --run DIR.",
            )
        return RunManifest.from_json(self.manifest_path.read_text(encoding="utf-8"), str(self.manifest_path))

    def write_manifest(self, manifest: RunManifest) -> None:
        """Replace `run.json`."""
        write_text(self.manifest_path, manifest.model_dump_json(indent=2) + "\n")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run folder alone; raises `ConfigurationError` when another process works in it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise storage_error(self.path, error) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigurationError(
                    f"{self.path}: another medmicn process works in this run folder.",
                    remedy="Wait for it to end, or choose another folder with --run.",
                ) from error
            yield
        finally:
            os.close(handle)

    def receipts(self, paths: Iterable[Path]) -> dict[str, FileReceipt]:
        """Size and hash of these files, by path relative to the run folder."""
        return {
            path.relative_to(self.path).as_posix(): FileReceipt(
                size_bytes=path.stat().st_size, sha256=sha256_of_file(path)
            )
            for path in paths
        }

    def holds(self, outputs: dict[str, FileReceipt]) -> bool:
        """Whether every file is there with the size and hash of its receipt."""
        return all(
            (path := self.path / name).is_file()
            and path.stat().st_size == receipt.size_bytes
            and sha256_of_file(path) == receipt.sha256
            for name, receipt in outputs.items()
        )

    # ---- one-file tables ----------------------------------------------------------------------------

    def table_path(self, contract: Contract) -> Path:
        """Path of a one-file table."""
        return self.path / f"{contract.name}.parquet"

    def read_images(self) -> pd.DataFrame:
        """The images table."""
        return to_pandas(self._read(IMAGES))

    def write_images(self, images: pd.DataFrame) -> None:
        """Replace the images table."""
        self._write(IMAGES, images)

    def read_concepts(self) -> pd.DataFrame:
        """The concepts table, kept and dropped."""
        return to_pandas(self._read(CONCEPTS))

    def write_concepts(self, concepts: pd.DataFrame) -> None:
        """Replace the concepts table and its CSV mirror; ids of kept concepts must be unique."""
        concepts = to_pandas(CONCEPTS.to_arrow(concepts, str(self.table_path(CONCEPTS))))
        vocabulary_of(concepts)
        self._write(CONCEPTS, concepts)
        lists = ("proposed_for", "synonyms", "provenance")
        mirror = concepts.assign(**{name: concepts[name].map(_in_one_cell) for name in lists})
        write_csv(self.path / "concepts.csv", mirror)

    def vocabulary(self) -> Vocabulary:
        """The kept concepts in order."""
        return vocabulary_of(self.read_concepts())

    def read_labels(self) -> pd.DataFrame:
        """The fused labels, long."""
        return to_pandas(self._read(LABELS))

    def write_labels(self, labels: pd.DataFrame, wide: pd.DataFrame) -> None:
        """Replace the fused labels and their wide CSV mirror."""
        self._write(LABELS, labels)
        write_csv(self.labels_csv_path, wide)

    def write_label_shards(self, shards: Iterable[tuple[pd.DataFrame, pd.DataFrame]]) -> int:
        """Replace the fused labels and their wide CSV mirror, a shard of images at a time; returns the labels' number.

        Every shard is checked; that no image is in two of them is the caller's part.
        """
        path, n_labels = self.table_path(LABELS), 0
        schema = LABELS.to_arrow(LABELS.empty(), str(path)).schema

        def write_both(labels_file: Path, wide_file: Path) -> None:
            nonlocal n_labels
            append_wide = csv_appender(wide_file)
            with pq.ParquetWriter(labels_file, schema, compression="zstd") as writer:
                for labels, wide in shards:
                    writer.write_table(LABELS.to_arrow(labels, str(path)).select(schema.names).cast(schema))
                    append_wide(wide)
                    n_labels += len(labels)

        write_with(path, lambda one: write_with(self.labels_csv_path, lambda other: write_both(one, other)))
        return n_labels

    def read_dataset(self) -> AlignedDataset:
        """The aligned data set; raises `VocabularyMismatch` if it was made for other concepts."""
        path = self.path / "dataset.parquet"
        schema = _schema(path, "dataset")
        metadata = schema.metadata or {}
        vocabulary = self.vocabulary()
        contract = dataset_contract(len(vocabulary))
        contract.check_tag(schema, str(path))
        vocabulary.require(metadata.get(VOCABULARY_KEY, b"none").decode(), str(path))
        table = self._read(contract)
        return AlignedDataset(
            to_pandas(table.select(["image_id", "path", "label", "split", "group_id"])),
            _matrix(table.column("concepts"), np.dtype(np.float32), len(vocabulary)),
            _matrix(table.column("mask"), np.dtype(np.bool_), len(vocabulary)),
            vocabulary,
            tuple(json.loads(metadata[CLASS_NAMES_KEY])),
        )

    def write_dataset(self, dataset: AlignedDataset) -> None:
        """Replace the aligned data set."""
        n_concepts = len(dataset.vocabulary)
        table = pa.Table.from_pandas(dataset.frame, preserve_index=False)
        for name, matrix, element in (("concepts", dataset.concepts, pa.float32()), ("mask", dataset.mask, pa.bool_())):
            flat = pa.array(matrix.reshape(-1), element)
            table = table.append_column(name, pa.FixedSizeListArray.from_arrays(flat, n_concepts))
        metadata = {
            VOCABULARY_KEY: dataset.vocabulary.sha256.encode(),
            CONCEPT_IDS_KEY: json.dumps(dataset.vocabulary.ids).encode(),
            CLASS_NAMES_KEY: json.dumps(dataset.class_names).encode(),
        }
        self._write(dataset_contract(n_concepts), table, metadata)

    def iterate_rows(self, contract: Contract, columns: Sequence[str], batch_rows: int) -> Iterator[pa.Table]:
        """Some columns of a one-file table, a batch at a time, so that a large one need not fit in memory.

        Strings that repeat from row to row come as dictionaries. Values were checked on writing.
        """
        path = self.table_path(contract)
        contract.check_tag(_schema(path, contract.name), str(path))
        repeating = [c for c in ("image_id", "concept_id") if c in columns and c in contract.key and contract is LABELS]
        with pq.ParquetFile(path, read_dictionary=repeating) as file:
            for batch in file.iter_batches(batch_rows, columns=list(columns)):
                yield pa.Table.from_batches([batch])

    # ---- tables in parts ----------------------------------------------------------------------------

    def append_judgements(self, judgements: pd.DataFrame | pa.Table) -> Path | None:
        """Add rows to the ledger as one new part; nothing that stands there is touched. None for no rows."""
        if not len(judgements):
            return None
        number = len(list(self.judgements_dir.glob("part-*.parquet")))
        path = self.judgements_dir / f"part-{number:06d}-{uuid.uuid4().hex[:8]}.parquet"
        _write_table(path, JUDGEMENTS.to_arrow(judgements, str(path)))
        return path

    def judgement_parts(self) -> list[Path]:
        """Paths of the ledger's parts in the order of writing."""
        return sorted(self.judgements_dir.glob("part-*.parquet"))

    def read_part(
        self, path: Path, contract: Contract, columns: Sequence[str], image_ids: pa.Array | None = None
    ) -> pa.Table:
        """Some columns of one part of the ledger or the alignment; with `image_ids`, only the rows of these images."""
        return _read_table(path, contract, columns, image_ids)

    def iterate_judgements(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Some columns of the ledger part by part, in the order of writing, so that it need not fit in memory."""
        for path in sorted(self.judgements_dir.glob("part-*.parquet")):
            yield _read_table(path, JUDGEMENTS, columns)

    def read_judgements(self) -> pd.DataFrame:
        """The whole ledger in the order it was written; empty where nothing was judged yet."""
        paths = sorted(self.judgements_dir.glob("part-*.parquet"))
        if not paths:
            return JUDGEMENTS.empty()
        parts = [_read_table(path, JUDGEMENTS) for path in paths]
        ledger = to_pandas(pa.concat_tables(parts, promote_options="permissive"))
        return ledger.sort_values("created_at", kind="stable", ignore_index=True)

    def write_alignment(self, shards: Iterable[pa.Table]) -> int:
        """Replace the alignment by these shards, one part each; returns the number of rows.

        The old parts stay until all new ones are on the disk.
        """
        fresh = self.path / f".alignment-{uuid.uuid4().hex[:8]}"
        n_rows = 0
        try:
            for number, shard in enumerate(shards):
                path = fresh / f"part-{number:06d}.parquet"
                _write_table(path, ALIGNMENT.to_arrow(shard, str(path)))
                n_rows += shard.num_rows
            self._swap_in(fresh)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return n_rows

    def _swap_in(self, fresh: Path) -> None:
        old = self.path / f".alignment-old-{uuid.uuid4().hex[:8]}"
        try:
            fresh.mkdir(parents=True, exist_ok=True)
            if self.alignment_dir.exists():
                self.alignment_dir.rename(old)
            fresh.rename(self.alignment_dir)
        except OSError as error:
            raise storage_error(self.alignment_dir, error) from error
        finally:
            shutil.rmtree(old, ignore_errors=True)

    def alignment_parts(self) -> list[Path]:
        """Paths of the alignment's parts in order."""
        return sorted(self.alignment_dir.glob("part-*.parquet"))

    def iterate_alignment(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The alignment part by part, so that heatmaps of a large run need not fit in memory."""
        for path in self.alignment_parts():
            yield _read_table(path, ALIGNMENT, columns)

    def read_alignment_scores(self) -> pd.DataFrame:
        """The alignment without heatmaps."""
        columns = [name for name in ALIGNMENT.column_names if name != "heatmap"]
        parts = list(self.iterate_alignment(columns))
        return to_pandas(pa.concat_tables(parts)) if parts else ALIGNMENT.empty()[columns]

    # ---- plain files --------------------------------------------------------------------------------

    def write_audit(self, audit: pd.DataFrame) -> None:
        """Replace `audit.csv`."""
        write_csv(self.audit_path, audit)

    def read_audit(self) -> pd.DataFrame:
        """`audit.csv` as text cells, so that a spreadsheet's habits can be checked."""
        if not self.audit_path.is_file():
            raise InputRefused(
                f"{self.audit_path}: expected the audit sheet, found none.", remedy="Make it: medmicn audit draw"
            )
        return read_csv(self.audit_path, as_text=True)

    # ---- inside -------------------------------------------------------------------------------------

    def _read(self, contract: Contract) -> pa.Table:
        return _read_table(self.table_path(contract), contract)

    def _write(
        self, contract: Contract, data: pd.DataFrame | pa.Table, metadata: dict[bytes, bytes] | None = None
    ) -> None:
        path = self.table_path(contract)
        _write_table(path, contract.to_arrow(data, str(path), metadata))


def _in_one_cell(values: Any) -> str:
    return "; ".join(values) if hasattr(values, "__len__") else ""


def _write_table(path: Path, table: pa.Table) -> None:
    write_with(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def _read_table(
    path: Path, contract: Contract, columns: Sequence[str] | None = None, image_ids: pa.Array | None = None
) -> pa.Table:
    # The tag is read first: columns of an unknown version are not worth asking for.
    contract.check_tag(_schema(path, contract.name), str(path))
    rows = None if image_ids is None else pc.field("image_id").isin(image_ids)
    names = list(columns) if columns else None
    table = _parquet(path, lambda: pq.read_table(path, columns=names, partitioning=None, filters=rows))
    contract.check(table, str(path), columns=columns)
    return table


def _schema(path: Path, name: str) -> pa.Schema:
    if not path.is_file():
        raise InputRefused(
            f"{path}: expected the table '{name}', found no file.",
            remedy="A step before this one has not run yet; `medmicn run` does all of them.",
        )
    return _parquet(path, lambda: pq.read_schema(path))


def _parquet(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ContractViolation(
            str(path), [f"expected a Parquet file, got: {str(error).splitlines()[0][:200]}"]
        ) from error


def _matrix(column: pa.ChunkedArray, dtype: np.dtype, width: int) -> np.ndarray:
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat.reshape(-1, width), dtype=dtype)
