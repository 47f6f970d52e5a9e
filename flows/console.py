"""What a person sees while work goes on: lines and bars on standard error, never on standard output."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_contracts.ports import Advance, ignore_progress

_PLAIN_INTERVAL_S = 15.0
"""Seconds between progress lines where no terminal can draw a bar."""


class Console:
    """Lines and progress bars on standard error; silent when `quiet`, apart from warnings and errors."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._rich = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self._bars: dict[str, _Bar] = {}
        self._lock = threading.Lock()

    def say(self, text: str = "") -> None:
        """One line for information. Text is shown as it is: markup in names or answers has no effect."""
        if not self.quiet:
            self._rich.print(text, markup=False)

    def title(self, text: str) -> None:
        """One emphasised line."""
        if not self.quiet:
            self._rich.print(text, markup=False, style="bold")

    def warn(self, text: str) -> None:
        """One warning line, shown even when quiet."""
        self._rich.print(f"warning: {text}", markup=False, style="yellow")

    def error(self, text: str) -> None:
        """One error line, shown even when quiet."""
        self._rich.print(f"error: {text}", markup=False, style="red")

    @contextmanager
    def bar(self, title: str, total: int | None) -> Iterator[Advance]:
        """A progress bar; the value is the `Advance` to call with the number of items just finished.

        A bar that is asked for while one of the same title is shown is that one: shards advance the bar of their step.
        """
        with self._lock:
            shown = self._bars.get(title)
            if shown is None:
                shown = self._bars[title] = _Bar(ExitStack())
                shown.show = shown.stack.enter_context(self._display(title, total))
            shown.n_users += 1
        try:
            yield shown.advance
        finally:
            with self._lock:
                shown.n_users -= 1
                if not shown.n_users:
                    del self._bars[title]
                    shown.stack.close()

    @contextmanager
    def _display(self, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
        if self.quiet:
            yield lambda _done: None
        elif self._rich.is_terminal:
            with self._terminal_bar(title, total) as show:
                yield show
        else:
            yield self._plain_bar(title, total)

    @contextmanager
    def _terminal_bar(self, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
        columns = (
            TextColumn("{task.description:<26}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._rich, transient=True) as progress:
            task = progress.add_task(title, total=total)
            yield lambda done: progress.update(task, completed=done)

    def _plain_bar(self, title: str, total: int | None) -> Callable[[int], None]:
        last = time.monotonic()

        def show(done: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _PLAIN_INTERVAL_S and done != total:
                last = now
                self.say(f"  {title}: {done}" + (f" of {total}" if total else ""))

        return show


class _Bar:
    """One bar on the screen, advanced by one or several pieces of work."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.show: Callable[[int], None] = ignore_progress
        self.n_users = 0
        self._n_done = 0
        self._lock = threading.Lock()

    def advance(self, n_items: int) -> None:
        with self._lock:
            self._n_done += n_items
            self.show(self._n_done)


_shared = Console()


def shared() -> Console:
    """The console of this process; a served flow has the plain one."""
    return _shared


def share(console: Console) -> None:
    """Make `console` the one that tasks in this process use."""
    global _shared  # noqa: PLW0603  (Prefect hands tasks plain data only; a terminal cannot travel with it)
    _shared = console
