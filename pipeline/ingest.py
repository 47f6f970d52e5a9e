"""A SOURCE folder in, the `images` table and what SOURCE already says of concepts out.

One pass over the files: hash, decode once, keep a 1 kB fingerprint, drop the pixels. Then, on the table:
exact duplicates, near duplicates, splits. One bad image is a row with a reason; only a SOURCE that is of no
use as a whole is refused.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import TypeVar

import pandas as pd

from data_contracts.concepts import slug
from data_contracts.errors import ImageRejected, RejectReason
from data_contracts.files import sha256_of_file
from data_contracts.ports import Advance, ignore_progress
from data_contracts.tables import CONCEPTS, IMAGES, JUDGEMENTS, ConceptOrigin, ConceptStatus, Witness
from pipeline.decode import probe, read_pixels
from pipeline.duplicates import fingerprint
from pipeline.ingest_options import IngestOptions
from pipeline.layouts import Entry, SourceListing, list_source
from pipeline.paths import is_regular_file, os_path
from pipeline.settle import refuse_useless, settle

__all__ = ["FINGERPRINT", "IngestOptions", "Ingested", "ingest"]

FINGERPRINT = "fingerprint"
"""Column of `images` beyond its contract: see `duplicates.fingerprint`."""

_LARGE_PX = 25_000_000
_one_large_image = Lock()
"""Large images are decoded one at a time: several at once could take all memory, whatever the number of threads."""

Row = dict[str, object]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ingested:
    """What ingest found."""

    images: pd.DataFrame
    """Contract `images`, and the column `fingerprint`; one row an image, rejected ones included, sorted by path."""
    given_judgements: pd.DataFrame
    """Contract `judgements`: what SOURCE's own concept columns say; no row where they say nothing."""
    given_concepts: pd.DataFrame
    """Contract `concepts`: one row a concept column of SOURCE."""
    warnings: list[str]
    layout: str
    n_reused: int
    """Files that were hashed but not decoded, because the last run knew their bytes."""


def ingest(
    source: Path,
    options: IngestOptions | None = None,
    *,
    known: pd.DataFrame | None = None,
    advance: Advance = ignore_progress,
) -> Ingested:
    """Read SOURCE; raises `SourceRefused` if it is of no use as a whole.

    `known` is the images table of the last run on the same SOURCE: bytes that it knows are not decoded
    again, and its images stay in their splits. `advance` is told of each finished file.
    """
    options = options or IngestOptions()
    listing = list_source(source, exclude=options.exclude)
    warnings = list(listing.warnings)
    memory = _Memory(known, options.max_pixels)
    rows: list[Row] = []
    n_reused = 0
    entries = [entry for entry in listing.entries if entry.path not in options.held]
    for found, reused in _in_order(entries, lambda e: _rows_of(listing.root, e, options, memory), options):
        rows += found
        n_reused += reused
        advance(1)
    images = settle(_typed(pd.DataFrame(rows)), options, memory.splits, warnings)
    refuse_useless(source, images, warnings)
    concepts = _given_concepts(listing.concept_names)
    judgements = _given_judgements(listing, images, concepts)
    return Ingested(images, judgements, concepts, warnings, listing.layout, n_reused)


class _Memory:
    """What the last run knew, by the sha256 of a file's bytes."""

    def __init__(self, known: pd.DataFrame | None, max_pixels: int) -> None:
        self.splits: dict[str, str] = {}
        self._rows: dict[str, list[Row]] = {}
        if known is None or FINGERPRINT not in known:
            return
        placed = known[known["split"].notna() & known["rejected"].isna()]
        self.splits = dict(zip(placed["image_id"], placed["split"], strict=True))
        # Only files that were decoded whole are reused: a missing plug-in or a higher limit may mend the others.
        sha256 = known["image_id"].str.partition("#")[0]
        fits = known[FINGERPRINT].notna() & (known["width_px"] * known["height_px"] <= max_pixels).fillna(value=False)
        decoded = known[fits.groupby(sha256).transform("all")].drop_duplicates("image_id")
        kept = decoded[["image_id", "group_id", "width_px", "height_px", "format", "frame", FINGERPRINT]]
        for row in kept.astype(object).where(kept.notna(), None).to_dict("records"):
            self._rows.setdefault(str(row["image_id"]).partition("#")[0], []).append(row)

    def rows(self, sha256: str) -> list[Row]:
        """Rows of a file with these bytes, one a frame; empty if it is not known."""
        return self._rows.get(sha256, [])


def _in_order(items: Iterable[Item], work: Callable[[Item], Result], options: IngestOptions) -> Iterator[Result]:
    """Results in the order of the items, computed by threads that run only a few items ahead."""
    n_threads = options.n_threads or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
    with ThreadPoolExecutor(n_threads) as pool:
        ahead: deque[Future[Result]] = deque()
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) >= 4 * n_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _rows_of(root: Path, entry: Entry, options: IngestOptions, memory: _Memory) -> tuple[list[Row], bool]:
    """The rows of one file, one a frame, and whether they were known."""
    base: Row = {
        "path": entry.path,
        "label": entry.label,
        "split": entry.split.value if entry.split else None,
        "group_id": entry.group_id,
        "modality": options.modality,
        "rejected": None,
        "detail": None,
    }
    path = root / os_path(entry.path)
    if entry.rejected is RejectReason.OUTSIDE_SOURCE or not is_regular_file(path):
        reason = entry.rejected or RejectReason.MISSING_FILE
        return [base | _rejection(_placeholder(reason, entry.path), reason, entry.detail)], False
    try:
        sha256 = sha256_of_file(path)
    except OSError as error:
        reason = RejectReason.UNREADABLE
        return [
            base | _rejection(_placeholder(reason, entry.path), reason, f"could not be read ({error.strerror})")
        ], False
    if entry.rejected is not None:
        return [base | _rejection(sha256, entry.rejected, entry.detail)], False
    known = memory.rows(sha256)
    if known:
        return [base | row | {"group_id": entry.group_id or _own_group(row)} for row in known], True
    return _decoded(path, sha256, base, options.max_pixels), False


def _decoded(path: Path, sha256: str, base: Row, max_pixels: int) -> list[Row]:
    try:
        header = probe(path, max_pixels=max_pixels)
    except ImageRejected as rejection:
        return [base | _rejection(sha256, rejection.reason, str(rejection))]
    base |= {"format": header.format, "group_id": base["group_id"] or header.group_id}
    frames = [(sha256, None)] if header.n_frames == 1 else [(f"{sha256}#{n}", n) for n in range(header.n_frames)]
    with _one_large_image if header.width_px * header.height_px > _LARGE_PX else nullcontext():
        return [base | _frame(path, image_id, frame, max_pixels) for image_id, frame in frames]


def _frame(path: Path, image_id: str, frame: int | None, max_pixels: int) -> Row:
    try:
        pixels = read_pixels(path, frame, max_pixels=max_pixels)
    except ImageRejected as rejection:
        return _rejection(image_id, rejection.reason, str(rejection)) | {"frame": frame}
    height, width = pixels.shape[:2]
    return {
        "image_id": image_id,
        "frame": frame,
        "width_px": width,
        "height_px": height,
        FINGERPRINT: fingerprint(pixels),
    }


def _rejection(image_id: str, reason: RejectReason, detail: str | None) -> Row:
    return {"image_id": image_id, "rejected": reason.value, "detail": detail}


def _placeholder(reason: RejectReason, path: str) -> str:
    """An `image_id` for a file whose bytes cannot be had."""
    what = "missing" if reason is RejectReason.MISSING_FILE else reason.value
    return hashlib.sha256(f"{what}:{path}".encode()).hexdigest()


def _own_group(row: Row) -> object:
    """The group that the file itself named (DICOM); one that a CSV once named is not remembered."""
    return row["group_id"] if row["format"] == "dicom" else None


def _typed(rows: pd.DataFrame) -> pd.DataFrame:
    names = [*IMAGES.column_names, FINGERPRINT]
    images = rows.reindex(columns=names)
    whole = {name: "Int64" for name in ("width_px", "height_px", "frame")}
    text = {name: "str" for name in names if name not in whole and name != FINGERPRINT}
    images[FINGERPRINT] = images[FINGERPRINT].astype(object).where(images[FINGERPRINT].notna(), None)
    return images.astype({**whole, **text})


def _given_concepts(names: Sequence[str]) -> pd.DataFrame:
    rows: list[Row] = []
    taken: Counter[str] = Counter()
    for position, name in enumerate(names):
        concept_id = slug(name)
        taken[concept_id] += 1
        rows.append(
            {
                "concept_id": concept_id if taken[concept_id] == 1 else f"{concept_id}-{taken[concept_id]}",
                "name": name,
                "definition": "",
                "group": None,
                "proposed_for": [],
                "origin": ConceptOrigin.GIVEN.value,
                "status": ConceptStatus.KEPT.value,
                "position": position,
            }
        )
    return pd.DataFrame(rows).reindex(columns=CONCEPTS.column_names) if rows else CONCEPTS.empty()


def _given_judgements(listing: SourceListing, images: pd.DataFrame, concepts: pd.DataFrame) -> pd.DataFrame:
    """One row for each cell of the concept columns that says something, dated by the CSV's own time."""
    if concepts.empty:
        return JUDGEMENTS.empty()
    said = {entry.path: entry.concepts for entry in listing.entries if entry.concepts}
    ids = dict(zip(concepts["name"], concepts["concept_id"], strict=True))
    accepted = images[images["rejected"].isna()]
    rows = [
        (image_id, ids[name], state.value)
        for image_id, path in zip(accepted["image_id"], accepted["path"], strict=True)
        for name, state in said.get(path, {}).items()
    ]
    frame = pd.DataFrame(rows, columns=["image_id", "concept_id", "state"])
    frame["witness"] = Witness.GIVEN.value
    frame["witness_model"] = "+".join(table.name for table in listing.tables)
    newest = max((table.stat().st_mtime for table in listing.tables), default=0.0)
    frame["created_at"] = datetime.fromtimestamp(newest, UTC)
    return frame.reindex(columns=JUDGEMENTS.column_names)
