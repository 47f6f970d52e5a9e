"""Concepts for a data set, proposed by a vision-language model from a few sampled images.

Every class is asked about by itself, in one or more rounds with other images, and pairs of classes are asked what
tells one from the other. Names that mean the same become one concept; the table says where each came from.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pandas as pd

from annotation.merging import Answer, Merged, merge
from annotation.proposal_prompts import proposing_request
from annotation.provenance import Source
from annotation.vlm.client import VlmClient
from annotation.vlm.schema import FaultCode, Proposal, VlmRequest, parse_proposals
from annotation.vlm.settings import JPEG_QUALITY
from annotation.wording import mentions
from data_contracts.concepts import slug
from data_contracts.errors import ImageRejected, MedMicnError, StepFailed
from data_contracts.pixels import encode
from data_contracts.ports import PixelReader, TextEmbedder
from data_contracts.tables import CONCEPTS, ConceptOrigin, ConceptStatus

T = TypeVar("T")

logger = logging.getLogger(__name__)

_ALL_PAIRS_UP_TO = 15
"""All pairs of six classes; with more classes every class is still in two pairs."""


@dataclass(frozen=True)
class ProposeOptions:
    """How concepts are asked for."""

    n_per_class: int = 12
    """Most images of a class in one request."""
    max_images_per_request: int = 60
    """Most images in one request: those of the class first, then others to compare with."""
    n_concepts: int = 8
    """Most concepts asked for per class and round."""
    rounds: int = 1
    """Times a class is asked about, each time with other images as long as there are any."""
    contrast_pairs: int | None = None
    """Most pairs of classes that are asked what tells one from the other; none: all pairs of up to six classes, of
    more classes so many that each is in at least two pairs."""
    n_contrast: int = 4
    """Most concepts asked for per pair."""
    merge_cosine: float = 0.90
    """Names with a text cosine above this become one concept, unless a word of one excludes a word of the other."""
    name_characters: int = 30
    """Length of a name that is asked for; the filter enforces it."""
    seed: int = 0
    """Which pairs are asked about, and which images of other classes are shown."""


@dataclass(frozen=True)
class _Question:
    """One request to come: what it is about and which images it shows."""

    source: Source
    image_ids: tuple[str, ...]
    other_ids: tuple[str, ...]
    n_concepts: int


async def propose(
    samples: Mapping[str, Sequence[str]],
    read: PixelReader,
    client: VlmClient,
    modality: str,
    options: ProposeOptions | None = None,
    embed: TextEmbedder | None = None,
) -> pd.DataFrame:
    """The `concepts` table of everything proposed, merged by meaning, all `kept` and in order; filters come after.

    `samples` maps a class name to ids of training images, enough for all rounds. With one class (an unlabelled
    folder) the question is what varies between the images. Without `embed`, only names that are equal but for
    spelling, number, word order and listed equivalents become one. A question whose answer cannot be used is logged
    and left out; raises `StepFailed` when none can.
    """
    options = options or ProposeOptions()
    questions = _plan(samples, options)
    encoded = await _encoded({i: None for q in questions for i in (*q.image_ids, *q.other_ids)}, read, client)
    found = await _all((_ask(q, encoded, client, modality, options) for q in questions), client)
    answers = []
    for question, proposals in zip(questions, found, strict=True):
        if isinstance(proposals, FaultCode):
            logger.warning("%s has no usable proposal: %s.", _about(question.source), proposals.value)
        else:
            answers.append(Answer(question.source, proposals[: question.n_concepts]))
    if not answers:
        raise StepFailed(
            f"None of {len(questions)} questions for concepts got a usable answer "
            f"(last reason: {next(reversed(found), None)}).",
            remedy="Try another model, or give the concepts yourself.",
        )
    merged = merge(answers, embed, options.merge_cosine, options.name_characters)
    if client.settings.is_embedded:
        return _table(merged, samples, ConceptOrigin.EMBEDDED)
    class_names = list(samples) if len(samples) > 1 else []
    return _table([_without_class_names(m, class_names) for m in merged], samples, ConceptOrigin.VLM)


def planned_requests(
    n_samples: Mapping[str, int], modality: str, options: ProposeOptions, max_output_tokens: int | None = None
) -> list[VlmRequest]:
    """The requests that `propose` would send for classes with so many samples, with empty images: for an estimate."""
    samples = {name: [f"{name}/{i}" for i in range(n)] for name, n in n_samples.items()}
    return [
        _request(q, [b""] * len(q.image_ids), [b""] * len(q.other_ids), modality, options, max_output_tokens)
        for q in _plan(samples, options)
        if q.image_ids
    ]


def most_concepts(n_samples: Mapping[str, int], options: ProposeOptions) -> int:
    """How many concepts `propose` can bring at most, if no two of them are alike."""
    samples = {name: [f"{name}/{i}" for i in range(n)] for name, n in n_samples.items()}
    return sum(question.n_concepts for question in _plan(samples, options) if question.image_ids)


def class_pairs(class_names: Sequence[str], options: ProposeOptions) -> list[tuple[str, str]]:
    """The pairs that are asked what tells the first from the second, no pair twice.

    Classes stand on a ring, shuffled by the seed: neighbours first, so that n pairs put every class into two of them,
    once as the first and once as the second; then those two places apart, and so on.
    """
    n = len(class_names)
    ring = random.Random(options.seed).sample(list(class_names), n)
    pairs = [
        (ring[i], ring[(i + distance) % n])
        for distance in range(1, n // 2 + 1)
        for i in range(n // 2 if 2 * distance == n else n)
    ]
    most = max(_ALL_PAIRS_UP_TO, n) if options.contrast_pairs is None else options.contrast_pairs
    return pairs[:most]


def _plan(samples: Mapping[str, Sequence[str]], options: ProposeOptions) -> list[_Question]:
    """All questions in order: every class in every round, then the pairs."""
    if len(samples) == 1:
        ((_, ids),) = samples.items()
        return [
            _Question(Source(None, None, k + 1), _shown(ids, k, options), (), options.n_concepts)
            for k in range(_n_rounds(ids, options))
        ]
    questions = [
        _class_question(name, k, samples, options)
        for k in range(options.rounds)
        for name, ids in samples.items()
        if k < _n_rounds(ids, options)
    ]
    half = options.max_images_per_request // 2
    return questions + [
        _Question(
            Source(name, against),
            _shown(samples[name], 0, options)[:half],
            _shown(samples[against], 0, options)[:half],
            options.n_contrast,
        )
        for name, against in class_pairs(list(samples), options)
        # Without images of both sides there is nothing to compare.
        if samples[name] and samples[against]
    ]


def _class_question(name: str, k: int, samples: Mapping[str, Sequence[str]], options: ProposeOptions) -> _Question:
    own = _shown(samples[name], k, options)
    others = [_shown(ids, k, options) for other, ids in samples.items() if other != name]
    room = options.max_images_per_request - len(own)
    return _Question(Source(name, None, k + 1), own, _spread(others, room, options.seed), options.n_concepts)


def _n_rounds(ids: Sequence[str], options: ProposeOptions) -> int:
    """Rounds in which at least one image is new; a class without images still has its question, to be reported."""
    return max(1, min(options.rounds, -(-len(ids) // options.n_per_class)))


def _shown(ids: Sequence[str], k: int, options: ProposeOptions) -> tuple[str, ...]:
    """The images of round `k`, counted from 0: the next ones, and from the start again where they run out."""
    n = min(options.n_per_class, options.max_images_per_request, len(ids))
    return tuple(ids[(k * options.n_per_class + i) % len(ids)] for i in range(n))


def _spread(groups: Sequence[Sequence[str]], n: int, seed: int) -> tuple[str, ...]:
    """At most `n` images, as evenly as possible from all groups, in the order of the groups."""
    shuffled = [random.Random(seed).sample(range(len(group)), len(group)) for group in groups]
    longest = max(map(len, groups), default=0)
    turns = [(k, order[turn]) for turn in range(longest) for k, order in enumerate(shuffled) if turn < len(order)]
    return tuple(groups[k][i] for k, i in sorted(turns[: max(n, 0)]))


async def _encoded(image_ids: Iterable[str], read: PixelReader, client: VlmClient) -> dict[str, bytes]:
    """Image id → re-encoded image, without those that cannot be read."""
    found = {}
    for image_id in image_ids:
        try:
            found[image_id] = await asyncio.to_thread(_encode, image_id, read, client)
        except ImageRejected as error:
            logger.warning("Image %s is left out of the proposal: %s.", image_id[:12], error.reason)
    return found


def _encode(image_id: str, read: PixelReader, client: VlmClient) -> bytes:
    settings = client.settings
    return encode(read(image_id), settings.side_px, settings.encoding, jpeg_quality=JPEG_QUALITY)


async def _all(calls: Iterable[Coroutine[Any, Any, T]], client: VlmClient) -> list[T]:
    """What all calls give; after the first error nothing more is sent, and what was sent is waited for."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    except MedMicnError as error:
        await client.finish_sent(error)
        raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _ask(
    question: _Question, encoded: Mapping[str, bytes], client: VlmClient, modality: str, options: ProposeOptions
) -> list[Proposal] | FaultCode:
    own, others = ([encoded[i] for i in ids if i in encoded] for ids in (question.image_ids, question.other_ids))
    if not own or (question.source.against is not None and not others):
        return FaultCode.EMPTY_ANSWER
    request = _request(question, own, others, modality, options, client.settings.max_output_tokens)
    answer = await client.ask(request, parse_proposals)
    return answer.value if answer.value is not None else answer.fault or FaultCode.EMPTY_ANSWER


def _request(
    question: _Question,
    own: Sequence[bytes],
    others: Sequence[bytes],
    modality: str,
    options: ProposeOptions,
    max_output_tokens: int | None,
) -> VlmRequest:
    return proposing_request(
        question.source.class_name,
        own,
        others,
        modality,
        n_concepts=question.n_concepts,
        name_characters=options.name_characters,
        max_output_tokens=max_output_tokens,
        against=question.source.against,
    )


def _about(source: Source) -> str:
    if source.class_name is None:
        return "The folder"
    if source.against is not None:
        return f"The pair {source.class_name!r} against {source.against!r}"
    return f"Class {source.class_name!r}" + (f" in round {source.round_number}" if source.round_number > 1 else "")


def _without_class_names(merged: Merged, class_names: Sequence[str]) -> Merged:
    """The concept without class names in the texts that go into judging questions, which must stay blind.

    A name that holds one is the filter's business.
    """

    def is_blind(text: str) -> bool:
        return not any(mentions(text, name) for name in class_names)

    return replace(
        merged,
        definition=merged.definition if is_blind(merged.definition) else merged.default_definition,
        group=merged.group if merged.group and is_blind(merged.group) else None,
        synonyms=tuple(filter(is_blind, merged.synonyms)),
        contrast=merged.contrast if is_blind(merged.contrast) else "",
    )


def _table(merged: Sequence[Merged], samples: Mapping[str, Sequence[str]], origin: ConceptOrigin) -> pd.DataFrame:
    (unlabelled, *_) = samples
    rows = [
        {
            "concept_id": concept_id,
            "name": concept.name,
            "definition": concept.definition,
            "group": concept.group,
            "proposed_for": list(dict.fromkeys(s.class_name or unlabelled for s in concept.sources)),
            "origin": origin.value,
            "status": ConceptStatus.KEPT.value,
            "reason": None,
            "nearest": None,
            "similarity": None,
            "position": position,
            "synonyms": list(concept.synonyms),
            "contrast": concept.contrast or None,
            "provenance": list(dict.fromkeys(s.line for s in concept.sources)),
        }
        for position, (concept_id, concept) in enumerate(zip(_free_ids(merged), merged, strict=True))
    ]
    return pd.DataFrame(rows, columns=CONCEPTS.column_names)


def _free_ids(merged: Sequence[Merged]) -> list[str]:
    """A slug per concept; names that differ only in what a slug leaves out get a number."""
    found: list[str] = []
    for concept in merged:
        base = concept_id = slug(concept.name)
        n = 1
        while concept_id in found:
            n += 1
            concept_id = f"{base}-{n}"
        found.append(concept_id)
    return found
