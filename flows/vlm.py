"""One vision-language client per event loop, over the run's journal and the key from the environment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from annotation.vlm.budget import Budget, Pace
from annotation.vlm.client import VlmClient
from annotation.vlm.journal import Journal
from flows.chain import Context
from flows.settings import Settings, api_key


@asynccontextmanager
async def open_client(context: Context, budget: Budget, pace: Pace | None = None) -> AsyncIterator[VlmClient]:
    """A client for the configured endpoint and the run's journal, both closed at the end."""
    settings = context.settings
    with Journal(context.run.journal_dir) as journal:
        async with VlmClient(settings.vlm, api_key(settings), journal, budget, pace=pace) as client:
            yield client


class SharedLimits:
    """Caps and rates of this process, by run folder: the shards of one run spend from one budget."""

    def __init__(self) -> None:
        self._by_run: dict[str, tuple[Budget, Pace]] = {}

    def begin(self, context: Context) -> None:
        """Start a step with nothing spent."""
        self._by_run[str(context.run.path)] = _fresh(context.settings)

    def of(self, context: Context) -> tuple[Budget, Pace]:
        """Budget and pace of this run in this process."""
        return self._by_run.setdefault(str(context.run.path), _fresh(context.settings))


def _fresh(settings: Settings) -> tuple[Budget, Pace]:
    return Budget(settings.vlm), Pace(settings.vlm)


LIMITS = SharedLimits()
