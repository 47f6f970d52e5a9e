"""Concepts for a data set, proposed by a vision-language model from a few sampled images of each class."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from annotation.prompts import proposing_request
from annotation.vlm.client import VlmClient
from annotation.vlm.schema import FaultCode, Proposal, parse_proposals
from data_contracts.concepts import slug
from data_contracts.errors import ImageRejected, StepFailed
from data_contracts.pixels import encode
from data_contracts.ports import PixelReader
from data_contracts.tables import CONCEPTS, ConceptOrigin, ConceptStatus

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProposeOptions:
    """How concepts are asked for."""

    n_per_class: int = 12
    """Most images of a class that are shown."""
    max_images_per_request: int = 60
    """Most images in one request: those of the class first, then others to compare with."""
    n_concepts: int = 8
    """Most concepts asked for per class."""
    name_characters: int = 30
    """Length of a name that is asked for; the filter enforces it."""
    seed: int = 0
    """Which of the sampled images of other classes are shown."""


@dataclass
class _Merged:
    proposal: Proposal
    classes: list[str] = field(default_factory=list)


async def propose(
    samples: Mapping[str, Sequence[str]],
    read: PixelReader,
    client: VlmClient,
    modality: str,
    options: ProposeOptions | None = None,
) -> pd.DataFrame:
    """The `concepts` table of everything proposed, merged by slug, all `kept` and in order; filters come after.

    `samples` maps a class name to ids of training images. With one class (an unlabelled folder) the question is what
    varies between the images. A class whose answer cannot be used is logged and left out; raises `StepFailed` when
    no class has one.
    """
    options = options or ProposeOptions()
    encoded = {name: await _encoded(ids[: options.n_per_class], read, client) for name, ids in samples.items()}
    answers = await asyncio.gather(*(_ask(name, encoded, client, modality, options) for name in encoded))
    found = {name: a for name, a in zip(encoded, answers, strict=True) if not isinstance(a, FaultCode)}
    for name, answer in zip(encoded, answers, strict=True):
        if isinstance(answer, FaultCode):
            logger.warning("Class %r has no proposal: %s.", name, answer.value)
    if not found:
        raise StepFailed(
            f"None of {len(encoded)} classes got a usable proposal (last reason: {next(reversed(answers), None)}).",
            remedy="Try another model, or give the concepts yourself.",
        )
    return _table(_merge(found), ConceptOrigin.EMBEDDED if client.settings.is_embedded else ConceptOrigin.VLM)


async def _encoded(image_ids: Sequence[str], read: PixelReader, client: VlmClient) -> list[bytes]:
    """Re-encoded images, without those that cannot be read."""
    found = []
    for image_id in image_ids:
        try:
            found.append(await asyncio.to_thread(_encode, image_id, read, client))
        except ImageRejected as error:
            logger.warning("Image %s is left out of the proposal: %s.", image_id[:12], error.reason)
    return found


def _encode(image_id: str, read: PixelReader, client: VlmClient) -> bytes:
    return encode(read(image_id), client.settings.side_px, client.settings.image_format)


async def _ask(
    class_name: str, encoded: Mapping[str, list[bytes]], client: VlmClient, modality: str, options: ProposeOptions
) -> list[Proposal] | FaultCode:
    own = encoded[class_name][: options.max_images_per_request]
    if not own:
        return FaultCode.EMPTY_ANSWER
    others = _spread(
        [images for name, images in encoded.items() if name != class_name],
        options.max_images_per_request - len(own),
        options.seed,
    )
    request = proposing_request(
        class_name if len(encoded) > 1 else None,
        own,
        others,
        modality,
        n_concepts=options.n_concepts,
        name_characters=options.name_characters,
        max_output_tokens=client.settings.max_output_tokens,
    )
    answer = await client.ask(request, parse_proposals)
    return answer.value if answer.value is not None else answer.fault or FaultCode.EMPTY_ANSWER


def _spread(groups: Sequence[Sequence[bytes]], n: int, seed: int) -> list[bytes]:
    """At most `n` images, as evenly as possible from all groups, in the order of the groups."""
    shuffled = [random.Random(seed).sample(range(len(group)), len(group)) for group in groups]
    longest = max(map(len, groups), default=0)
    turns = [(k, order[turn]) for turn in range(longest) for k, order in enumerate(shuffled) if turn < len(order)]
    return [groups[k][i] for k, i in sorted(turns[:n])]


def _merge(found: Mapping[str, Sequence[Proposal]]) -> dict[str, _Merged]:
    """Proposals of all classes by slug; the first wording stands, taking turns so that no class comes last."""
    merged: dict[str, _Merged] = {}
    longest = max(map(len, found.values()), default=0)
    for rank in range(longest):
        for class_name, proposals in found.items():
            if rank < len(proposals):
                entry = merged.setdefault(slug(proposals[rank].name), _Merged(proposals[rank]))
                if class_name not in entry.classes:
                    entry.classes.append(class_name)
    return merged


def _table(merged: Mapping[str, _Merged], origin: ConceptOrigin) -> pd.DataFrame:
    rows = [
        {
            "concept_id": concept_id,
            "name": entry.proposal.name,
            "definition": entry.proposal.definition,
            "group": entry.proposal.group,
            "proposed_for": entry.classes,
            "origin": origin.value,
            "status": ConceptStatus.KEPT.value,
            "reason": None,
            "nearest": None,
            "similarity": None,
            "position": position,
        }
        for position, (concept_id, entry) in enumerate(merged.items())
    ]
    return pd.DataFrame(rows, columns=CONCEPTS.column_names)
