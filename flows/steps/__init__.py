"""The steps of a run in their order, each idempotent, none of them knowing Prefect."""

from __future__ import annotations

from pathlib import Path

from data_contracts.errors import ConfigurationError, SourceRefused
from data_contracts.manifest import RunManifest
from data_contracts.store import RunFolder
from data_contracts.tables import IMAGES
from flows.chain import Context, Step
from flows.settings import Settings, remembered
from flows.steps.align import ALIGN
from flows.steps.concepts import CONCEPTS_STEP
from flows.steps.corrections import draw_audit, import_sheet, score_audit
from flows.steps.fuse import FUSE
from flows.steps.images import INGEST, image_reader
from flows.steps.judge import JUDGE
from flows.steps.learn import DATASET, EXPLAIN, TRAIN
from flows.steps.pages import REPORT

STEPS: dict[str, Step] = {
    step.name: step for step in (INGEST, CONCEPTS_STEP, JUDGE, ALIGN, FUSE, DATASET, TRAIN, EXPLAIN, REPORT)
}
"""Every step by its verb, in order."""

LAST_ANNOTATION_STEP = FUSE.name

_NEEDS_CLASSES = {DATASET.name, TRAIN.name, EXPLAIN.name}


def require_source(source: Path, run: RunFolder) -> None:
    """Raise `SourceRefused` unless SOURCE is a folder, and `ConfigurationError` when it is the run folder itself."""
    if not source.is_dir():
        found = "a file" if source.exists() else "nothing"
        raise SourceRefused(
            f"SOURCE {source}: expected a folder of images, found {found}.", remedy="Name the folder that holds them."
        )
    if run.path.resolve() == source.resolve():
        raise ConfigurationError(f"--run {run.path}: expected another folder than SOURCE.")


def begin(source: Path, run: RunFolder, settings: Settings | None = None, *, synthetic: bool = False) -> RunFolder:
    """The run folder, begun or continued for `source`; it remembers `settings`, if any are given.

    Raises:
        SourceRefused: SOURCE is no folder.
        ContractViolation: the run folder is from another version.
    """
    require_source(source, run)
    if run.exists:
        manifest = run.read_manifest()
    else:
        manifest = RunManifest.new(run.path.name, str(source.resolve()))
        manifest.synthetic = synthetic
        run.write_manifest(manifest)
    if settings is not None:
        _remember(run, manifest, settings)
    return run


def remember_settings(context: Context) -> None:
    """Store the context's settings in the manifest, so that later verbs and the report know them."""
    _remember(context.run, context.run.read_manifest(), context.settings)


def chain_for(context: Context, last_step: str | None = None) -> list[Step]:
    """The steps this source allows, up to `last_step`: without classes nothing is trained."""
    allowed = [step for step in STEPS.values() if has_classes(context.run) or step.name not in _NEEDS_CLASSES]
    names = [step.name for step in allowed]
    if last_step is None:
        return allowed
    if last_step not in names:
        raise ConfigurationError(f"step: expected one of {', '.join(names)}, got {last_step!r}.")
    return allowed[: names.index(last_step) + 1]


def has_classes(run: RunFolder) -> bool:
    """Whether any accepted image has a class; True as long as nothing was ingested."""
    if not run.table_path(IMAGES).is_file():
        return True
    images = run.read_images()
    return bool(images.loc[images["rejected"].isna(), "label"].notna().any())


def _remember(run: RunFolder, manifest: RunManifest, settings: Settings) -> None:
    config = remembered(settings)
    if not run.exists or manifest.config != config:
        manifest.config = config
        run.write_manifest(manifest)


__all__ = [
    "ALIGN",
    "DATASET",
    "EXPLAIN",
    "FUSE",
    "INGEST",
    "JUDGE",
    "LAST_ANNOTATION_STEP",
    "REPORT",
    "STEPS",
    "TRAIN",
    "begin",
    "chain_for",
    "draw_audit",
    "has_classes",
    "image_reader",
    "import_sheet",
    "remember_settings",
    "require_source",
    "score_audit",
]
