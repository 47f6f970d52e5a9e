"""When the next request may leave: configured rates, and what the endpoint itself asks for.

Nothing is repeated here; the openai client repeats what can be repeated. A pace only decides how long each attempt
waits before it leaves, so that an endpoint that says "too many" is asked less often by everybody.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque

from data_contracts.errors import Deferred

_WATCHED_S = 10.0
"""The rate at which an endpoint answers is taken over so many seconds."""
_BACK_TO = 0.7
"""Part of the rate just seen at which sending goes on after a "too many"."""
_FASTER = 0.985
"""By this factor the extra gap between requests shrinks with every answer."""
_FASTER_FROM_GUESS = 0.5
"""The same for a gap that is a guess, since nothing had been answered just before it grew."""
_FIRST_GAP_S = 0.25
_LEAST_GUESSED_S = 1.0
_MOST_GAP_S = 60.0
_NO_GAP_S = 0.002


class Pace:
    """Spaces the attempts of one endpoint, whatever thread or event loop they come from."""

    def __init__(
        self,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        max_wait_s: float = 1800.0,
    ) -> None:
        """A pace whose first request may leave at once."""
        self._s_per_request = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._s_per_token = 60.0 / tokens_per_minute if tokens_per_minute else 0.0
        self.max_wait_s = max_wait_s
        self._gap_s = 0.0
        self._is_guess = False
        self._free_at_s = 0.0
        self._held_until_s = 0.0
        self._taken_until_s = 0.0
        self._slowed_at_s = 0.0
        self._generation = 0
        self._refused_since_s: float | None = None
        self._answered_at_s: deque[float] = deque(maxlen=4096)
        self._lock = threading.Lock()

    async def wait(self, n_tokens: int) -> float:
        """The moment (monotonic seconds) at which a request of this size leaves: it returns then.

        Raises `Deferred` when the endpoint asked for more patience than `max_wait_s` since its last answer.
        """
        while True:
            with self._lock:
                now_s = time.monotonic()
                self._raise_if_deferred(now_s)
                generation = self._generation
                leaves_at_s = max(now_s, self._free_at_s, self._held_until_s)
                takes_s = max(self._s_per_request, self._s_per_token * n_tokens, self._gap_s)
                self._free_at_s = leaves_at_s + takes_s
            if leaves_at_s > now_s:
                await asyncio.sleep(leaves_at_s - now_s)
            with self._lock:
                # While this one slept the endpoint may have asked everybody to wait: then queue again.
                if generation == self._generation:
                    self._taken_until_s = max(self._taken_until_s, leaves_at_s + takes_s)
                    return time.monotonic()

    def answered(self) -> None:
        """An answer came: the endpoint is well, and may be asked a little faster again."""
        with self._lock:
            self._answered_at_s.append(time.monotonic())
            self._refused_since_s = None
            shrinks = _FASTER_FROM_GUESS if self._is_guess else _FASTER
            self._gap_s = self._gap_s * shrinks if self._gap_s > _NO_GAP_S else 0.0

    def told_to_wait(self, seconds: float, left_at_s: float) -> None:
        """The endpoint said "too many" to what left then: nobody leaves before `seconds` are over, then more slowly."""
        with self._lock:
            now_s = time.monotonic()
            if self._refused_since_s is None:
                self._refused_since_s = now_s
            # Many attempts in flight are refused together: they are one event.
            if left_at_s > self._slowed_at_s:
                self._gap_s = self._slower_gap_s(now_s, seconds)
                self._slowed_at_s = now_s
            until_s = now_s + seconds
            if until_s > self._held_until_s:
                self._held_until_s = until_s
                # All who sleep queue again, behind what has left already.
                self._free_at_s = max(until_s, self._taken_until_s)
                self._generation += 1

    @property
    def waits_s(self) -> float:
        """Seconds until the next request may leave, as far as the endpoint asked for it."""
        return max(0.0, self._held_until_s - time.monotonic())

    @property
    def gap_s(self) -> float:
        """Seconds between two requests that the endpoint's refusals have led to."""
        return self._gap_s

    def _slower_gap_s(self, now_s: float, asked_s: float) -> float:
        recent = [t for t in self._answered_at_s if now_s - t <= _WATCHED_S]
        self._is_guess = len(recent) < 2
        if self._is_guess:
            # Never far beyond what the endpoint asks for: doubled through minutes of refusals, the gap would go on to
            # hold everybody back for hours after the endpoint is well again.
            longer_s = min(2 * self._gap_s, max(asked_s, _LEAST_GUESSED_S))
            return min(_MOST_GAP_S, max(_FIRST_GAP_S, self._gap_s, longer_s))
        seen_per_s = len(recent) / max(now_s - recent[0], 1e-3)
        return min(_MOST_GAP_S, max(1 / (_BACK_TO * seen_per_s), self._gap_s))

    def _raise_if_deferred(self, now_s: float) -> None:
        if self._refused_since_s is None:
            return
        if max(now_s, self._held_until_s) - self._refused_since_s <= self.max_wait_s:
            return
        wait_s = max(0.0, self._held_until_s - now_s)
        raise Deferred(
            f"The endpoint is too busy and asks to come back in {wait_s:.0f} s; a run waits at most "
            f"vlm.max_wait_s = {self.max_wait_s:g} s for its next answer. Every answer so far is kept.",
            retry_after_s=wait_s,
            remedy="Give the same command again then, or lower vlm.concurrency and vlm.requests_per_minute.",
        )
