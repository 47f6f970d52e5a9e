"""What asking the models will take, in requests, tokens, money and time, and whether it can work at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from annotation.vlm.estimate import Estimate, estimate
from annotation.vlm.preflight import price_of, require_key, require_price, require_room_in_cap
from annotation.vlm.prices import Price
from annotation.vlm.tokens import is_known_family
from flows.chain import Context
from flows.judging import OpenWork
from flows.settings import EndpointSettings, api_key
from flows.steps.concepts import expected_vocabulary
from flows.steps.judge import open_works


@dataclass(frozen=True)
class PricedWork:
    """What one model will be asked, what that takes, and why it is not known already."""

    endpoint: EndpointSettings
    estimate: Estimate
    price: Price | None
    n_images: int
    n_concepts: int
    reasons: Mapping[str, int]
    """Why cells are open → how many."""
    n_probing: int
    """Test questions that come first."""
    is_probed: bool
    """Whether tokens and time were measured by a probe of this endpoint."""
    is_known: bool = True
    """Whether the concepts are known; else their number is the greatest there can be."""

    def lines(self) -> list[str]:
        """The estimate for people."""
        e, vlm = self.estimate, self.endpoint
        concepts = f"{self.n_concepts} concepts" if self.is_known else f"at most {self.n_concepts} concepts to be found"
        asked = f"judging {self.n_images} images for {concepts} with {vlm.model} at {vlm.base_url}:"
        if not e.requests:
            return [f"{asked} nothing is open"]
        tokens = f"  tokens   {e.input_tokens} in, about {e.output_tokens} out (at most {e.max_output_tokens})"
        if not is_known_family(vlm.model) and not self.is_probed:
            tokens += "; tokens of an image are a high guess: this model's counting is not known"
        basis = (
            "as measured" if self.is_probed else "at a guessed 6 s an answer" if vlm.is_remote else "on this machine"
        )
        probing = f", and {self.n_probing} test questions before" if self.n_probing else ""
        return [
            asked,
            *(f"  {n} cells {text}" for text, n in self.reasons.items()),
            f"  requests {e.requests}{probing}",
            tokens,
            f"  price    {price_words(e, self.price)}",
            f"  time     about {_duration(e.seconds)} ({basis})" + ("; batches within a day" if vlm.batch else ""),
        ]

    def as_dict(self) -> dict[str, Any]:
        """The estimate for `--json`."""
        return asdict(self.estimate) | {
            "model": self.endpoint.model,
            "base_url": self.endpoint.base_url,
            "images": self.n_images,
            "concepts": self.n_concepts,
            "reasons": dict(self.reasons),
            "price_source": None if self.price is None else self.price.source,
            "probing_requests": self.n_probing,
        }


def price_words(taken: Estimate, price: Price | None) -> str:
    """What something costs, for people."""
    if price is None or taken.cost_usd is None or taken.max_cost_usd is None:
        return (
            "unknown: no list has this model at this address (vlm.input_usd_per_million_tokens and "
            "vlm.output_usd_per_million_tokens set it)"
        )
    if not taken.max_cost_usd:
        return f"nothing ({price.source})"
    return f"{_usd(taken.cost_usd)} to {_usd(taken.max_cost_usd)} USD ({price.source})"


def estimate_judging(context: Context) -> list[PricedWork]:
    """What the judge step would send now, model by model; for as many concepts as there can be where none are known."""
    vocabulary, is_known = expected_vocabulary(context)
    return [priced(context, work, is_known=is_known) for work in open_works(context, vocabulary)]


def check_configuration(context: Context, priced: Sequence[PricedWork]) -> None:
    """Raise `ConfigurationError` for what can be known to fail before anything is sent: key, price, cap."""
    vlm = context.settings.vlm
    for work in priced:
        endpoint = work.endpoint
        require_key(endpoint, has_key=api_key(endpoint) is not None, key_variable=endpoint.api_key_env)
        capped = endpoint.model_copy(update={"max_cost_usd": vlm.max_cost_usd})
        require_price(capped, work.price)
        require_room_in_cap(capped, work.estimate.most_usd_per_request)


def priced(context: Context, work: OpenWork, *, is_known: bool = True) -> PricedWork:
    """What this work takes at its endpoint; `is_known`: whether the concepts are."""
    from flows.vlm import stored_capabilities

    endpoint = work.plan.settings
    found = stored_capabilities(context, endpoint)
    price = price_of(endpoint)
    taken = estimate(
        work.works(),
        endpoint,
        price,
        tokens_per_image=None if found is None else found.tokens_per_image,
        seconds_per_answer=None if found is None else found.seconds_per_answer,
    )
    return PricedWork(
        endpoint=endpoint,
        estimate=taken,
        price=price,
        n_images=work.n_images,
        n_concepts=len(work.plan.vocabulary),
        reasons=work.reasons(),
        n_probing=_n_probing(endpoint) if found is None and taken.requests else 0,
        is_probed=found is not None,
        is_known=is_known,
    )


def _n_probing(endpoint: EndpointSettings) -> int:
    from annotation.vlm.probe import n_requests

    return 0 if endpoint.is_embedded or not endpoint.probe else n_requests(endpoint)


def _usd(amount: float) -> str:
    return f"{amount:.2f}" if amount >= 0.1 else f"{amount:.4f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} seconds"
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.0f} minutes"
