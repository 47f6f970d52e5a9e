"""A run folder's tables as the review page needs them: read once, and again only when a file changes.

Labels and the ledger are joined into dense (images × concepts) arrays. An expert's latest word stands over
the fused label at once, before the next `fuse` makes it official.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq

from data_contracts.concepts import Vocabulary
from data_contracts.store import RunFolder
from data_contracts.tables import CONCEPTS, IMAGES, LABELS, State, Witness
from pipeline.export import states_of
from pipeline.review.ledger import Ledger, latest
from pipeline.review.queries import CODE, Snapshot

_SHOWN = ["image_id", "path", "label", "split", "width_px", "height_px"]


class Tables:
    """Snapshots of a run folder, made again only when one of its files changed."""

    def __init__(self, run: RunFolder, ledger: Ledger) -> None:
        self._run = run
        self._ledger = ledger
        self._lock = threading.Lock()
        self._stamp: object = None
        self._snapshot: Snapshot | None = None

    def snapshot(self) -> Snapshot:
        """The run as it is now."""
        with self._lock:
            stamp = self._files()
            if self._snapshot is None or stamp != self._stamp:
                self._snapshot, self._stamp = _snapshot(self._run, self._ledger.read()), stamp
            return self._snapshot

    def _files(self) -> tuple[object, ...]:
        paths = [self._run.table_path(contract) for contract in (IMAGES, CONCEPTS, LABELS)]
        return (*map(_stamp, paths), self._ledger.parts())


class Heatmaps:
    """Maps of one image at a time, read from the one part that holds it."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._parts: dict[str, Path] = {}
        self._stamp: object = None

    def of(self, image_id: str) -> dict[str, npt.NDArray[np.float32]]:
        """Concept id → (h, w) map; empty where the image was not aligned."""
        part = self._part(image_id)
        if part is None:
            return {}
        table = pq.read_table(part, filters=[("image_id", "==", image_id)], partitioning=None)
        return {
            row["concept_id"]: np.asarray(row["heatmap"], np.float32).reshape(row["grid_h"], row["grid_w"])
            for row in table.select(["concept_id", "grid_h", "grid_w", "heatmap"]).to_pylist()
            if row["heatmap"]
        }

    def _part(self, image_id: str) -> Path | None:
        with self._lock:
            parts = self._run.alignment_parts()
            stamp = tuple(map(_stamp, parts))
            if stamp != self._stamp:
                self._parts = {i: part for part in parts for i in _image_ids(part)}
                self._stamp = stamp
            return self._parts.get(image_id)


def _snapshot(run: RunFolder, judgements: pd.DataFrame) -> Snapshot:
    images = run.read_images()
    images = images.loc[images["rejected"].isna(), _SHOWN].reset_index(drop=True)
    concepts = _or_empty(run, CONCEPTS.empty(), run.table_path(CONCEPTS))
    vocabulary = run.vocabulary() if len(concepts) else Vocabulary()
    labels = _or_empty(run, LABELS.empty(), run.table_path(LABELS))
    position = {image_id: row for row, image_id in enumerate(images["image_id"])}
    shape = (len(images), len(vocabulary))
    snapshot = Snapshot(
        images,
        vocabulary,
        np.zeros(shape, np.int8),
        np.full(shape, np.nan, np.float32),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.bool_),
        judgements,
        position,
    )
    _fill_labels(snapshot, labels)
    _fill_expert(snapshot, judgements)
    return snapshot


def _or_empty(run: RunFolder, empty: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table at `path`, or no row where its step has not run yet."""
    if not path.is_file():
        return empty
    return run.read_labels() if path == run.table_path(LABELS) else run.read_concepts()


def _fill_labels(snapshot: Snapshot, labels: pd.DataFrame) -> None:
    labels, rows, columns = _inside(snapshot, labels)
    snapshot.code[rows, columns] = states_of(labels)["state"].map(CODE).to_numpy(np.int8)
    snapshot.probability[rows, columns] = labels["probability"].to_numpy(np.float32)
    snapshot.disagreement[rows, columns] = labels["disagreement"].to_numpy(np.float32)


def _fill_expert(snapshot: Snapshot, judgements: pd.DataFrame) -> None:
    """Lay experts' standing words over the labels; of several reviewers, the last who spoke."""
    said = latest(judgements[judgements["witness"] == Witness.EXPERT])
    said = said[said["state"] != State.NOT_ASSESSED].drop_duplicates(["image_id", "concept_id"], keep="last")
    said, rows, columns = _inside(snapshot, said)
    snapshot.code[rows, columns] = said["state"].map(CODE).to_numpy(np.int8)
    snapshot.by_expert[rows, columns] = True


def _inside(snapshot: Snapshot, frame: pd.DataFrame) -> tuple[pd.DataFrame, npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Rows of `frame` about images and concepts of the snapshot, with their row and column."""
    rows = pd.Index(snapshot.images["image_id"]).get_indexer(pd.Index(frame["image_id"]))
    columns = pd.Index(snapshot.vocabulary.ids).get_indexer(pd.Index(frame["concept_id"]))
    keep = (rows >= 0) & (columns >= 0)
    return frame[keep], rows[keep], columns[keep]


def _image_ids(part: Path) -> list[str]:
    column = pq.read_table(part, columns=["image_id"], partitioning=None).column("image_id")
    return [str(value) for value in column.unique().to_pylist()]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size
