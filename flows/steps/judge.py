"""The judge step: every image is asked about every concept, blind to its class, shard by shard."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from annotation.prompts import judging_request
from annotation.vlm.estimate import Estimate, estimate
from data_contracts.concepts import Concept, Vocabulary, slug
from data_contracts.manifest import content_hash
from data_contracts.tables import CONCEPTS, ConceptOrigin, State, Witness, vocabulary_of
from flows.chain import Context, Shard, ShardRunner, Step, StepResult
from flows.ledger import asked_concepts
from flows.steps.images import accepted, image_reader

_BAR = "judging"
_ASSUMED_CONCEPTS = 12
"""Concepts an estimate counts with as long as none are known."""


@dataclass(frozen=True)
class PricedWork:
    """What judging will take, and how much of it is new."""

    estimate: Estimate
    n_images: int
    n_concepts: int
    endpoint: str

    def lines(self) -> list[str]:
        """The estimate for people."""
        e = self.estimate
        price = "unknown (set vlm.input_usd_per_million_tokens and vlm.output_usd_per_million_tokens)"
        if e.cost_usd is not None and e.max_cost_usd is not None:
            price = f"about {e.cost_usd:.2f} USD, at most {e.max_cost_usd:.2f} USD"
        return [
            f"judging {self.n_images} images for {self.n_concepts} concepts at {self.endpoint}:",
            f"  requests {e.requests}, input tokens {e.input_tokens}, output tokens about {e.output_tokens}",
            f"  price    {price}",
            f"  time     about {e.seconds / 60:.1f} minutes",
        ]

    def as_dict(self) -> dict[str, Any]:
        """The estimate for `--json`."""
        return asdict(self.estimate) | {"images": self.n_images, "concepts": self.n_concepts}


def estimate_judging(context: Context) -> PricedWork:
    """What the judge step would send now; counts with a usual number of concepts where none are known yet."""
    vocabulary = asked_vocabulary(context) if context.run.table_path(CONCEPTS).is_file() else None
    n_images = len(_images_to_ask(context, vocabulary))
    if vocabulary is None:
        names = [f"a visual concept {i}" for i in range(_ASSUMED_CONCEPTS)]
        vocabulary = Vocabulary.of(
            Concept(slug(n), n, "One sentence that says what to look for in the image.") for n in names
        )
    settings = context.settings
    found = estimate(n_images if len(vocabulary) else 0, vocabulary, settings.vlm, settings.source.modality)
    return PricedWork(found, n_images, len(vocabulary), f"{settings.vlm.model} ({settings.vlm.base_url})")


def asked_vocabulary(context: Context) -> Vocabulary:
    """Concepts the model is asked for: all but those whose labels came with the data."""
    concepts = asked_concepts(context.run.read_concepts())
    return vocabulary_of(concepts[concepts["origin"] != ConceptOrigin.GIVEN])


def _inputs(context: Context) -> Mapping[str, Any]:
    images = accepted(context.run.read_images())
    settings = context.settings
    return {
        "images": content_hash({"ids": sorted(images["image_id"])}),
        "prompt": _prompt_sha256(context, asked_vocabulary(context)),
        "endpoint": [settings.vlm.base_url, settings.vlm.model, settings.vlm.side_px, settings.vlm.temperature],
    }


def _work(context: Context, shards: ShardRunner) -> StepResult:
    from flows.vlm import LIMITS

    vocabulary = asked_vocabulary(context)
    if not len(vocabulary):
        return StepResult([], {"concepts_asked": 0}, ["every concept came with its labels; nothing was asked"])
    todo = _images_to_ask(context, vocabulary)
    n_known = len(accepted(context.run.read_images())) - len(todo)
    size = context.settings.flow.shard_size
    LIMITS.begin(context)
    context.console.expect(_BAR, len(todo))
    outcomes = shards(context, judge_shard, [todo[i : i + size] for i in range(0, len(todo), size)])
    failures = Counter[str]()
    for outcome in outcomes:
        failures.update(outcome["failures"])
    counts = {
        "images": len(todo) + n_known,
        "judged_before": n_known,
        "from_journal": sum(outcome["n_from_journal"] for outcome in outcomes),
        "requests": sum(outcome["n_requests"] for outcome in outcomes),
        "tokens": sum(outcome["n_tokens"] for outcome in outcomes),
    }
    warnings = [f"{n} images could not be judged: {code}" for code, n in sorted(failures.items())]
    cost = LIMITS.of(context)[0].spent_usd
    return StepResult(
        sorted(context.run.judgements_dir.glob("part-*.parquet")), counts, warnings, cost, failures.total()
    )


def judge_shard(context: Context, shard: Shard) -> dict[str, Any]:
    """Judge the images of one shard and add the judgements to the ledger; returns counts as plain values."""
    from annotation.judge import judge
    from flows.vlm import LIMITS, open_client

    vocabulary = asked_vocabulary(context)
    budget, pace = LIMITS.of(context)
    read, modality = image_reader(context), context.settings.source.modality

    async def ask() -> Any:
        async with open_client(context, budget, pace) as client:
            with context.console.bar(_BAR, len(shard)) as advance:
                return await judge(shard, vocabulary, read, client, modality, advance=advance)

    judged = asyncio.run(ask())
    context.run.append_judgements(judged.judgements)
    return {
        "failures": dict(Counter(code for _, code in judged.failures)),
        "n_from_journal": judged.n_from_journal,
        "n_requests": judged.n_requests,
        "n_tokens": judged.usage.input_tokens + judged.usage.output_tokens,
    }


def _images_to_ask(context: Context, vocabulary: Vocabulary | None) -> list[str]:
    """Accepted images that the ledger has no answer for to this very question from this model."""
    images = accepted(context.run.read_images())["image_id"].tolist()
    if vocabulary is None or not len(vocabulary):
        return images
    ledger = context.run.read_judgements()
    same = (
        (ledger["witness"] == Witness.VLM)
        & (ledger["witness_model"] == context.settings.vlm.model)
        & (ledger["prompt_sha256"] == _prompt_sha256(context, vocabulary))
        # An image whose request failed stands in the ledger as not assessed; it is asked again.
        & (ledger["state"] != State.NOT_ASSESSED)
    )
    answered = set(ledger.loc[same, "image_id"])
    return [image_id for image_id in images if image_id not in answered]


def _prompt_sha256(context: Context, vocabulary: Vocabulary) -> str:
    return judging_request(b"", vocabulary, context.settings.source.modality, None).prompt_sha256


JUDGE = Step("judge", "Judging images", _inputs, _work, sharded=True)
