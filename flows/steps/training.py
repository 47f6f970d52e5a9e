"""Training as a run folder wants it: watched, resumable, in one process or in several that this command starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from data_contracts.errors import StepFailed
from flows.chain import Context
from flows.steps.images import image_reader
from flows.training_display import training_display

if TYPE_CHECKING:
    from model.fit import TrainedRun


def state_dir(context: Context) -> Path:
    """Where the states of seeds are that are trained or half trained."""
    return context.run.cache_dir / "training"


def train_networks(context: Context) -> TrainedRun:
    """The networks of all seeds; goes on where an earlier command was killed."""
    if context.settings.train.processes > 1:
        _start_workers(context)
    return train_here(context)


def train_here(context: Context) -> TrainedRun:
    """The networks of all seeds, trained in this process; one of several where `torchrun` started it."""
    from model.fit import Watch, fit, prepare_for
    from model.loggers import epoch_log

    run, config, modality = context.run, context.settings.train, context.settings.source.modality
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's matrix products are refused
    dataset = run.read_dataset()
    with epoch_log(config.logger, run.path / "logs", config.model_dump(mode="json")) as log:
        with context.console.bar("reading features", len(dataset)) as advance:
            prepared, backbone = prepare_for(
                [config], dataset, image_reader(context), cache_dir=run.cache_dir, modality=modality, advance=advance
            )
        with training_display(context.console, config.seeds, config.epochs) as display:

            def on_epoch(seed: int, row: Mapping[str, float]) -> None:
                display.on_epoch(seed, row)
                log(seed, row)

            watch = Watch(on_epoch=on_epoch, on_step=display.on_step)
            return fit(prepared, backbone, config, state_dir=state_dir(context), watch=watch)


def _start_workers(context: Context) -> None:
    """Train with several processes of this machine; raises `StepFailed` when one of them fails."""
    n = context.settings.train.processes
    context.console.say(f"  {n} processes train together")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    command += ["-m", "flows.training_worker", str(context.run.path.resolve())]
    command += ["--quiet"] if context.console.quiet else []
    # Without it every process warns that all parameters had a gradient, which is as it should be.
    environment = {"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}
    code = subprocess.run(command, check=False, stdout=sys.stderr, env=environment).returncode
    if code:
        raise StepFailed(
            f"Training: expected {n} processes to finish, got exit code {code}; the message is above. What was trained "
            "is kept.",
            remedy="Give the same command again to go on, or use --set train.processes=1.",
        )
