"""What a person sees while work goes on: lines and bars on standard error, never on standard output."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_contracts.ports import Advance

_PLAIN_INTERVAL_S = 15.0
"""Seconds between progress lines where no terminal can draw a bar."""


class Console:
    """Lines and progress bars on standard error; silent when `quiet`, apart from warnings and errors."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._rich = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self._expected: dict[str, tuple[int, int]] = {}

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

    def expect(self, title: str, total: int) -> None:
        """The next bars of this title are parts of one piece of work with `total` items, one after the other."""
        self._expected[title] = (0, total)

    @contextmanager
    def bar(self, title: str, total: int | None) -> Iterator[Advance]:
        """A progress bar; the value is the `Advance` to call with the number of items just finished."""
        done, total = self._expected.get(title, (0, total))
        with self._display(title, total) as show:
            lock = threading.Lock()

            def advance(n_items: int) -> None:
                nonlocal done
                with lock:
                    done += n_items
                    show(done)

            yield advance
        if title in self._expected and total is not None:
            self._expected[title] = (done, total)

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


_shared = Console()


def shared() -> Console:
    """The console of this process; a served flow has the plain one."""
    return _shared


def share(console: Console) -> None:
    """Make `console` the one that tasks in this process use."""
    global _shared  # noqa: PLW0603  (Prefect hands tasks plain data only; a terminal cannot travel with it)
    _shared = console
