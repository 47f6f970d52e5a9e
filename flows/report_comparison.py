"""Two runs gathered for the page that compares them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from data_contracts.concepts import Vocabulary
from data_contracts.errors import InputRefused
from data_contracts.files import write_text
from data_contracts.store import RunFolder
from flows.summary import metrics_of
from pipeline.report.compare import RunSide, render_comparison

T = TypeVar("T")


def compare_runs(first: RunFolder, second: RunFolder, page: Path) -> None:
    """Write the comparison page; raises `InputRefused` where one of the folders is no run."""
    write_text(page, render_comparison(_side(first), _side(second), datetime.now(UTC)))


def _side(run: RunFolder) -> RunSide:
    manifest = run.read_manifest()
    test = metrics_of(run).get("test", {}).get("over_seeds", {})
    return RunSide(
        name=run.path.resolve().name,
        manifest=manifest.model_dump(mode="json"),
        images=run.read_images(),
        vocabulary=_optional(run.vocabulary) or Vocabulary(),
        labels=_optional(run.read_labels),
        metrics={name: value for name, value in test.items() if value.get("mean") is not None},
    )


def _optional(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except InputRefused:
        return None
