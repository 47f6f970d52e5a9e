"""Hard caps and steady rates. Both hold across threads and event loops, so shards may share them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from annotation.vlm.schema import Usage, VlmRequest
from annotation.vlm.settings import VlmSettings
from data_contracts.errors import BudgetReached

_CHARACTERS_PER_TOKEN = 3.5
_TOKENS_PER_IMAGE_TILE = 170
_TOKENS_PER_IMAGE = 85
_TILE_PX = 512
_LOOK_AGAIN_S = 0.02


def text_tokens(n_characters: int) -> int:
    """About how many tokens a text of so many characters has; a little high rather than low."""
    return 1 + int(n_characters / _CHARACTERS_PER_TOKEN)


def image_tokens(side_px: int) -> int:
    """Tokens of one image as OpenAI counts them: a base, and so many for each tile of 512 px."""
    n_tiles = (-(-side_px // _TILE_PX)) ** 2
    return _TOKENS_PER_IMAGE + _TOKENS_PER_IMAGE_TILE * n_tiles


def most_usage(request: VlmRequest, settings: VlmSettings) -> Usage:
    """The tokens a request may be billed for: its input about as counted, its output at the limit it sets."""
    n_images = sum(isinstance(part, bytes) for part in request.parts)
    texts = [request.system, str(request.schema), *(part for part in request.parts if isinstance(part, str))]
    n_input = text_tokens(sum(map(len, texts))) + n_images * image_tokens(settings.side_px)
    return Usage(n_input, request.max_output_tokens)


class Budget:
    """Requests and money of one command: what is spent and what is reserved together never pass the caps."""

    def __init__(self, settings: VlmSettings) -> None:
        """A budget with nothing spent yet."""
        self.max_requests = settings.max_requests
        self.max_cost_usd = settings.max_cost_usd
        self.n_requests = 0
        self.usage = Usage()
        self._prices = settings.usd_per_token
        self._n_reserved = 0
        self._reserved_usd = 0.0
        self._lock = threading.Lock()

    @property
    def spent_usd(self) -> float | None:
        """Money spent so far; None where no price is known."""
        return None if self._prices is None else self._usd(self.usage)

    async def reserve(self, most: Usage) -> None:
        """Set `most` aside for one request, once others have settled; raises `BudgetReached` if it can never fit."""
        while not self._try_reserve(most):
            await asyncio.sleep(_LOOK_AGAIN_S)

    def settle(self, most: Usage, actual: Usage | None) -> None:
        """Replace a reservation by what was billed; None: nothing was answered, the request still counts."""
        with self._lock:
            self._n_reserved -= 1
            self._reserved_usd -= self._usd(most)
            self.n_requests += 1
            self.usage += actual or Usage()

    def release(self, most: Usage) -> None:
        """Give a reservation back: the request was never sent."""
        with self._lock:
            self._n_reserved -= 1
            self._reserved_usd -= self._usd(most)

    def _try_reserve(self, most: Usage) -> bool:
        with self._lock:
            reached = self._reached(most)
            if reached is None:
                self._n_reserved += 1
                self._reserved_usd += self._usd(most)
                return True
            if self._n_reserved == 0:
                raise BudgetReached(
                    f"{reached}; {self.n_requests} requests were sent, and every answer is in the journal.",
                    remedy="Give the same command again to go on for as much again, or raise the cap.",
                )
            return False

    def _reached(self, most: Usage) -> str | None:
        """The cap that one more request would pass, in words."""
        if self.max_requests is not None and self.n_requests + self._n_reserved + 1 > self.max_requests:
            return f"The cap of {self.max_requests} requests is reached"
        if self.max_cost_usd is not None:
            after_usd = self._usd(self.usage) + self._reserved_usd + self._usd(most)
            # Reservations come and go in floating point; a billionth of a dollar is no overrun.
            if after_usd > self.max_cost_usd + 1e-9:
                return f"The cap of {self.max_cost_usd:g} USD is reached"
        return None

    def _usd(self, usage: Usage) -> float:
        if self._prices is None:
            return 0.0
        return usage.input_tokens * self._prices[0] + usage.output_tokens * self._prices[1]


class Pace:
    """Evenly spaced requests: none leaves before the requests and tokens per minute allow it."""

    def __init__(self, settings: VlmSettings) -> None:
        """A pace whose first request may leave at once."""
        self._s_per_request = 60.0 / settings.requests_per_minute if settings.requests_per_minute else 0.0
        self._s_per_token = 60.0 / settings.tokens_per_minute if settings.tokens_per_minute else 0.0
        self._free_at_s = 0.0
        self._lock = threading.Lock()

    async def wait(self, most: Usage) -> None:
        """Return when a request of this size may leave."""
        n_tokens = most.input_tokens + most.output_tokens
        takes_s = max(self._s_per_request, self._s_per_token * n_tokens)
        with self._lock:
            now_s = time.monotonic()
            leaves_at_s = max(now_s, self._free_at_s)
            self._free_at_s = leaves_at_s + takes_s
        if leaves_at_s > now_s:
            await asyncio.sleep(leaves_at_s - now_s)


@asynccontextmanager
async def reserved(budget: Budget, most: Usage) -> AsyncGenerator[list[Usage]]:
    """A reservation that is always settled: the body appends what was billed, if anything was."""
    await budget.reserve(most)
    billed: list[Usage] = []
    try:
        yield billed
    finally:
        budget.settle(most, billed[0] if billed else None)
