"""One seed's training: epochs of steps, the epoch that is kept, and a state on the disk meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from data_contracts.errors import StepFailed
from model.backbones import Backbone
from model.config import TrainConfig
from model.course import Course, validation_rank
from model.data import Draw, Rows, in_batches
from model.devices import compiling, few_threads, memory_advice, reproducible, resolve_device
from model.learner import Learner, Step, named
from model.network import Head
from model.parallel import Processes
from model.prepare import Prepared
from model.resume import State, StateFile
from model.schedules import step_fraction

_REPORT_EVERY_S = 0.5
"""Reading the loss waits for the GPU, so it is not read at every step."""

_SAVING_FRACTION = 0.02
"""Part of the time that saving at the ends of short epochs may take."""


class Position(NamedTuple):
    """Where a training is, for people who watch."""

    seed: int
    epoch: int
    n_epochs: int
    step: int
    """Steps that are done in this epoch."""
    n_steps: int
    loss: float
    """Mean training loss of this epoch so far."""


OnEpoch = Callable[[int, dict[str, float]], None]
"""Called after each epoch with the seed and that epoch's row of the history."""
OnStep = Callable[[Position], None]
"""Called now and then within an epoch."""


@dataclass(frozen=True)
class Fitted:
    """One trained network."""

    seed: int
    network: Head
    """The head: (B, F) features → `NetworkOutput`; on the CPU, in evaluation mode."""
    backbone: Backbone
    """The one it reads; its own copy if it was fine-tuned."""
    history: pd.DataFrame
    """One row an epoch: train losses, validation macro-F1 and loss, seconds."""
    epoch: int
    """The epoch that was kept, from 1."""
    val_macro_f1: float
    val_loss: float
    diverged: bool = False
    """Whether training ended early because the loss was no number any more."""

    @property
    def validation_rank(self) -> tuple[float, float]:
        """Larger is better: macro-F1 first, then loss."""
        return validation_rank({"val_macro_f1": self.val_macro_f1, "val_loss": self.val_loss})


class Loop:
    """Trains one network of one seed; every random draw comes from the seed."""

    def __init__(
        self,
        prepared: Prepared,
        backbone: Backbone,
        config: TrainConfig,
        seed: int,
        *,
        state_file: StateFile | None = None,
    ) -> None:
        self.prepared, self.backbone, self.config, self.seed = prepared, backbone, config, seed
        self.state_file = state_file
        self.processes = Processes.current()
        self.shuffle = np.random.default_rng(seed)
        self.course = Course()
        self._started_s = self._saved_at_s = self._reported_at_s = time.monotonic()
        self._saving_s = 0.0

    def run(self, on_epoch: OnEpoch | None = None, on_step: OnStep | None = None) -> Fitted:
        """The trained network, at its best validation epoch; goes on where a state was left.

        Raises `StepFailed` when the memory does not suffice, or when the loss is no number from the first epoch on.
        """
        device = resolve_device(self.config.device)
        with (
            reproducible(self.seed, device, deterministic=self.config.deterministic),
            memory_advice(self.config),
            compiling(self.config),
        ):
            self.learner = Learner(self.prepared, self.backbone, self.config, self.seed, self.processes)
            self._begin()
            with few_threads(self._operations_per_step()):
                self._train(on_epoch, on_step)
            return self._fitted()

    def _operations_per_step(self) -> float:
        if not self.config.freeze_backbone:
            return math.inf
        return float(self.config.batch_size * sum(p.numel() for p in self.learner.head.parameters()))

    def _begin(self) -> None:
        state = self.state_file.read() if self.state_file else None
        if state is not None:
            self.course = Course.of(state, self.learner.device)
        done = self.course.finished
        self.learner.begin(None if done else state, self.shuffle)
        if state is not None and not done:
            self.shuffle.bit_generator.state = state.values["shuffle"]

    # ---- epochs --------------------------------------------------------------------------------------------------

    def _train(self, on_epoch: OnEpoch | None, on_step: OnStep | None) -> None:
        course, learner = self.course, self.learner
        while not course.finished:
            if course.step == 0:
                course.begin_epoch(self.shuffle.permutation(learner.train_rows), learner.device)
            self._started_s = time.monotonic() - course.spent_s
            row = {"epoch": float(course.epoch), **self._train_epoch(on_step), **learner.validate()}
            row["seconds"] = time.monotonic() - self._started_s
            course.close_epoch(row, learner.weights, self.config, len(learner.val_rows))
            if on_epoch is not None and self.processes.is_first:
                on_epoch(self.seed, row)
            if not course.finished:
                self._save_when_due(end_of_epoch=True)
        self._require_an_epoch()
        self._save_finished()

    def _train_epoch(self, on_step: OnStep | None) -> dict[str, float]:
        self.learner.model.train()
        course, config = self.course, self.config
        steps = self._steps(course.order)
        n_warmup = round(config.warmup_epochs * len(steps))
        left = steps[course.step :]
        draw = Draw(self.seed, course.epoch)
        inputs = self.learner.inputs.batches([rows for step in left for rows in step.batches], draw)
        for step in left:
            n_done = (course.epoch - 1) * len(steps) + course.step
            fraction = step_fraction(n_done, config.epochs * len(steps), n_warmup)
            course.sums += self.learner.train_step(step, inputs, fraction) * len(step.rows)
            course.step += 1
            self._save_when_due()
            if on_step is not None:
                self._report(on_step, steps)
        n_images = sum(len(step.rows) for step in steps)
        return named("train", self.processes.total(course.sums.clone()) / n_images)

    def _steps(self, order: Rows) -> list[Step]:
        """The epoch's steps; each process and each of its batches has nearly the same number of a step's images."""
        n, size = self.processes.n, self.config.batch_size
        steps = in_batches(order, size * self.config.accumulate_steps * n)
        if len(steps) > 1 and len(steps[-1]) < 2 * n:
            steps.pop()  # batch normalisation cannot train on one image; shuffling picks other ones next time
        n_batches = [math.ceil(math.ceil(len(rows) / n) / size) for rows in steps]
        return [
            Step(rows, np.array_split(self.processes.share(rows), n_parts))
            for rows, n_parts in zip(steps, n_batches, strict=True)
        ]

    def _report(self, on_step: OnStep, steps: list[Step]) -> None:
        now_s = time.monotonic()
        if not self.processes.is_first or now_s - self._reported_at_s < _REPORT_EVERY_S:
            return
        self._reported_at_s = now_s
        course = self.course
        n_shown = sum(len(step.rows) for step in steps[: course.step])
        loss = float(course.sums[0]) * self.processes.n / n_shown
        on_step(Position(self.seed, course.epoch, self.config.epochs, course.step, len(steps), loss))

    # ---- state ---------------------------------------------------------------------------------------------------

    def _save_when_due(self, *, end_of_epoch: bool = False) -> None:
        """Save after `save_every_s`, and at the end of an epoch unless epochs are so short that saving would rule."""
        if self.state_file is None:
            return
        waited_s = time.monotonic() - self._saved_at_s
        due = waited_s >= self.config.save_every_s or (end_of_epoch and waited_s * _SAVING_FRACTION >= self._saving_s)
        if self.processes.agreed(due):
            self._save(self._state())

    def _save(self, state: State) -> None:
        started_s = time.monotonic()
        if self.state_file is not None and self.processes.is_first:
            self.state_file.write(state)
        self._saved_at_s = time.monotonic()
        self._saving_s = self._saved_at_s - started_s

    def _state(self) -> State:
        if self.course.step:
            self.course.spent_s = time.monotonic() - self._started_s
        state = self.course.state()
        # Each process goes on with an equal part of what all have summed up.
        state.tensors["sums"] = self.processes.total(state.tensors["sums"].clone()) / self.processes.n
        state.values["shuffle"] = self.shuffle.bit_generator.state
        self.learner.put_state(state)
        return state

    def _save_finished(self) -> None:
        if self.state_file is not None and self.processes.is_first:
            self._save(self.course.state())
        self.processes.wait()

    def _require_an_epoch(self) -> None:
        if self.course.kept_epoch == 0:
            raise StepFailed(
                f"Training, seed {self.seed}: the loss was no number in the first epoch; this seed has no network.",
                remedy="Lower train.learning_rate or, with a fine-tuned backbone, train.backbone_learning_rate; "
                "train.warmup_epochs=1 helps too.",
            )

    def _fitted(self) -> Fitted:
        course, learner = self.course, self.learner
        learner.model.load_state_dict(course.kept)
        learner.backbone.module.cpu().eval().requires_grad_(False)
        is_kept = [int(row["epoch"]) == course.kept_epoch for row in course.history]
        return Fitted(
            self.seed,
            learner.head.cpu().eval(),
            learner.backbone,
            pd.DataFrame(course.history).assign(seed=self.seed, kept=is_kept),
            course.kept_epoch,
            course.kept_row["val_macro_f1"],
            course.kept_row["val_loss"],
            course.diverged,
        )
