"""The judge step: every image is asked about every concept, blind to its class, shard by shard, by every witness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from annotation.prompts import Example
from annotation.vlm.preflight import price_of
from annotation.vlm.questions import select
from data_contracts.concepts import Vocabulary
from data_contracts.manifest import content_hash
from flows.chain import Context, Shard, ShardRunner, Step, StepResult
from flows.judging import OpenWork, WitnessPlan, choose_examples, ledger_parts, open_work
from flows.ledger import asked_vocabulary
from flows.steps.images import accepted, image_reader

_BAR = "judging"


def plans(context: Context, vocabulary: Vocabulary | None = None) -> Iterator[WitnessPlan]:
    """Each model's share of the judging."""
    vocabulary = asked_vocabulary(context.run) if vocabulary is None else vocabulary
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

    vocabulary = asked_vocabulary(context.run)
    if not len(vocabulary):
        return StepResult([], {"concepts_asked": 0}, ["every concept came with its labels; nothing was asked"])
    works = list(open_works(context, vocabulary))
    before = SESSIONS.spent(context)
    session = SESSIONS.begin(context)
    try:
        for witness, work in enumerate(works):
            if work.n_images:
                ready(context, session, witness, work.estimate(session.client(witness)))
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
    counts = _counts(len(accepted(context.run.read_images())), works, outcomes)
    is_priced = all(price_of(e) is not None for e in context.settings.vlm.endpoints)
    cost = spent.usd - before.usd if is_priced else None
    parts = sorted(context.run.judgements_dir.glob("part-*.parquet"))
    warnings = _warnings(failures, outcomes, spent.maybe_usd - before.maybe_usd)
    return StepResult(parts, counts, warnings, cost, failures.total())


def _counts(n_images: int, works: Sequence[OpenWork], outcomes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    def total(name: str) -> float:
        return sum(outcome[name] for outcome in outcomes)

    return {
        "images": n_images,
        "judged_before": sum(n_images - work.n_images for work in works),
        "from_journal": total("n_from_journal"),
        "requests": total("n_requests"),
        "tokens": total("n_tokens"),
    }


def _warnings(failures: Counter[str], outcomes: Sequence[Mapping[str, Any]], maybe_usd: float) -> list[str]:
    return [
        *(f"{n} images have no answer to some question: {code}" for code, n in sorted(failures.items())),
        *(text for outcome in outcomes for text in outcome.get("warnings", ())),
        *([f"up to {maybe_usd:.4f} USD of the cost are of requests whose answer was lost"] if maybe_usd > 0 else []),
    ]


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
                shard["image_ids"],
                questions,
                read,
                client,
                framing,
                advance=advance,
                journal_only=journal_only,
                keep=context.run.append_judgements,
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


def open_works(context: Context, vocabulary: Vocabulary) -> Iterator[OpenWork]:
    """What each model is still to be asked."""
    image_ids = accepted(context.run.read_images())["image_id"].tolist()
    for plan in plans(context, vocabulary):
        yield open_work(plan, image_ids, ledger_parts(context.run))


JUDGE = Step("judge", "Judging images", _inputs, _work, sharded=True)
