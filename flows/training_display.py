"""What a person sees while networks are trained: seed, epoch, loss and the time that is left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flows.console import Console

if TYPE_CHECKING:
    from model.loop import Position

_LINE_INTERVAL_S = 15.0
"""Seconds between lines where no terminal can draw a bar."""

Show = Callable[[float, str], None]
"""Takes the epochs that are done, of all seeds, and a text."""


class TrainingDisplay:
    """Hears of epochs and steps of all seeds, and shows them."""

    def __init__(self, seeds: Sequence[int], n_epochs: int, show: Show) -> None:
        self._seeds, self._n_epochs, self._show = list(seeds), n_epochs, show

    def on_step(self, position: Position) -> None:
        """Show where in an epoch the training is."""
        done = position.epoch - 1 + position.step / position.n_steps
        self._say(position.seed, done, f"epoch {position.epoch}, loss {position.loss:.3f}")

    def on_epoch(self, seed: int, row: Mapping[str, float]) -> None:
        """Show an epoch that has ended."""
        text = f"epoch {row['epoch']:.0f}, loss {row['train_loss']:.3f}"
        if not math.isnan(row["val_macro_f1"]):  # there are validation images
            text += f", validation macro F1 {row['val_macro_f1']:.3f}"
        self._say(seed, row["epoch"], text)

    def _say(self, seed: int, n_epochs_done: float, text: str) -> None:
        self._show(self._seeds.index(seed) * self._n_epochs + n_epochs_done, f"seed {seed}, {text}")


@contextmanager
def training_display(console: Console, seeds: Sequence[int], n_epochs: int) -> Iterator[TrainingDisplay]:
    """A bar over all epochs of all seeds on a terminal, a line now and then elsewhere, nothing when quiet."""
    screen = RichConsole(stderr=True)
    if console.quiet or not screen.is_terminal:
        yield TrainingDisplay(seeds, n_epochs, _Lines(console, len(seeds) * n_epochs))
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task("training", total=len(seeds) * n_epochs, text="")
        yield TrainingDisplay(seeds, n_epochs, lambda done, text: progress.update(task, completed=done, text=text))


class _Lines:
    """A line every few seconds."""

    def __init__(self, console: Console, n_epochs: int) -> None:
        self._console, self._n_epochs = console, n_epochs
        self._started_s = self._last_s = time.monotonic()
        self._first: float | None = None

    def __call__(self, done: float, text: str) -> None:
        now_s = time.monotonic()
        if self._first is None:
            self._first, self._started_s = done, now_s  # a training that goes on did not do all this just now
        if now_s - self._last_s < _LINE_INTERVAL_S:
            return
        self._last_s = now_s
        left_s = (now_s - self._started_s) / max(done - self._first, 1e-9) * (self._n_epochs - done)
        eta = f", about {left_s:.0f} s left" if done > self._first else ""
        self._console.say(f"  training: {text}{eta}")
