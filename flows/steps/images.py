"""The ingest step: what lies in SOURCE becomes the images table, and given labels enter the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from data_contracts.manifest import content_hash
from data_contracts.ports import PixelReader
from data_contracts.tables import CONCEPTS, IMAGES
from flows.chain import Context, ShardRunner, Step, StepResult
from flows.ledger import append_new, merge_concepts
from pipeline.decode import ImageReader
from pipeline.ingest import IngestOptions, ingest
from pipeline.paths import table_path, walk
from pipeline.split import SplitFractions


def image_reader(context: Context) -> PixelReader:
    """Reads the run's images from its source."""
    return ImageReader(context.source, context.run.read_images(), max_pixels=context.settings.source.max_pixels)


def accepted(images: pd.DataFrame) -> pd.DataFrame:
    """The images that were not rejected."""
    return images[images["rejected"].isna()]


def _inputs(context: Context) -> Mapping[str, Any]:
    return {
        "source": source_fingerprint(context.source, exclude=(context.run.path,), held=context.held),
        "options": context.settings.source.model_dump(mode="json"),
    }


def _work(context: Context, _shards: ShardRunner) -> StepResult:
    run, options = context.run, _options(context)
    known = run.read_images() if run.table_path(IMAGES).is_file() else None
    with context.console.bar("reading images", None) as advance:
        found = ingest(context.source, options, known=known, advance=advance)
    run.write_images(found.images)
    if len(found.given_concepts):
        stored = run.read_concepts() if run.table_path(CONCEPTS).is_file() else None
        run.write_concepts(merge_concepts(stored, found.given_concepts))
    n_given = append_new(run, found.given_judgements)
    return StepResult([run.table_path(IMAGES)], _counts(found.images, n_given), list(found.warnings))


def _counts(images: pd.DataFrame, n_given: int) -> dict[str, float]:
    good = accepted(images)
    counts: dict[str, float] = {"images": len(good), "rejected": len(images) - len(good)}
    counts["classes"] = good["label"].nunique()
    counts |= {f"in_{name}": int(n) for name, n in good["split"].value_counts().items()}
    return counts | ({"given_labels": n_given} if n_given else {})


def _options(context: Context) -> IngestOptions:
    source = context.settings.source
    return IngestOptions(
        modality=source.modality,
        max_pixels=source.max_pixels,
        fractions=SplitFractions(
            source.train_fraction, source.val_fraction, 1.0 - source.train_fraction - source.val_fraction
        ),
        seed=source.seed,
        allow_patient_overlap=source.allow_patient_overlap,
        exclude=(context.run.path,),
        held=context.held,
    )


def source_fingerprint(source: Path, *, exclude: tuple[Path, ...] = (), held: frozenset[str] = frozenset()) -> str:
    """Hash over name, size and time of every file of `source` that is not `held`: cheap, enough to see what is new."""
    return content_hash({"files": [file for file in _files(source, exclude) if file[0] not in held]})


def _files(source: Path, exclude: tuple[Path, ...]) -> Iterator[list[Any]]:
    for relative in walk(source, exclude=exclude).files:
        try:
            found = (source / relative).stat()
        except OSError:
            continue
        yield [table_path(relative), found.st_size, found.st_mtime_ns]


INGEST = Step("ingest", "Reading images", _inputs, _work, reads_source=True)
