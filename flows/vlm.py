"""The vision-language session of a run: its clients, journal, budget and rates, on one event loop for all shards.

Shards come and go, in several threads. What they share lives here: connections stay open from shard to shard, the
journal is indexed once, and caps and rates hold for all of them together.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from annotation.vlm.budget import Budget, Spent
from annotation.vlm.client import VlmClient
from annotation.vlm.estimate import Estimate
from annotation.vlm.journal import Journal
from annotation.vlm.preflight import price_of, require_key, require_model, require_price, require_room_in_cap
from annotation.vlm.probe import PROBE_VERSION, Capabilities, probe
from annotation.vlm.settings import VlmSettings
from annotation.vlm.transports import release_models, transport_for
from data_contracts.errors import MedMicnError, StoppedResumable
from flows.chain import Context
from flows.settings import EndpointSettings, api_key, proxy_for

T = TypeVar("T")


class VlmSession:
    """The clients of one run in this process. Safe for several threads."""

    def __init__(self, context: Context, budget: Budget) -> None:
        """A session whose clients are made when they are first needed; `budget` outlives it within one command."""
        self.budget = budget
        self.journal = Journal(context.run.journal_dir)
        self._context = context
        self._endpoints = context.settings.vlm.endpoints
        self._clients: dict[int, VlmClient] = {}
        self._kept: dict[str, Any] = {}
        self._asked: set[asyncio.Task[Any]] = set()
        self._is_closed = False
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="medmicn-vlm", daemon=True)
        self._thread.start()

    def client(self, witness: int = 0) -> VlmClient:
        """The client of the `witness`-th model; raises `ConfigurationError` where its key or price is missing."""
        with self._lock:
            if witness not in self._clients:
                self._clients[witness] = self._made(self._endpoints[witness])
            return self._clients[witness]

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, made once for all shards of this session."""
        with self._lock:
            if name not in self._kept:
                self._kept[name] = make()
            return self._kept[name]

    def call(self, ask: Callable[[VlmClient], Awaitable[T]], witness: int = 0) -> T:
        """What `ask` brings back for this client, from the session's event loop.

        Raises what `ask` raises, and `StoppedResumable` when the session was closed meanwhile.
        """
        client = self.client(witness)

        async def awaited() -> T:
            task = asyncio.current_task()
            assert task is not None
            self._asked.add(task)
            try:
                return await ask(client)
            finally:
                self._asked.discard(task)

        with self._lock:
            if self._is_closed:
                raise _stopped()
            future = asyncio.run_coroutine_threadsafe(awaited(), self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise _stopped() from error
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Stop whatever is still under way and put the journal on the disk."""
        with self._lock:
            # From here on nothing is handed to the loop, which would never come back to it.
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.journal.close()
        release_models()

    async def _close(self) -> None:
        if any(client.is_stopping for client in self._clients.values()) and self._asked:
            # A clean stop: the other shards, too, wait for what they have sent, since it is paid for.
            await asyncio.wait(set(self._asked), timeout=max(c.settings.timeout_s for c in self._clients.values()))
        # What was asked ends its own parts, in order. Torn out one by one, a part that has not begun would leave a
        # coroutine behind that nobody awaits.
        await _cancelled(self._asked)
        # Parts of what had failed before.
        await _cancelled(task for task in asyncio.all_tasks() if task is not asyncio.current_task())
        for client in self._clients.values():
            await client.raw.close()

    def _made(self, endpoint: EndpointSettings) -> VlmClient:
        key, price = api_key(endpoint), price_of(endpoint)
        require_key(endpoint, has_key=key is not None, key_variable=endpoint.api_key_env)
        cap_usd = self._context.settings.vlm.max_cost_usd
        require_price(endpoint.model_copy(update={"max_cost_usd": cap_usd}), price)
        transport = transport_for(endpoint, proxy=proxy_for(endpoint), offline=self._context.settings.privacy.offline)
        client = VlmClient(endpoint, key, self.journal, budget=self.budget, price=price, transport=transport)
        found = stored_capabilities(self._context, endpoint)
        client.image_tokens = None if found is None else found.tokens_per_image
        return client


class VlmSessions:
    """The sessions of this process by run folder, and what each command has spent."""

    def __init__(self) -> None:
        self._open: dict[str, VlmSession] = {}
        self._budgets: dict[str, Budget] = {}
        self._ended: set[str] = set()
        self._lock = threading.Lock()

    def begin(self, context: Context) -> VlmSession:
        """The run's session, opened if there is none."""
        with self._lock:
            name = str(context.run.path)
            self._ended.discard(name)
            return self._opened(name, context)

    def of(self, context: Context) -> VlmSession:
        """The run's session for a shard; raises `StoppedResumable` when the step that handed it out has ended."""
        with self._lock:
            name = str(context.run.path)
            if name in self._ended:
                raise _stopped()
            return self._opened(name, context)

    def end(self, context: Context) -> Spent:
        """Close the run's session; returns what this command has spent so far."""
        with self._lock:
            name = str(context.run.path)
            self._ended.add(name)
            session = self._open.pop(name, None)
        if session is not None:
            session.close()
        return self.spent(context)

    def spent(self, context: Context) -> Spent:
        """What this command has spent so far on this run."""
        budget = self._budgets.get(str(context.run.path))
        return Spent(0, 0.0, 0.0) if budget is None else budget.spent

    def _opened(self, name: str, context: Context) -> VlmSession:
        if name not in self._open:
            vlm = context.settings.vlm
            budget = self._budgets.setdefault(
                name, Budget(max_requests=vlm.max_requests, max_cost_usd=vlm.max_cost_usd)
            )
            self._open[name] = VlmSession(context, budget)
        return self._open[name]


SESSIONS = VlmSessions()


def ready(context: Context, session: VlmSession, witness: int, expected: Estimate | None = None) -> VlmClient:
    """The client of a model that was found fit: right name, enough cap, sees images. Asks each endpoint once a run.

    Raises:
        ConfigurationError: key, price, cap or model name is wrong; no image was sent.
        EndpointError: it is down, refuses the key, ignores images or keeps no schema; no image was sent.
    """
    client = session.client(witness)
    endpoint = context.settings.vlm.endpoints[witness]
    if expected is not None:
        require_room_in_cap(context.settings.vlm, expected.most_usd_per_request)
    if endpoint.is_embedded or stored_capabilities(context, endpoint) is not None:
        return client
    session.call(require_model, witness)
    if endpoint.probe:
        context.console.say(f"  testing {endpoint_name(endpoint)} with drawn pictures …")
        found = session.call(probe, witness)
        for line in found.lines():
            context.console.say(f"    {line}")
        client.image_tokens = found.tokens_per_image
        _store(context, found)
    return client


def require_models(context: Context) -> None:
    """Raise `ConfigurationError` or `EndpointError` for an endpoint that cannot be used; nothing costly is sent."""
    remote = [w for w, endpoint in enumerate(context.settings.vlm.endpoints) if endpoint.is_remote]
    if not remote:
        return
    session = SESSIONS.begin(context)
    try:
        for witness in remote:
            session.call(require_model, witness)
    finally:
        SESSIONS.end(context)


def stored_capabilities(context: Context, endpoint: VlmSettings) -> Capabilities | None:
    """What an earlier probe of this endpoint found; None where there was none, or one with other settings."""
    content = context.run.read_manifest().endpoints.get(endpoint_name(endpoint))
    expected = {"version": PROBE_VERSION, "probability": endpoint.probability, "side_px": endpoint.side_px}
    if content is None or any(content.get(name) != value for name, value in expected.items()):
        return None
    return Capabilities(**content)


def endpoint_name(endpoint: VlmSettings) -> str:
    """An endpoint for people and for the manifest."""
    return f"{endpoint.model} at {endpoint.base_url}"


def _store(context: Context, found: Capabilities) -> None:
    manifest = context.run.read_manifest()
    manifest.endpoints[f"{found.model} at {found.base_url}"] = found.as_dict()
    context.run.write_manifest(manifest)


async def _cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Return once all of these have ended."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)


def _stopped() -> MedMicnError:
    return StoppedResumable("Judging was stopped; every answer so far is kept.")
