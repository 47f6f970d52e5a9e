"""The model of a run on new images: a table in parts, whole at any instant, and maps as PNG.

Files are cut into parts of a few hundred. A finished part is one Parquet file under `parts/`, named by a hash of the
model, the settings and of what its files are (path, size, time); the same command again does only the parts that are
missing, and one bad image is one row with its reason. Cuts fall where a hash of the path says, so that a new image
changes one part and not all that follow. In memory is one batch of images, however many there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.errors import ImageRejected, InputRefused, RejectReason
from data_contracts.files import sha256_of_file, write_with
from data_contracts.manifest import content_hash
from data_contracts.ports import Pixels
from flows.chain import Context
from flows.devices import resolve_device
from flows.prediction_table import DETAILS, concept_column, part_schema, write_joined
from pipeline.decode import probe, read_pixels
from pipeline.dicom_privacy import text_is_burnt_in
from pipeline.layouts import is_image_file
from pipeline.paths import table_path, walk

if TYPE_CHECKING:
    from model.api import Model
    from model.predict import Prediction
    from model.reject import Reject

PARTS = "parts"
SHOWN = 100
"""Rows that are kept in memory to be shown."""

_MEAN_PART, _LARGEST_PART = 256, 1024
_BATCH = 16
_TOP_CONCEPTS = 3


@dataclass
class Predicted:
    """What came of some files."""

    n_predicted: int = 0
    n_reused: int = 0
    """Images whose rows an earlier command had written."""
    n_uncertain: int = 0
    """Images that the reject option gives no class."""
    n_left_out: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The first `SHOWN` predictions: path, class, probability, rule, top_concepts, every concept's probability."""
    rejected: list[tuple[Path, str]] = field(default_factory=list)
    """The first `SHOWN` files that were left out, with the reason's code."""
    warnings: list[str] = field(default_factory=list)


class _Job(NamedTuple):
    """One image of a file, still to be decoded; or why there is none."""

    path: Path
    image_id: str = ""
    frame: int = 0
    reason: str | None = None
    drawable: bool = True
    """False where the file's header says that names are burnt into the pixels."""


@dataclass(frozen=True)
class _Work:
    """What every part is done with."""

    context: Context
    model: Model
    reject: Reject | None
    out: Path
    with_maps: bool

    @property
    def key(self) -> str:
        """Hash of all but the files that a row depends on."""
        settings = self.context.settings
        return content_hash(
            {
                "model": sha256_of_file(self.context.run.model_dir / "config.json"),
                "calibration": repr(self.model.classifier.calibration),
                "reject": repr(self.reject),
                "maps": settings.explain.map_methods[0] if self.with_maps else None,
                "max_pixels": settings.source.max_pixels,
            }
        )


def predict_files(context: Context, paths: Sequence[Path], out: Path, *, with_maps: bool) -> Predicted:
    """Predict every image among `paths` (files, or folders of images); writes CSV, Parquet and maps to `out`.

    Raises `InputRefused` where there is no file, `CheckpointRefused` for a model that was altered.
    """
    from model.api import load

    settings = context.settings
    model = load(context.run.model_dir, device=resolve_device(settings.train.device))
    reject = model.reject_option(coverage=settings.explain.reject_coverage, max_risk=settings.explain.reject_max_risk)
    files = list(_files(paths))
    if not files:
        raise InputRefused(f"predict: expected images, found none in {', '.join(map(str, paths))}.")
    work = _Work(context, model, reject, out, with_maps)
    result = Predicted()
    parts: list[Path] = []
    key = work.key
    with context.console.bar("predicting", len(files)) as advance:
        for chunk in in_parts(files):
            part = out / PARTS / f"{_part_name(key, chunk)}.parquet"
            if _is_whole(part):
                result.n_reused += _note(result, pq.read_table(part), chunk)
            else:
                table = _predict_part(work, chunk)
                write_with(part, lambda file, table=table: pq.write_table(table, file, compression="zstd"))
                _note(result, table, chunk)
            parts.append(part)
            advance(len(chunk))
    write_joined(out, parts)
    _sweep(out / PARTS, parts)
    return result


def in_parts(files: Sequence[Path]) -> Iterator[list[Path]]:
    """The files in order, cut after those whose path hashes to 0: the same cuts whatever stands elsewhere."""
    part: list[Path] = []
    for path in files:
        part.append(path)
        digest = hashlib.sha256(str(path).encode(errors="surrogateescape")).digest()
        if int.from_bytes(digest[:4]) % _MEAN_PART == 0 or len(part) == _LARGEST_PART:
            yield part
            part = []
    if part:
        yield part


def _predict_part(work: _Work, files: Sequence[Path]) -> pa.Table:
    rows: list[dict[str, Any]] = []
    max_pixels = work.context.settings.source.max_pixels
    jobs = (job for path in files for job in _jobs(path, max_pixels))
    with ThreadPoolExecutor(work.context.settings.train.decode_threads) as pool:
        # A batch at a time, never the whole part: pixels are large, rows are small.
        while batch := list(islice(jobs, _BATCH)):
            decoded = list(pool.map(partial(_decoded, max_pixels=max_pixels), batch))
            rows += _predict_batch(work, decoded)
    classifier = work.model.classifier
    schema = part_schema(work.model.class_names, classifier.vocabulary.ids if classifier.has_concepts else ())
    return pa.Table.from_pylist(rows, schema=schema)


def _predict_batch(work: _Work, batch: Sequence[tuple[_Job, Pixels | None]]) -> list[dict[str, Any]]:
    readable = [pixels for _, pixels in batch if pixels is not None]
    predictions = iter(
        work.model.classifier.predict(
            readable,
            maps=work.with_maps,
            map_method=work.context.settings.explain.map_methods[0],
            reject=work.reject,
        )
    )
    rows = []
    for job, pixels in batch:
        row: dict[str, Any] = {"path": table_path(str(job.path)), "image_id": job.image_id}
        if pixels is None:
            row["rejected"] = job.reason
        else:
            prediction = next(predictions)
            row |= _row(prediction) | _drawn(work, job, pixels, prediction)
        rows.append(row)
    return rows


def _drawn(work: _Work, job: _Job, pixels: Pixels, prediction: Prediction) -> dict[str, str]:
    from flows.steps.maps import draw_maps

    if not work.with_maps:
        return {}
    if not job.drawable:
        return {"maps": "not drawn: the file's header says that names are burnt into the pixels"}
    drawn = draw_maps(work.model.classifier, job.image_id, pixels, prediction, work.out)
    return {"maps": "; ".join(row["file"] for row in drawn)}


def _row(prediction: Prediction) -> dict[str, Any]:
    return {
        "class": prediction.class_name,
        "probability": prediction.confidence,
        "rejected": prediction.rejected,
        "rule": prediction.rule.text if prediction.rule else "",
        "rule_holds": prediction.rule.holds if prediction.rule else None,
        **{f"probability {name}": p for name, p in prediction.class_probabilities.items()},
        **{concept_column(c): p for c, p in prediction.concept_probabilities.items()},
    }


def _jobs(path: Path, max_pixels: int) -> Iterator[_Job]:
    """The images of a file, one for all formats but multi-frame DICOM; what cannot be read says why."""
    try:
        header = probe(path, max_pixels=max_pixels)
        image_id = sha256_of_file(path)
    except ImageRejected as error:
        yield _Job(path, reason=str(error.reason))
        return
    except OSError:
        yield _Job(path, reason=str(RejectReason.UNREADABLE))
        return
    drawable = header.format != "dicom" or not text_is_burnt_in(path)
    for frame in range(header.n_frames):
        own_id = image_id if header.n_frames == 1 else f"{image_id}#{frame}"
        yield _Job(path, own_id, frame, drawable=drawable)


def _decoded(job: _Job, *, max_pixels: int) -> tuple[_Job, Pixels | None]:
    if job.reason is not None:
        return job, None
    try:
        return job, read_pixels(job.path, job.frame, max_pixels=max_pixels)
    except ImageRejected as error:
        return job._replace(reason=str(error.reason)), None


def _note(result: Predicted, table: pa.Table, files: Sequence[Path]) -> int:
    """Count a part's rows and keep the first ones to be shown; returns how many were predicted."""
    by_name = {table_path(str(path)): path for path in files}
    n_predicted = 0
    for row in table.to_pylist():
        if row["class"] is None:
            result.n_left_out += 1
            if len(result.rejected) < SHOWN:
                result.rejected.append((by_name[row["path"]], row["rejected"]))
            continue
        n_predicted += 1
        result.n_uncertain += row["rejected"] is not None
        if len(result.rows) < SHOWN:
            result.rows.append(row | {"top_concepts": _top_concepts(row)})
    result.n_predicted += n_predicted
    return n_predicted


def _top_concepts(row: dict[str, Any]) -> list[str]:
    concepts = {k: v for k, v in row.items() if k not in DETAILS and not k.startswith("probability ")}
    ranked = sorted(concepts.items(), key=lambda item: -item[1])[:_TOP_CONCEPTS]
    return [f"{concept_id} {p:.2f}" for concept_id, p in ranked]


def _part_name(key: str, files: Sequence[Path]) -> str:
    return content_hash({"key": key, "files": [[table_path(str(p)), *_state_of(p)] for p in files]})[:32]


def _state_of(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _is_whole(part: Path) -> bool:
    try:
        return part.is_file() and pq.read_metadata(part).num_rows >= 0
    except (pa.ArrowInvalid, OSError):
        return False


def _sweep(folder: Path, kept: Sequence[Path]) -> None:
    """Remove parts of earlier commands that no longer belong to the table."""
    names = {path.name for path in kept}
    for path in folder.glob("*.parquet"):
        if path.name not in names:
            path.unlink(missing_ok=True)


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from (path / name for name in walk(path).files if is_image_file(path, name))
        else:
            yield path
