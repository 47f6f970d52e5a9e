from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from annotation.vlm.client import VlmClient
from annotation.vlm.estimate import Work, estimate
from annotation.vlm.journal import Record
from annotation.vlm.prices import Price
from annotation.vlm.probe import PROBE_VERSION, Capabilities
from annotation.vlm.schema import VlmRequest
from data_contracts.errors import (
    BudgetReached,
    ConfigurationError,
    EndpointError,
    ExitCode,
    MedMicnError,
    StoppedResumable,
)
from data_contracts.manifest import RunManifest
from data_contracts.store import RunFolder
from flows import vlm
from flows.chain import Context, overlapping
from flows.console import Console
from flows.settings import Settings
from flows.vlm import VlmSession, VlmSessions, ready, stored_capabilities

REMOTE = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "max_retries": 0}


def request(n: object) -> VlmRequest:
    return VlmRequest("s", (str(n),), "n", {}, 50)


class Endpoint:
    """An endpoint that answers at once, or holds every request back until it is let go."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.sent: list[str] = []
        self.threads: set[int] = set()
        self.n_cancelled = 0
        self.in_flight = self.most_in_flight = 0
        self.status = 200

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.sent.append(request.url.path)
        self.threads.add(threading.get_ident())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0.005)
            while not self.may_answer.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.n_cancelled += 1
            raise
        finally:
            self.in_flight -= 1
        if request.url.path.endswith("/models"):
            return httpx2.Response(200, json={"data": [{"id": "m"}]})
        choice = {"finish_reason": "stop", "message": {"content": "{}"}}
        usage = {"prompt_tokens": 10, "completion_tokens": 5}
        return httpx2.Response(self.status, json={"id": "r", "choices": [choice], "usage": usage})

    def wait_for(self, n_in_flight: int) -> None:
        deadline_s = time.monotonic() + 5
        while self.in_flight < n_in_flight:
            assert time.monotonic() < deadline_s
            time.sleep(0.005)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    """What every session of this test talks to."""
    found = Endpoint()
    monkeypatch.setattr("flows.vlm.transport_for", lambda *_a, **_k: httpx2.MockTransport(found))
    return found


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., Context]:
    def make(name: str = "run", also: tuple[dict[str, Any], ...] = (), **changes: Any) -> Context:
        run = RunFolder(tmp_path / name)
        if not run.exists:
            run.write_manifest(RunManifest.new(name, "source"))
        settings = Settings.model_validate({"vlm": REMOTE | changes | {"also": also}})
        return Context(run, settings, Console(quiet=True))

    return make


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Iterator[VlmSessions]:
    """The sessions of a fresh process."""
    found = VlmSessions()
    monkeypatch.setattr("flows.vlm.SESSIONS", found)
    yield found
    for session in list(found._open.values()):
        session.close()


def ask(session: VlmSession, n: object, witness: int = 0) -> Any:
    return session.call(lambda client: client.send(request(n)), witness)


def outcome(work: Callable[[], Any]) -> Any:
    """What came of it, an error included."""
    try:
        return work()
    except MedMicnError as error:
        return error


# ---- one loop for all ---------------------------------------------------------------------------------------------


def test_threads_share_one_loop_one_journal_and_one_limit(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions
) -> None:
    context = make_context(concurrency=3)
    session = sessions.begin(context)
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(lambda n: ask(session, n), range(24)))
    assert all(isinstance(r, Record) for r in records)
    assert len({r.key for r in records}) == 24
    assert len(endpoint.threads) == 1
    assert endpoint.most_in_flight == 3
    assert sessions.end(context).n_requests == 24


def test_what_is_raised_while_asking_reaches_the_thread_that_asked(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions
) -> None:
    session = sessions.begin(make_context())
    endpoint.status = 401
    with ThreadPoolExecutor(2) as pool:
        failed = pool.submit(ask, session, 1)
        with pytest.raises(EndpointError, match="refused the key"):
            failed.result()
    endpoint.status = 200
    assert isinstance(ask(session, 2), Record)


def test_what_is_kept_is_made_once_for_all_threads(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions
) -> None:
    session, made = sessions.begin(make_context()), []

    def make() -> object:
        made.append(1)
        time.sleep(0.02)
        return object()

    with ThreadPoolExecutor(8) as pool:
        kept = set(pool.map(lambda _: session.kept("plans", make), range(8)))
    assert (len(kept), len(made)) == (1, 1)
    assert session.kept("reader", make) not in kept


def test_each_model_has_a_client_of_its_own_on_one_journal_and_one_budget(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions
) -> None:
    context = make_context(also=(REMOTE | {"model": "n"},), max_requests=3)
    session = sessions.begin(context)
    first, second = session.client(0), session.client(1)
    assert (first.settings.model, second.settings.model) == ("m", "n")
    assert session.client(1) is second
    assert first.journal is second.journal
    assert first.budget is second.budget
    for n, witness in ((1, 0), (1, 1), (2, 1)):
        assert isinstance(ask(session, n, witness), Record)
    with pytest.raises(BudgetReached, match="cap of 3 requests"):
        ask(session, 2, 0)


# ---- the end ------------------------------------------------------------------------------------------------------


def test_closing_cancels_what_is_under_way_and_says_that_it_can_go_on(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions
) -> None:
    context = make_context(concurrency=3)
    session = sessions.begin(context)
    endpoint.may_answer.clear()
    with ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(outcome, lambda n=n: ask(session, n)) for n in range(5)]
        endpoint.wait_for(3)
        start_s = time.monotonic()
        sessions.end(context)
        ended = [future.result(5) for future in asked]
    assert time.monotonic() - start_s < 2
    assert {type(e) for e in ended} == {StoppedResumable}
    assert {e.exit_code for e in ended} == {ExitCode.RESUMABLE}
    assert "every answer so far is kept" in str(ended[0])
    assert (len(endpoint.sent), endpoint.n_cancelled) == (3, 3)


def test_what_was_answered_before_the_end_is_kept(make_context: Any, endpoint: Endpoint, sessions: VlmSessions) -> None:
    context = make_context()
    session = sessions.begin(context)
    ask(session, 1)
    endpoint.may_answer.clear()
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(outcome, lambda: ask(session, 2))
        endpoint.wait_for(1)
        sessions.end(context)
        assert isinstance(hanging.result(5), StoppedResumable)
    assert len(endpoint.sent) == 2
    endpoint.may_answer.set()
    again = sessions.begin(context)
    assert again is not session
    answers = [again.call(lambda client, n=n: client.ask(request(n), json.loads)) for n in (1, 2)]
    assert [a.from_journal for a in answers] == [True, False]


def test_a_closed_session_refuses_at_once(make_context: Any, endpoint: Endpoint, sessions: VlmSessions) -> None:
    context = make_context()
    session = sessions.begin(context)
    ask(session, 1)
    sessions.end(context)
    with pytest.raises(StoppedResumable):
        ask(session, 2)
    assert len(endpoint.sent) == 1


def test_nobody_waits_for_ever_however_calls_and_the_end_fall_together(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions
) -> None:
    context = make_context(concurrency=2)

    def ask_until_stopped(session: VlmSession, worker: int, stopped: list[MedMicnError]) -> None:
        for n in range(10_000):
            found = outcome(lambda n=n: ask(session, (worker, n)))
            if isinstance(found, MedMicnError):
                stopped.append(found)
                return

    for pause_s in (0.0, 0.01, 0.03):
        session, stopped = sessions.begin(context), list[MedMicnError]()
        # Daemons, so that one who does wait for ever fails this test and holds nothing else up.
        workers = [
            threading.Thread(target=ask_until_stopped, args=(session, k, stopped), daemon=True) for k in range(8)
        ]
        for worker in workers:
            worker.start()
        time.sleep(pause_s)
        sessions.end(context)
        for worker in workers:
            worker.join(5)
        assert [type(e) for e in stopped] == [StoppedResumable] * 8


def test_late_shards_of_an_ended_step_are_refused_until_the_next_one_begins(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions
) -> None:
    context, other = make_context(), make_context("other")
    session = sessions.begin(context)
    assert sessions.of(context) is session
    elsewhere = sessions.begin(other)
    sessions.end(context)
    with pytest.raises(StoppedResumable):
        sessions.of(context)
    assert sessions.of(other) is elsewhere
    assert sessions.begin(context) is sessions.of(context)
    assert isinstance(ask(sessions.of(context), 1), Record)


def test_a_worker_that_saw_no_beginning_opens_its_own(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions
) -> None:
    context = make_context()
    assert isinstance(ask(sessions.of(context), 1), Record)
    assert sessions.end(context).n_requests == 1


def test_ending_twice_or_without_a_beginning_does_no_harm(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions
) -> None:
    context = make_context()
    assert sessions.end(context).n_requests == 0
    ask(sessions.begin(context), 1)
    assert [sessions.end(context).n_requests for _ in range(2)] == [1, 1]


def test_the_first_error_of_a_shard_ends_the_others(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions
) -> None:
    context = make_context()
    endpoint.may_answer.clear()
    started: list[int] = []

    def shard(_context: Context, work: Any) -> None:
        started.append(work["n"])
        if work["n"] == 1:
            endpoint.wait_for(1)
            raise EndpointError("down")
        ask(sessions.of(context), work["n"])

    def step() -> None:
        try:
            # The second shard fails while the first one hangs.
            overlapping(context, shard, [{"n": n} for n in range(6)])
        finally:
            sessions.end(context)

    sessions.begin(context)
    start_s = time.monotonic()
    # Without the error being noticed, this is what would let the step end at all.
    let_go = threading.Timer(6, endpoint.may_answer.set)
    let_go.start()
    with pytest.raises(EndpointError, match="down"):
        step()
    let_go.cancel()
    assert time.monotonic() - start_s < 5
    deadline_s = time.monotonic() + 5
    while endpoint.n_cancelled < 1 or endpoint.in_flight:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    # At most the worker that failed had already taken up one more.
    assert len(started) <= 3


# ---- money --------------------------------------------------------------------------------------------------------


def test_the_budget_outlives_the_session_within_one_command(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions
) -> None:
    context = make_context(max_requests=3)
    # Proposing and judging are two steps of one command.
    for n in (1, 2):
        ask(sessions.begin(context), n)
        assert sessions.end(context).n_requests == n
    session = sessions.begin(context)
    ask(session, 3)
    with pytest.raises(BudgetReached, match="cap of 3 requests"):
        ask(session, 4)
    assert sessions.end(context).n_requests == 3
    assert len(endpoint.sent) == 3
    assert sessions.spent(make_context("other")).n_requests == 0


def test_the_next_command_may_spend_as_much_again(make_context: Any, endpoint: Endpoint) -> None:
    context = make_context(max_requests=1)
    for n in (1, 2):
        process = VlmSessions()
        ask(process.begin(context), n)
        assert process.end(context).n_requests == 1


def test_a_missing_key_or_price_is_refused_before_anything_is_sent(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    openai = {"base_url": "https://api.openai.com/v1", "api_key_env": "MY_KEY"}
    with pytest.raises(ConfigurationError, match="MY_KEY is not set"):
        ask(sessions.begin(make_context("keyless", **openai)), 1)
    with pytest.raises(ConfigurationError, match="max_cost_usd = 1 cannot be kept"):
        ask(sessions.begin(make_context("priceless", max_cost_usd=1)), 1)
    # The cap holds for all models together, so each of them needs a price.
    prices = {"input_usd_per_million_tokens": 1.0, "output_usd_per_million_tokens": 1.0}
    context = make_context("second", also=(REMOTE | {"model": "n"},), max_cost_usd=1, **prices)
    session = sessions.begin(context)
    assert isinstance(ask(session, 1), Record)
    with pytest.raises(ConfigurationError, match="price of 'n'"):
        ask(session, 1, witness=1)
    assert len(endpoint.sent) == 1


# ---- fit for use --------------------------------------------------------------------------------------------------


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were probed, all of them good ones whose images have 321 tokens."""
    found: list[str] = []

    async def probe(client: VlmClient) -> Capabilities:
        await client.send(request("drawn picture"))
        found.append(client.settings.model)
        return Capabilities(
            version=PROBE_VERSION,
            probed_at="2026-11-01T00:00:00+00:00",
            base_url=client.settings.base_url,
            model=client.settings.model,
            probability=client.settings.probability,
            side_px=client.settings.side_px,
            sees_images=True,
            n_right=4,
            keeps_schema=True,
            logprobs=True,
            reports_usage=True,
            tokens_per_image=321,
            seconds_per_answer=1.5,
        )

    monkeypatch.setattr("flows.vlm.probe", probe)
    return found


def test_an_endpoint_is_tested_once_a_run_and_what_was_found_is_used(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions, probed: list[str]
) -> None:
    context = make_context()
    client = ready(context, sessions.begin(context), 0)
    assert client.image_tokens == 321
    assert [path.rpartition("/")[2] for path in endpoint.sent] == ["models", "completions"]
    sessions.end(context)

    again = ready(context, sessions.begin(context), 0)
    assert (again.image_tokens, probed, len(endpoint.sent)) == (321, ["m"], 2)
    stored = stored_capabilities(context, context.settings.vlm)
    assert stored is not None
    assert stored.tokens_per_image == 321


@pytest.mark.parametrize("change", [{"image_side_px": 1024}, {"probability": "logprobs"}, {"model": "n"}])
def test_what_was_found_with_other_settings_is_not_used(
    make_context: Any,
    endpoint: Endpoint,
    sessions: VlmSessions,
    probed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
) -> None:
    monkeypatch.setattr("flows.vlm.require_model", lambda _client: asyncio.sleep(0))
    context = make_context()
    ready(context, sessions.begin(context), 0)
    sessions.end(context)
    changed = make_context(**change)
    assert stored_capabilities(changed, changed.settings.vlm) is None
    ready(changed, sessions.begin(changed), 0)
    assert len(probed) == 2


def test_an_older_probe_is_not_trusted(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions, probed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context()
    ready(context, sessions.begin(context), 0)
    monkeypatch.setattr(vlm, "PROBE_VERSION", PROBE_VERSION + 1)
    assert stored_capabilities(context, context.settings.vlm) is None


def test_a_model_that_fails_the_test_is_not_remembered_as_tested(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def blind(_client: VlmClient) -> Capabilities:
        raise EndpointError("does not see images")

    monkeypatch.setattr("flows.vlm.probe", blind)
    context = make_context()
    for _ in range(2):
        with pytest.raises(EndpointError, match="does not see"):
            ready(context, sessions.begin(context), 0)
    assert context.run.read_manifest().endpoints == {}


def test_a_wrong_model_name_is_refused_before_it_is_tested(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions, probed: list[str]
) -> None:
    context = make_context(model="mm")
    with pytest.raises(ConfigurationError, match="no model 'mm'"):
        ready(context, sessions.begin(context), 0)
    assert probed == []


def test_a_cap_below_one_request_is_refused_before_anything_is_sent(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions, probed: list[str]
) -> None:
    prices = {"input_usd_per_million_tokens": 1000.0, "output_usd_per_million_tokens": 1000.0}
    context = make_context(max_cost_usd=0.01, **prices)
    expected = estimate([Work(request(1), 10)], context.settings.vlm, Price(1e-3, 1e-3, "test"))
    with pytest.raises(ConfigurationError, match="below the price of one request"):
        ready(context, sessions.begin(context), 0, expected)
    assert endpoint.sent == []


def test_without_probing_only_the_name_is_checked(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions, probed: list[str]
) -> None:
    context = make_context(probe=False)
    ready(context, sessions.begin(context), 0)
    assert (probed, endpoint.sent) == ([], ["/v1/models"])


def test_the_embedded_endpoint_is_known_and_not_tested(
    make_context: Any, endpoint: Endpoint, sessions: VlmSessions, probed: list[str]
) -> None:
    context = make_context(base_url="embedded")
    ready(context, sessions.begin(context), 0)
    assert (probed, endpoint.sent) == ([], [])
