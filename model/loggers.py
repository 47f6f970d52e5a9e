"""Training curves for TensorBoard or MLflow, for people who have them; the CSV and the pictures are written anyway."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from data_contracts.errors import ConfigurationError
from model.config import Logger


class EpochLog(Protocol):
    """Where the rows of the history go."""

    def __call__(self, seed: int, row: Mapping[str, float]) -> None:
        """Take the row of one epoch of one seed."""
        ...


@contextmanager
def epoch_log(logger: Logger, folder: Path, settings: Mapping[str, Any]) -> Iterator[EpochLog]:
    """A place for epoch rows, closed at the end; raises `ConfigurationError` before training where it is missing."""
    if logger == "none":
        yield _nowhere
    elif logger == "tensorboard":
        with _tensorboard(folder) as log:
            yield log
    else:
        with _mlflow(folder, settings) as log:
            yield log


def _nowhere(seed: int, row: Mapping[str, float]) -> None:
    """Keep nothing."""


@contextmanager
def _tensorboard(folder: Path) -> Iterator[EpochLog]:
    writer_class = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter
    writers: dict[int, Any] = {}

    def log(seed: int, row: Mapping[str, float]) -> None:
        if seed not in writers:
            writers[seed] = writer_class(str(folder / f"seed-{seed}"))
        writer = writers[seed]
        for name, value in _finite(row).items():
            writer.add_scalar(name.replace("_", "/", 1), value, int(row["epoch"]))
        writer.flush()

    try:
        yield log
    finally:
        for writer in writers.values():
            writer.close()


@contextmanager
def _mlflow(folder: Path, settings: Mapping[str, Any]) -> Iterator[EpochLog]:
    mlflow = _module("mlflow", "mlflow")
    if not mlflow.tracking.is_tracking_uri_set():
        mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        folder.mkdir(parents=True, exist_ok=True)
    with mlflow.start_run(run_name="medmicn"):
        mlflow.log_params(dict(settings))

        def log(seed: int, row: Mapping[str, float]) -> None:
            values = {f"seed_{seed}/{name}": value for name, value in _finite(row).items()}
            mlflow.log_metrics(values, step=int(row["epoch"]))

        yield log


def _finite(row: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "epoch" and math.isfinite(value)}


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"train.logger: {package!r} was asked for and cannot be imported ({error}); nothing was trained.",
            remedy=f"Install it with `pip install {package}`, or use --set train.logger=none: the curves are in "
            "model/curves.csv, .svg and .png in any case.",
        ) from error
