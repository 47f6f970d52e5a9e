"""Prices against the package's own calculation, and the hosts and models that have none."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import genai_prices
import pytest
from genai_prices import data_snapshot, types
from genai_prices.data import providers
from hypothesis import given, settings
from hypothesis import strategies as st

from annotation.vlm import prices
from annotation.vlm.prices import Price, known_price

OPENAI = "https://api.openai.com/v1"
HOSTS = {
    "openai": OPENAI,
    "azure": "https://my-hospital.openai.azure.com/openai/v1",
    "anthropic": "https://api.anthropic.com/v1/",
    "google": "https://generativelanguage.googleapis.com/v1beta/openai/",
    "mistral": "https://api.mistral.ai/v1",
    "openrouter": "https://openrouter.ai/api/v1",
    "groq": "https://api.groq.com/openai/v1",
    "together": "https://api.together.xyz/v1",
    "fireworks": "https://api.fireworks.ai/inference/v1",
    "deepseek": "https://api.deepseek.com",
    "x-ai": "https://api.x.ai/v1",
}
Listed = types.ModelPrice | list[types.ConditionalPrice]
ALL_LISTED = [(p.id, model.id) for p in providers if p.id in HOSTS for model in p.models]


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    known_price.cache_clear()
    yield
    known_price.cache_clear()


def million(value: Decimal) -> float:
    """Price of one token where this is the price of a million."""
    return float(value) / 1e6


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Listed], Price | None]:
    """What is known of a model that api.example.com sells at a listed price."""

    def known(listed: Listed) -> Price | None:
        model = types.ModelInfo("m", types.ClauseEquals("m"), prices=listed)
        provider = types.Provider("example", "Example", r"https://api\.example\.com", models=[model])
        snapshot = data_snapshot.DataSnapshot(providers=[provider], from_auto_update=False)
        monkeypatch.setattr(prices, "_bundled", lambda: snapshot)
        return known_price("m", "https://api.example.com/v1")

    return known


def test_a_known_price_is_what_the_package_calculates() -> None:
    usage = genai_prices.Usage(input_tokens=1_000_000, output_tokens=1_000_000)
    theirs = genai_prices.calc_price(usage, "gpt-4o-mini", provider_id="openai")
    price = known_price("gpt-4o-mini", OPENAI)
    assert price == Price(
        pytest.approx(million(theirs.input_price)),
        pytest.approx(million(theirs.output_price)),
        f"genai-prices {genai_prices.__version__}: openai/gpt-4o-mini",
    )
    assert price.input_usd_per_token > 0


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("azure", "gpt-4o-mini"),
        ("anthropic", "claude-sonnet-4-5"),
        ("google", "gemini-2.5-flash"),
        ("google", "models/gemini-2.5-flash"),
        ("mistral", "mistral-small-latest"),
        ("openrouter", "openai/gpt-4o-mini"),
        ("x-ai", "grok-4"),
    ],
)
def test_each_providers_own_price_is_found_by_its_host(provider: str, model: str) -> None:
    price = known_price(model, HOSTS[provider])
    assert price is not None
    assert f": {provider}/" in price.source


@pytest.mark.parametrize("provider", HOSTS)
def test_every_provider_is_found_by_its_host(provider: str) -> None:
    assert prices._provider_id(HOSTS[provider]) == provider


@pytest.mark.parametrize(
    "base_url",
    [
        "http://localhost:8000/v1",
        "http://localhost:11434/v1",
        "http://10.0.0.7/v1",
        "https://vllm.my-hospital.org/v1",
        # Names that only look like a provider's.
        "https://api.openai.com.my-hospital.org/v1",
        "https://my-hospital.org/api.openai.com/v1",
        "http://localhost/x.openai.azure.com/v1",
        "https://localhost:8000/.googleapis.com/v1",
        "https://notopenrouter.ai/api/v1",
        "embedded",
        "transformers",
        "",
        "http://[::1",
    ],
)
def test_a_host_of_no_provider_has_no_price_whatever_the_model(base_url: str) -> None:
    assert known_price("gpt-4o-mini", base_url) is None


def test_letters_and_port_of_the_address_do_not_matter() -> None:
    assert known_price("gpt-4o-mini", "HTTPS://API.OpenAI.com:443/v1") == known_price("gpt-4o-mini", OPENAI)


@pytest.mark.parametrize(
    ("model", "base_url"),
    [
        ("no-such-model", OPENAI),
        ("", OPENAI),
        # Sold by another provider.
        ("claude-sonnet-4-5", OPENAI),
        # Listed without a price, without an output price, and with a fee for each request.
        ("gemma-3-27b-it", HOSTS["google"]),
        ("text-embedding-3-small", OPENAI),
        ("sonar", "https://api.perplexity.ai"),
    ],
)
def test_an_unknown_price_is_none(model: str, base_url: str) -> None:
    assert known_price(model, base_url) is None


@given(st.sampled_from(ALL_LISTED), st.integers(1, 100_000), st.integers(0, 23))
@settings(max_examples=40, deadline=None)
def test_no_listed_request_is_billed_above_the_price(entry: tuple[str, str], n_input: int, hours: int) -> None:
    provider, model = entry
    price = known_price(model, HOSTS[provider])
    if price is None:
        return
    usage = genai_prices.Usage(input_tokens=n_input, output_tokens=1000)
    at = datetime.now(UTC) + timedelta(hours=hours)
    billed = genai_prices.calc_price(usage, model, provider_id=provider, genai_request_timestamp=at)
    ours = n_input * price.input_usd_per_token + 1000 * price.output_usd_per_token
    assert float(billed.total_price) <= ours * (1 + 1e-9)


def test_a_longer_prompt_is_priced_at_its_tier(priced: Callable[[Listed], Price | None]) -> None:
    tiers = [types.Tier(32_000, Decimal(3)), types.Tier(100_000, Decimal(9))]
    price = priced(types.ModelPrice(input_mtok=types.TieredPrices(Decimal(1), tiers), output_mtok=Decimal(5)))
    assert price is not None
    # 100,000 tokens are above the first tier's start, and not above the second's.
    assert (price.input_usd_per_token, price.output_usd_per_token) == (pytest.approx(3e-6), pytest.approx(5e-6))


def test_a_price_by_the_hour_is_the_dearest_of_the_day(priced: Callable[[Listed], Price | None]) -> None:
    def at(price: int) -> types.ModelPrice:
        return types.ModelPrice(input_mtok=Decimal(price), output_mtok=Decimal(2 * price))

    now = datetime.now(UTC)
    cheap_now = types.TimeOfDateConstraint((now - timedelta(hours=3)).time(), (now + timedelta(hours=3)).time())
    price = priced([types.ConditionalPrice(prices=at(4)), types.ConditionalPrice(constraint=cheap_now, prices=at(1))])
    assert price is not None
    assert (price.input_usd_per_token, price.output_usd_per_token) == (pytest.approx(4e-6), pytest.approx(8e-6))


def test_a_fee_for_each_request_is_not_a_price_per_token(priced: Callable[[Listed], Price | None]) -> None:
    assert priced(types.ModelPrice(input_mtok=Decimal(1), output_mtok=Decimal(1), requests_kcount=Decimal(5))) is None


def test_a_listed_price_of_zero_is_a_price(priced: Callable[[Listed], Price | None]) -> None:
    price = priced(types.ModelPrice(input_mtok=Decimal(0), output_mtok=Decimal(0)))
    assert price is not None
    assert (price.input_usd_per_token, price.output_usd_per_token) == (0.0, 0.0)


def test_a_listed_price_that_is_no_number_is_none(priced: Callable[[Listed], Price | None]) -> None:
    assert priced(types.ModelPrice(input_mtok=Decimal("nan"), output_mtok=Decimal(1))) is None


def test_openai_writes_to_its_cache_unasked_and_bills_it() -> None:
    price = known_price("gpt-5.6-sol", OPENAI)
    usage = genai_prices.Usage(input_tokens=1000, cache_write_tokens=1000, output_tokens=0)
    written = genai_prices.calc_price(usage, "gpt-5.6-sol", provider_id="openai").input_price
    plain = genai_prices.calc_price(genai_prices.Usage(input_tokens=1000), "gpt-5.6-sol", provider_id="openai")
    assert price is not None
    assert price.input_usd_per_token == pytest.approx(float(written) / 1000)
    assert written > plain.input_price
    # Anthropic does so only when asked, and nothing here asks.
    claude = known_price("claude-sonnet-4-5", HOSTS["anthropic"])
    usage = genai_prices.Usage(input_tokens=1000)
    plain = genai_prices.calc_price(usage, "claude-sonnet-4-5", provider_id="anthropic")
    assert claude is not None
    assert claude.input_usd_per_token == pytest.approx(float(plain.input_price) / 1000)


def test_no_connection_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a price was looked up over the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    prices._bundled.cache_clear()
    assert known_price("gpt-4o-mini", OPENAI) is not None


def test_an_updater_elsewhere_in_the_process_changes_nothing() -> None:
    prices._bundled.cache_clear()
    data_snapshot.set_custom_snapshot(data_snapshot.DataSnapshot(providers=[], from_auto_update=True))
    try:
        assert known_price("gpt-4o-mini", OPENAI) is not None
    finally:
        data_snapshot.set_custom_snapshot(None)
        prices._bundled.cache_clear()


def test_a_price_does_not_change_in_hand() -> None:
    price = Price(1e-6, 2e-6, "configuration")
    with pytest.raises(dataclasses.FrozenInstanceError):
        price.source = "elsewhere"
