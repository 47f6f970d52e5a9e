"""What a model costs at an endpoint, from the price list that the package genai-prices carries; nothing is downloaded.

A price is looked up for a provider whose host is known. A private server has none, whatever its models are called.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cache, lru_cache
from importlib import import_module
from typing import NamedTuple
from urllib.parse import urlsplit

import genai_prices
from genai_prices.data_snapshot import DataSnapshot
from genai_prices.types import PriceCalculation

_MOST_INPUT_TOKENS = 100_000
_MODEL_PREFIXES = {"google": ("models/", "google/")}
_CACHING_PROVIDERS = {"openai", "azure"}


@dataclass(frozen=True)
class Price:
    """Money for one token, and who says so."""

    input_usd_per_token: float
    """Price of one input token; the highest rate a request of at most 100,000 of them may be billed at."""
    output_usd_per_token: float
    """Price of one output token of such a request."""
    source: str
    """Where the price comes from, in words for people."""


class _Rates(NamedTuple):
    """Input and output price of one token under one set of circumstances."""

    input_usd: Decimal
    output_usd: Decimal


@lru_cache(maxsize=64)
def known_price(model: str, base_url: str) -> Price | None:
    """The listed price of a model at the provider that `base_url` belongs to; None where there is none.

    The highest rate of the coming day for at most 100,000 input tokens: prices by prompt length, by hour and for
    writing to a cache unasked are covered, discounts are not counted on. A fee for each request has no price per
    token and is not known. Batch, priority and regional rates are other prices.
    """
    # Both errors are the package's own: nothing matches, or a listed price is not a number.
    try:
        provider_id = _provider_id(base_url)
        return None if provider_id is None else _price(_listed_name(model, provider_id), provider_id)
    except (LookupError, ValueError):
        return None


@cache
def _bundled() -> DataSnapshot:
    """The prices that came with the package: an updater that runs elsewhere in the process changes nothing here."""
    # Thirty thousand lines of data are read when a price is first asked for, not when this module is.
    providers = getattr(import_module("genai_prices.data"), "providers", [])
    return DataSnapshot(providers=providers, from_auto_update=False)


def _provider_id(base_url: str) -> str | None:
    """The provider whose host an address has; None for any other host."""
    parts = urlsplit(base_url)
    if not parts.hostname:
        return None
    origin = f"https://{parts.hostname}"
    # The package's patterns are open at the end and some may start anywhere: dots in a path must not make a host.
    address = origin + parts.path.replace(".", "_")
    for provider in _bundled().providers:
        found = re.match(getattr(provider, "api_pattern", "(?!)"), address)
        if found and (found.end() >= len(origin) or found.group().endswith(".")):
            return provider.id
    return None


def _listed_name(model: str, provider_id: str) -> str:
    """The name of a model as the price list has it."""
    for prefix in _MODEL_PREFIXES.get(provider_id, ()):
        model = model.removeprefix(prefix)
    return model


def _price(model: str, provider_id: str) -> Price | None:
    now = datetime.now(UTC)
    rates = [
        _rates(model, provider_id, n_input, now + timedelta(hours=hours))
        for hours in range(24)
        for n_input in (1, _MOST_INPUT_TOKENS)
    ]
    if None in rates:
        return None
    known = [rate for rate in rates if rate is not None]
    listed = _calculation(model, provider_id, 1, now)
    return Price(
        float(max(rate.input_usd for rate in known)),
        float(max(rate.output_usd for rate in known)),
        f"genai-prices {genai_prices.__version__}: {listed.provider.id}/{listed.model.id}",
    )


def _rates(model: str, provider_id: str, n_input: int, at: datetime) -> _Rates | None:
    """Highest rates of a request of this size at this time; None where the list has no price per token."""
    plain = _calculation(model, provider_id, n_input, at)
    prices = getattr(plain, "model_price", None)
    if getattr(prices, "input_mtok", None) is None or getattr(prices, "output_mtok", None) is None:
        return None
    if plain.total_price != plain.input_price + plain.output_price:
        return None
    input_usd = plain.input_price
    # OpenAI writes long prompts to its cache unasked, and from GPT-5.6 on it bills that above the plain rate.
    if provider_id in _CACHING_PROVIDERS or model.startswith("openai/"):
        written = _calculation(model, provider_id, n_input, at, cache_write_tokens=n_input)
        input_usd = max(input_usd, written.input_price)
    return _Rates(input_usd / n_input, plain.output_price / n_input)


def _calculation(model: str, provider_id: str, n_tokens: int, at: datetime, **more: int) -> PriceCalculation:
    """The package's own calculation for as many output as input tokens."""
    usage = genai_prices.Usage(input_tokens=n_tokens, output_tokens=n_tokens, **more)
    return _bundled().calc(usage, model, provider_id, None, at)
