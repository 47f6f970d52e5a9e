"""What images look like to the drift watch: measured once each, as a baseline when a model is trained, and as new ones.

drift/images.parquet      one row an image, its statistics; grows with the run
drift/baseline.parquet    measurements of the images that the model in use was trained with, as they were then
drift/tests.csv           the last comparison
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.errors import ImageRejected
from data_contracts.files import sha256_of_file, write_with
from data_contracts.ports import PixelReader
from data_contracts.spreadsheet import write_csv
from data_contracts.store import RunFolder
from data_contracts.tables import IMAGES, LABELS
from flows.approval import decided, raise_question, waiting
from flows.chain import Context, ShardRunner, Step, StepResult
from flows.promotion import trained_on
from flows.steps.images import accepted, image_reader
from pipeline.drift import IMAGE_STATISTICS, DriftOptions, compare, concept_measurements, image_statistics

IMAGES_FILE, BASELINE_FILE, TESTS_FILE = "images.parquet", "baseline.parquet", "tests.csv"

_MOST_IMAGES = 20_000
"""Images of one side: more tell the tests nothing, and would fill the memory. Drawn by a hash of their ids."""
_AT_ONCE = 512
_THREADS = 2


def new_images(context: Context) -> pd.DataFrame:
    """Accepted images that the model in use was not trained with and that no person has decided on yet."""
    images = accepted(context.run.read_images())
    known = set(trained_on(context.run)["image_id"]) | set(decided(context.run)["image_id"])
    return images[~images["image_id"].isin(known)].reset_index(drop=True)


def measurements(context: Context, image_ids: Sequence[str]) -> pd.DataFrame:
    """One row for each image that can be read: `IMAGE_STATISTICS`, `format`, `label`, `group_id`, concept columns."""
    run = context.run
    images = accepted(run.read_images())
    chosen = images[images["image_id"].isin(set(image_ids))][["image_id", "format", "label", "group_id"]]
    measured = chosen.merge(_statistics(context, chosen["image_id"].tolist()), on="image_id")
    wanted = set(measured["image_id"])
    concepts = concept_measurements(_rows_of(run, wanted), _scores_of(run, wanted))
    return measured.merge(concepts, on="image_id", how="left")


def sample(image_ids: Sequence[str]) -> list[str]:
    """At most `_MOST_IMAGES` of the ids, the same ones every time."""
    ordered = sorted(image_ids, key=lambda name: hashlib.sha256(name.encode()).digest())
    return ordered[:_MOST_IMAGES]


def _rows_of(run: RunFolder, image_ids: set[str]) -> pd.DataFrame:
    columns = ["image_id", "concept_id", "present", "disagreement"]
    parts = [_only(part, image_ids) for part in run.iterate_rows(LABELS, columns, 1 << 18)]
    return pd.concat(parts, ignore_index=True)


def _scores_of(run: RunFolder, image_ids: set[str]) -> pd.DataFrame:
    columns = ["image_id", "concept_id", "similarity"]
    parts = [_only(part, image_ids) for part in run.iterate_alignment(columns)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def _only(part: pa.Table, image_ids: set[str]) -> pd.DataFrame:
    frame = part.to_pandas()
    kept = frame[frame["image_id"].isin(image_ids)]
    return kept.astype({"image_id": "str", "concept_id": "str"})


# ---- image statistics, each computed once --------------------------------------------------------------------


def _statistics(context: Context, image_ids: list[str]) -> pd.DataFrame:
    path = context.run.drift_dir / IMAGES_FILE
    known = pq.read_table(path).to_pandas() if path.is_file() else pd.DataFrame(columns=["image_id", *IMAGE_STATISTICS])
    have = set(known["image_id"])
    missing = [image_id for image_id in image_ids if image_id not in have]
    if missing:
        fresh = _measured(context, missing)
        known = pd.concat([known, fresh], ignore_index=True) if len(known) else fresh
        _write(path, known)
    return known[known["image_id"].isin(set(image_ids))]


def _measured(context: Context, image_ids: list[str]) -> pd.DataFrame:
    read = image_reader(context)
    rows: list[dict[str, Any]] = []
    with (
        context.console.bar("measuring images", len(image_ids)) as advance,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        for chunk in _chunks(image_ids):
            rows += [row for row in pool.map(partial(_row, read), chunk) if row is not None]
            advance(len(chunk))
    return pd.DataFrame(rows, columns=["image_id", *IMAGE_STATISTICS])


def _chunks(items: list[str]) -> Iterator[list[str]]:
    remaining = iter(items)
    while chunk := list(islice(remaining, _AT_ONCE)):
        yield chunk


def _row(read: PixelReader, image_id: str) -> dict[str, Any] | None:
    try:
        return {"image_id": image_id, **image_statistics(read(image_id))}
    except ImageRejected:
        # It was readable when it was accepted; that it is no longer is said by the step that needs it.
        return None


def _write(path: Any, table: pd.DataFrame) -> None:
    write_with(path, lambda file: pq.write_table(pa.Table.from_pandas(table, preserve_index=False), file))


# ---- the baseline --------------------------------------------------------------------------------------------


def _baseline_inputs(context: Context) -> Mapping[str, Any]:
    table = trained_on(context.run)
    return {"trained_on": sorted(table["image_id"])}


def _baseline(context: Context, _shards: ShardRunner) -> StepResult:
    run = context.run
    there = set(accepted(run.read_images())["image_id"])
    table = measurements(context, sample([name for name in trained_on(run)["image_id"] if name in there]))
    path = run.drift_dir / BASELINE_FILE
    _write(path, table)
    return StepResult([path], {"images": len(table)})


# ---- the comparison ------------------------------------------------------------------------------------------


def _drift_inputs(context: Context) -> Mapping[str, Any]:
    run = context.run
    tables = [run.table_path(IMAGES), run.table_path(LABELS), run.drift_dir / BASELINE_FILE]
    return {
        "tables": {path.name: sha256_of_file(path) for path in tables if path.is_file()},
        "new": sorted(new_images(context)["image_id"]),
        "waiting": waiting(run) is not None,
        "options": context.settings.schedule.model_dump(mode="json"),
    }


def _watch(context: Context, _shards: ShardRunner) -> StepResult:
    """Compare new images with the baseline; what fires becomes a question to a person."""
    run, options = context.run, drift_options(context)
    new = new_images(context)
    baseline = _baseline_now(context)
    table = compare(baseline, measurements(context, sample(new["image_id"].tolist())), options)
    path = run.drift_dir / TESTS_FILE
    write_csv(path, table)
    fired = table[table["fires"].astype(bool)] if len(table) else table
    counts: dict[str, float] = {"new_images": len(new), "tests": len(table), "fired": len(fired)}
    if not len(fired):
        return StepResult([path], counts)
    sentence = (
        f"{len(new)} new images differ from those the model was trained with in {len(fired)} of {len(table)} tests, "
        f"most in: {fired['sentence'].iloc[0]}."
    )
    raise_question(run, sentence, fired, new["image_id"].tolist())
    return StepResult([path], counts, [sentence])


def _baseline_now(context: Context) -> pd.DataFrame:
    """The baseline, with its labels and scores as they stand today.

    The label model and the aligner learn again when images come. Both sides must be seen by the same one, or the watch
    would find the difference between two instruments. Images that left the source keep what was stored.
    """
    stored = pq.read_table(context.run.drift_dir / BASELINE_FILE).to_pandas()
    there = set(accepted(context.run.read_images())["image_id"])
    today = measurements(context, [name for name in stored["image_id"] if name in there])
    gone = stored[~stored["image_id"].isin(set(today["image_id"]))]
    return pd.concat([today, gone], ignore_index=True) if len(gone) else today


def drift_options(context: Context) -> DriftOptions:
    """The settings of the drift watch, as the tests want them."""
    settings = context.settings.schedule
    return DriftOptions(
        alpha=settings.drift_alpha,
        min_prevalence_change=settings.drift_min_prevalence_change,
        min_distance=settings.drift_min_distance,
        min_association=settings.drift_min_association,
        min_images=settings.drift_min_images,
    )


BASELINE = Step("baseline", "Measuring what the model was trained with", _baseline_inputs, _baseline)
DRIFT = Step("drift", "Comparing new images with the baseline", _drift_inputs, _watch)
