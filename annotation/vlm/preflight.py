"""What must be right before the first request: key, price, caps and model name, each with its remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from annotation.vlm.prices import Price, known_price
from annotation.vlm.settings import VlmSettings
from data_contracts.errors import ConfigurationError

if TYPE_CHECKING:
    from annotation.vlm.client import VlmClient

_NEEDS_KEY = re.compile(
    r"(^|\.)(openai\.com|openai\.azure\.com|openrouter\.ai|anthropic\.com|googleapis\.com|mistral\.ai)$"
)


def price_of(settings: VlmSettings) -> Price | None:
    """What tokens cost: as configured, nothing in this process, else as listed; None where nobody knows."""
    if settings.input_usd_per_million_tokens is not None and settings.output_usd_per_million_tokens is not None:
        rates = (settings.input_usd_per_million_tokens, settings.output_usd_per_million_tokens)
        return Price(rates[0] / 1e6, rates[1] / 1e6, "configuration")
    if not settings.is_remote:
        return Price(0.0, 0.0, "this machine")
    return known_price(settings.model, settings.base_url)


def require_key(settings: VlmSettings, *, has_key: bool, key_variable: str) -> None:
    """Raise `ConfigurationError` for an endpoint that is known to want a key, without one."""
    if not has_key and _NEEDS_KEY.search(settings.host):
        raise ConfigurationError(
            f"vlm: {settings.base_url} wants a key, and the environment variable {key_variable} is not set; nothing "
            "was sent.",
            remedy=f"export {key_variable}=…, or name another variable with vlm.api_key_env.",
        )


def require_price(settings: VlmSettings, price: Price | None) -> None:
    """Raise `ConfigurationError` when money is capped and nobody knows what a token costs."""
    if settings.max_cost_usd is not None and price is None:
        raise ConfigurationError(
            f"vlm.max_cost_usd = {settings.max_cost_usd:g} cannot be kept: the price of {settings.model!r} at "
            f"{settings.base_url} is not known; nothing was sent.",
            remedy="Set vlm.input_usd_per_million_tokens and vlm.output_usd_per_million_tokens (0 for a server of "
            "your own), or cap vlm.max_requests.",
        )


def require_room_in_cap(settings: VlmSettings, most_usd_per_request: float | None) -> None:
    """Raise `ConfigurationError` when the cap is below what a single request may cost."""
    cap_usd = settings.max_cost_usd
    if cap_usd is not None and most_usd_per_request is not None and most_usd_per_request > cap_usd:
        raise ConfigurationError(
            f"vlm.max_cost_usd = {cap_usd:g} is below the price of one request, which may be "
            f"{most_usd_per_request:.6f} USD; nothing was sent.",
            remedy="Raise the cap, or make requests smaller with vlm.max_output_tokens, vlm.concepts_per_request or "
            "vlm.image_side_px.",
        )


async def require_model(client: VlmClient) -> None:
    """Raise `ConfigurationError` when the endpoint lists its models and ours is not among them.

    Raises `EndpointError` when it does not answer, or refuses the key.
    """
    settings = client.settings
    if settings.azure_api_version is not None:
        # A deployment's address already names its model, and has no list below it.
        return
    names = await client.model_names()
    if not names or is_listed(settings.model, names):
        return
    near = difflib.get_close_matches(settings.model, names, n=3, cutoff=0.3) or names[:3]
    raise ConfigurationError(
        f"vlm.model: {settings.base_url} has no model {settings.model!r}; nothing was sent.",
        remedy=f"It has {len(names)}, such as {', '.join(near)}.",
    )


def is_listed(model: str, names: Sequence[str]) -> bool:
    """Whether a model is among those listed; Ollama's default tag and Gemini's prefix may be left out."""
    return any(model in (name, name.removesuffix(":latest"), name.removeprefix("models/")) for name in names)
