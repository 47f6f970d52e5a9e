"""The judge step: every image is asked about every concept, blind to its class, shard by shard, by every witness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from annotation.prompts import Example
from annotation.vlm.estimate import Estimate, estimate
from annotation.vlm.preflight import price_of, require_key, require_price, require_room_in_cap
from annotation.vlm.prices import Price
from annotation.vlm.questions import select
from annotation.vlm.tokens import is_known_family
from data_contracts.concepts import Concept, Vocabulary, slug
from data_contracts.manifest import content_hash
from data_contracts.tables import CONCEPTS, ConceptOrigin, vocabulary_of
from flows.chain import Context, Shard, ShardRunner, Step, StepResult
from flows.judging import OpenWork, WitnessPlan, choose_examples, ledger_parts, open_work
from flows.ledger import asked_concepts
from flows.settings import EndpointSettings, api_key
from flows.steps.images import accepted, image_reader

_BAR = "judging"
_ASSUMED_CONCEPTS = 12
"""Concepts an estimate counts with as long as none are known."""


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

    def lines(self) -> list[str]:
        """The estimate for people."""
        e, vlm = self.estimate, self.endpoint
        asked = f"judging {self.n_images} images for {self.n_concepts} concepts with {vlm.model} at {vlm.base_url}:"
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
    """What the judge step would send now, model by model; a usual number of concepts where none are known yet."""
    has_concepts = context.run.table_path(CONCEPTS).is_file()
    vocabulary = asked_vocabulary(context) if has_concepts else _assumed_vocabulary()
    return [_priced(context, work) for work in _open_works(context, vocabulary)]


def check_configuration(context: Context, priced: Sequence[PricedWork]) -> None:
    """Raise `ConfigurationError` for what can be known to fail before anything is sent: key, price, cap."""
    vlm = context.settings.vlm
    for work in priced:
        endpoint = work.endpoint
        require_key(endpoint, has_key=api_key(endpoint) is not None, key_variable=endpoint.api_key_env)
        capped = endpoint.model_copy(update={"max_cost_usd": vlm.max_cost_usd})
        require_price(capped, work.price)
        require_room_in_cap(capped, work.estimate.most_usd_per_request)


def asked_vocabulary(context: Context) -> Vocabulary:
    """Concepts the models are asked for: all but those whose labels came with the data."""
    concepts = asked_concepts(context.run.read_concepts())
    return vocabulary_of(concepts[concepts["origin"] != ConceptOrigin.GIVEN])


def plans(context: Context, vocabulary: Vocabulary | None = None) -> Iterator[WitnessPlan]:
    """Each model's share of the judging."""
    vocabulary = asked_vocabulary(context) if vocabulary is None else vocabulary
    for endpoint in context.settings.vlm.endpoints:
        examples: dict[str, Example] = {}
        if endpoint.examples:
            images = accepted(context.run.read_images())
            examples = choose_examples(context.run.read_judgements(), images, image_reader(context), endpoint)
        modality = context.settings.source.modality
        yield WitnessPlan(endpoint, vocabulary, modality, tuple(examples.values()), frozenset(examples))


def _inputs(context: Context) -> Mapping[str, Any]:
    images = accepted(context.run.read_images())
    return {
        "images": content_hash({"ids": sorted(images["image_id"])}),
        "asked": [plan.fingerprint for plan in plans(context)],
        "endpoints": [[e.base_url, e.model] for e in context.settings.vlm.endpoints],
    }


def _work(context: Context, shards: ShardRunner) -> StepResult:
    from flows.batches import JudgingInBatches
    from flows.vlm import SESSIONS, ready

    vocabulary = asked_vocabulary(context)
    if not len(vocabulary):
        return StepResult([], {"concepts_asked": 0}, ["every concept came with its labels; nothing was asked"])
    works = list(_open_works(context, vocabulary))
    before = SESSIONS.spent(context)
    session = SESSIONS.begin(context)
    try:
        for witness, work in enumerate(works):
            if work.n_images:
                ready(context, session, witness, _priced(context, work).estimate)
        batched = JudgingInBatches(context, session, works)
        size = context.settings.flow.shard_size
        todo = [s for w, work in enumerate(works) if not batched.holds(w) for s in work.shards(w, size)]
        with context.console.bar(_BAR, sum(len(shard["image_ids"]) for shard in todo)):
            outcomes = shards(context, judge_shard, list(todo))
        outcomes += batched.finish(shards, judge_shard, _BAR)
    finally:
        spent = SESSIONS.end(context)
    failures = Counter[str]()
    for outcome in outcomes:
        failures.update(outcome["failures"])
    n_images = len(accepted(context.run.read_images()))
    counts = {
        "images": n_images,
        "judged_before": sum(n_images - work.n_images for work in works),
        "from_journal": sum(outcome["n_from_journal"] for outcome in outcomes),
        "requests": sum(outcome["n_requests"] for outcome in outcomes),
        "tokens": sum(outcome["n_tokens"] for outcome in outcomes),
    }
    warnings = [f"{n} images have no answer to some question: {code}" for code, n in sorted(failures.items())]
    warnings += [text for outcome in outcomes for text in outcome.get("warnings", ())]
    if spent.maybe_usd > before.maybe_usd:
        warnings.append(
            f"up to {spent.maybe_usd - before.maybe_usd:.4f} USD of the cost are of requests whose answer was lost"
        )
    is_priced = all(price_of(e) is not None for e in context.settings.vlm.endpoints)
    cost = spent.usd - before.usd if is_priced else None
    parts = sorted(context.run.judgements_dir.glob("part-*.parquet"))
    return StepResult(parts, counts, warnings, cost, failures.total())


def judge_shard(context: Context, shard: Shard) -> dict[str, Any]:
    """Judge the images of one shard and add the judgements to the ledger; returns counts as plain values."""
    from annotation.judge import judge
    from flows.vlm import SESSIONS

    session, witness = SESSIONS.of(context), shard["witness"]
    # Read once for all shards: with many images each of these takes a while.
    read = session.kept("reader", lambda: image_reader(context))
    plan = session.kept("plans", lambda: list(plans(context)))[witness]
    questions, framing = select(plan.questions, shard["questions"]), plan.framing(plain=shard["plain"])
    journal_only = shard.get("journal_only", False)
    with context.console.bar(_BAR, len(shard["image_ids"])) as advance:
        judged = session.call(
            lambda client: judge(
                shard["image_ids"], questions, read, client, framing, advance=advance, journal_only=journal_only
            ),
            witness,
        )
    context.run.append_judgements(judged.judgements)
    return {
        "failures": dict(Counter(code for _, code in judged.failures)),
        "n_from_journal": judged.n_from_journal,
        "n_requests": judged.n_requests,
        "n_tokens": judged.usage.input_tokens + judged.usage.output_tokens,
    }


def _open_works(context: Context, vocabulary: Vocabulary) -> Iterator[OpenWork]:
    image_ids = accepted(context.run.read_images())["image_id"].tolist()
    for plan in plans(context, vocabulary):
        yield open_work(plan, image_ids, ledger_parts(context.run))


def _priced(context: Context, work: OpenWork) -> PricedWork:
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
    )


def _n_probing(endpoint: EndpointSettings) -> int:
    from annotation.vlm.probe import n_requests

    return 0 if endpoint.is_embedded or not endpoint.probe else n_requests(endpoint)


def _assumed_vocabulary() -> Vocabulary:
    names = [f"a visual concept {i}" for i in range(_ASSUMED_CONCEPTS)]
    return Vocabulary.of(Concept(slug(n), n, "One sentence that says what to look for in the image.") for n in names)


def _usd(amount: float) -> str:
    return f"{amount:.2f}" if amount >= 0.1 else f"{amount:.4f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} seconds"
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.0f} minutes"


JUDGE = Step("judge", "Judging images", _inputs, _work, sharded=True)
