"""Hard caps on requests and money. They hold across threads, event loops and several endpoints of one command."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass

from data_contracts.errors import BudgetReached

_LOOK_AGAIN_S = 0.02
_NO_OVERRUN_USD = 1e-9
"""Reservations come and go in floating point; a billionth of a dollar is no overrun."""


@dataclass(frozen=True)
class Spent:
    """What a budget has seen so far."""

    n_requests: int
    """Requests sent, repeated ones included."""
    usd: float
    """Money billed, as far as it is known."""
    maybe_usd: float
    """Part of it that is only possible: of requests whose answer was lost, counted at their highest price."""


class Budget:
    """Requests and money of one command: what is spent and what is reserved together never pass the caps."""

    def __init__(self, *, max_requests: int | None = None, max_cost_usd: float | None = None) -> None:
        """A budget with nothing spent yet; None: no cap."""
        self.max_requests = max_requests
        self.max_cost_usd = max_cost_usd
        self._n_requests = 0
        self._usd = 0.0
        self._maybe_usd = 0.0
        self._n_reserved = 0
        self._reserved_usd = 0.0
        self._n_held = 0
        """Of the reserved requests those of batches: they settle on another day, so nobody may wait for them."""
        self._lock = threading.Lock()

    @property
    def spent(self) -> Spent:
        """What was spent so far."""
        with self._lock:
            return Spent(self._n_requests, self._usd, self._maybe_usd)

    @property
    def committed_usd(self) -> float:
        """Spent and reserved money together: what never passes the cap."""
        with self._lock:
            return self._usd + self._reserved_usd

    async def reserve(self, most_usd: float) -> None:
        """Set the highest price of one request aside, once others have settled.

        Raises `BudgetReached` if it can never fit.
        """
        while not self._try_reserve(1, most_usd):
            await asyncio.sleep(_LOOK_AGAIN_S)

    def reserve_many(self, n_requests: int, most_usd: float) -> None:
        """Set a whole batch of requests aside; raises `BudgetReached` where it does not fit now."""
        with self._lock:
            reached = self._reached(n_requests, most_usd)
            if reached is not None:
                raise self._stop(reached)
            self._take(n_requests, most_usd)
            self._n_held += n_requests

    def settle(self, most_usd: float, billed_usd: float, *, is_lost: bool = False) -> None:
        """Replace a reservation by what was billed; `is_lost`: it may have been, and no answer came."""
        with self._lock:
            self._spend(1, most_usd, billed_usd)
            self._maybe_usd += billed_usd if is_lost else 0.0

    def settle_many(self, n_requests: int, most_usd: float, billed_usd: float, *, is_lost: bool = False) -> None:
        """Replace the reservation of a batch, or a part of it, by what was billed."""
        with self._lock:
            self._n_held -= n_requests
            self._spend(n_requests, most_usd, billed_usd)
            self._maybe_usd += billed_usd if is_lost else 0.0

    def release(self, most_usd: float) -> None:
        """Give a reservation back: the request was never sent."""
        with self._lock:
            self._take(-1, -most_usd)

    def release_many(self, n_requests: int, most_usd: float) -> None:
        """Give the reservation of a batch back."""
        with self._lock:
            self._n_held -= n_requests
            self._take(-n_requests, -most_usd)

    def fits(self, n_requests: int, most_usd: float) -> bool:
        """Whether so much more could be reserved now."""
        with self._lock:
            return self._reached(n_requests, most_usd) is None

    def _try_reserve(self, n_requests: int, most_usd: float) -> bool:
        with self._lock:
            reached = self._reached(n_requests, most_usd)
            if reached is None:
                self._take(n_requests, most_usd)
                return True
            if self._n_reserved == self._n_held:
                raise self._stop(reached)
            return False

    def _spend(self, n_requests: int, most_usd: float, billed_usd: float) -> None:
        self._take(-n_requests, -most_usd)
        self._n_requests += n_requests
        self._usd += billed_usd

    def _take(self, n_requests: int, usd: float) -> None:
        self._n_reserved += n_requests
        self._reserved_usd += usd

    def _reached(self, n_requests: int, most_usd: float) -> str | None:
        """The cap that so many more requests would pass, in words."""
        if self.max_requests is not None and self._n_requests + self._n_reserved + n_requests > self.max_requests:
            return f"The cap of {self.max_requests} requests is reached"
        if self.max_cost_usd is not None:
            after_usd = self._usd + self._reserved_usd + most_usd
            if after_usd > self.max_cost_usd + _NO_OVERRUN_USD:
                return f"The cap of {self.max_cost_usd:g} USD is reached"
        return None

    def _stop(self, reached: str) -> BudgetReached:
        spent = f"{self._n_requests} requests were sent" + (f" for {self._usd:.4f} USD" if self._usd else "")
        return BudgetReached(
            f"{reached}; {spent}, and every answer is in the journal.",
            remedy="Give the same command again to go on for as much again, or raise the cap.",
        )
