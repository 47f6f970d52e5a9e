"""What an endpoint can do, found out with a few drawn pictures before any image of anybody is sent.

Endpoints accept what they ignore: images, schemas, log-probabilities. A model that never saw the pictures cannot say
which of four colours each of them shows, so one that ignores images is found out here and refused.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from annotation.prompts import Framing, judging_request, yes_no_request
from annotation.vlm.client import VlmClient, usable_text
from annotation.vlm.journal import Record, utc_now
from annotation.vlm.questions import Question
from annotation.vlm.schema import AnswerFault, FaultCode, Verdict, VlmRequest, parse_judgements, verdict_of_yes_no
from annotation.vlm.settings import JPEG_QUALITY, VlmSettings
from data_contracts.concepts import Concept
from data_contracts.errors import ConfigurationError, EndpointError
from data_contracts.pixels import encode
from data_contracts.ports import Pixels
from data_contracts.tables import State

PROBE_VERSION = 1
"""Raised when the probe asks something else, so that stored findings are not taken for new ones."""

_COLOURS = {"red": (208, 32, 38), "green": (22, 150, 60), "blue": (30, 70, 200), "yellow": (240, 210, 40)}
_LEAST_RIGHT = 3
"""Of four colours: a guess is right so often in one of twenty tries, a blind model that always says the same never."""
_LEAST_DIFFERENCE = 0.02
_GREY = 128
_SIDE_PX = 256
_FRAMING = Framing("drawn test picture of plain discs on grey")


@dataclass(frozen=True)
class Capabilities:
    """What was found, as it is stored in the manifest."""

    version: int
    probed_at: str
    base_url: str
    model: str
    probability: str
    """Kind of question that was tested, as `vlm.probability` names it."""
    side_px: int
    """Side of the pictures that were sent."""
    sees_images: bool
    """Whether it told the colours of drawn discs."""
    n_right: int
    """Pictures of four whose colour was told rightly."""
    keeps_schema: bool
    """Whether every answer kept the schema as it came, without a fence or prose around it."""
    logprobs: bool
    """Whether it gives log-probabilities when asked."""
    reports_usage: bool
    """Whether it counts tokens."""
    tokens_per_image: int | None
    """Tokens of one square image of the configured size as it counts them; None where it does not."""
    seconds_per_answer: float
    """Mean time of an answer, a few at a time."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        tokens = "not told" if self.tokens_per_image is None else str(self.tokens_per_image)
        return [
            f"sees images: {'yes' if self.sees_images else 'NO'} ({self.n_right} of {len(_COLOURS)} colours told)",
            f"keeps the schema: {'yes' if self.keeps_schema else 'no; answers are validated anyway'}",
            f"log-probabilities: {'yes' if self.logprobs else 'no'}; tokens of an image: {tokens}; "
            f"{self.seconds_per_answer:.1f} s an answer",
        ]


async def probe(client: VlmClient) -> Capabilities:
    """What the endpoint can do; sends `n_requests` questions, never answered from the journal.

    Raises:
        EndpointError: it ignores images, or gave no usable answer at all.
        ConfigurationError: log-probabilities are configured and it has none.
    """
    by_word = client.settings.probability == "logprobs"
    one_word = _one_word_request(client, "red", "red")
    first = await client.send(one_word)
    if by_word and first is FaultCode.REQUEST_REFUSED:
        raise _without_logprobs(client)
    with_image = first if isinstance(first, Record) else None
    seen, without = await asyncio.gather(
        _seen_in_words(client) if by_word else _seen_in_json(client),
        _sent(client, _without_image(one_word)),
    )
    records = [r for r in (*seen.records, with_image, without) if r is not None]
    if not records:
        raise EndpointError(
            f"{_name(client)}: expected answers to a few test questions, got none; no image of yours was sent.",
            remedy="Look into the endpoint's own log, or try one request by hand.",
        )
    found = Capabilities(
        version=PROBE_VERSION,
        probed_at=utc_now(),
        base_url=client.settings.base_url,
        model=client.settings.model,
        probability=client.settings.probability,
        side_px=client.settings.side_px,
        sees_images=seen.n_right >= _LEAST_RIGHT,
        n_right=seen.n_right,
        keeps_schema=seen.keeps_schema,
        logprobs=with_image is not None and bool(with_image.top_logprobs),
        reports_usage=all(r.is_counted for r in records),
        tokens_per_image=_tokens_per_image(with_image, without),
        seconds_per_answer=round(sum(r.seconds for r in records) / len(records), 3),
    )
    _refuse(found, seen, client)
    return found


def n_requests(client_settings: VlmSettings) -> int:
    """Requests that a probe sends."""
    per_colour = 2 if client_settings.probability == "logprobs" else 1
    return per_colour * len(_COLOURS) + 2


def picture(colour: str, n_discs: int = 1) -> Pixels:
    """A grey square with one disc of a named colour, or four of them."""
    pixels = np.full((_SIDE_PX, _SIDE_PX, 3), _GREY, np.uint8)
    y, x = np.ogrid[0:_SIDE_PX, 0:_SIDE_PX]
    quarter, half = _SIDE_PX // 4, _SIDE_PX // 2
    centres = (
        [(half, half)] if n_discs == 1 else [(a, b) for a in (quarter, 3 * quarter) for b in (quarter, 3 * quarter)]
    )
    radius_px = quarter if n_discs == 1 else quarter // 2
    for row, column in centres:
        pixels[np.hypot(y - row, x - column) <= radius_px] = _COLOURS[colour]
    return pixels


@dataclass(frozen=True)
class _Seen:
    """What the pictures showed of the endpoint."""

    n_right: int
    records: tuple[Record, ...]
    keeps_schema: bool
    n_usable: int


async def _seen_in_json(client: VlmClient) -> _Seen:
    """Each colour in one picture, asked for by the very kind of question that images will be asked."""
    colour_question = Question("probe-colour", tuple(_concept(c) for c in _COLOURS), "colour of the disc")
    several = Concept("probe-several-discs", "several discs", "More than one disc is seen.")
    questions = (colour_question, Question(several.concept_id, (several,)))
    n_right, n_usable = 0, 0
    records: list[Record] = []
    images = [_encoded(client, picture(colour, n_discs=1 + 3 * (n % 2))) for n, colour in enumerate(_COLOURS)]
    limit = client.settings.max_output_tokens
    answers = (_sent(client, judging_request(image, questions, _FRAMING, limit)) for image in images)
    for colour, record in zip(_COLOURS, await asyncio.gather(*answers), strict=True):
        if record is None:
            continue
        records.append(record)
        verdicts = _verdicts(record, questions)
        n_usable += bool(verdicts)
        n_right += bool(verdicts) and verdicts[_concept(colour).concept_id].state is State.PRESENT
    return _Seen(n_right, tuple(records), all(_is_bare_json(r) for r in records), n_usable)


async def _seen_in_words(client: VlmClient) -> _Seen:
    """Each colour asked of a picture that has it and of one that has not: "yes" must be likelier of the first."""
    n_right, n_usable = 0, 0
    records: list[Record] = []
    colours = list(_COLOURS)
    pairs = list(zip(colours, colours[1:] + colours[:1], strict=True))
    asked = [_one_word_request(client, shown, pair[0]) for pair in pairs for shown in pair]
    answers = await asyncio.gather(*(_sent(client, request) for request in asked))
    for found in zip(answers[::2], answers[1::2], strict=True):
        verdicts = [_word_verdict(record) for record in found]
        records += [record for record in found if record is not None]
        p_right, p_wrong = (None if v is None else v.probability for v in verdicts)
        n_usable += p_right is not None
        n_right += p_right is not None and p_wrong is not None and p_right > p_wrong + _LEAST_DIFFERENCE
    return _Seen(n_right, tuple(records), keeps_schema=n_usable == len(colours), n_usable=n_usable)


def _refuse(found: Capabilities, seen: _Seen, client: VlmClient) -> None:
    if client.settings.probability == "logprobs" and not found.logprobs:
        raise _without_logprobs(client)
    if not seen.n_usable:
        raise EndpointError(
            f"{_name(client)} answered, but with nothing that can be used: expected JSON that keeps the schema in at "
            f"least one of {len(_COLOURS)} test questions; no image of yours was sent.",
            remedy="Choose a model that follows instructions, or give it more room with vlm.max_output_tokens.",
        )
    if not found.sees_images:
        raise EndpointError(
            f"{_name(client)} does not see images: it told {found.n_right} of {len(_COLOURS)} colours of drawn discs, "
            "as a model does that never got the picture; no image of yours was sent.",
            remedy="Serve it with its vision part (llama.cpp: --mmproj), choose a vision-language model, or, if you "
            "know better, set vlm.probe = false.",
        )


def _without_logprobs(client: VlmClient) -> ConfigurationError:
    return ConfigurationError(
        f"vlm.probability = 'logprobs': {_name(client)} gives no log-probabilities; no image of yours was sent.",
        remedy="Use vlm.probability = 'stated', or vlm.samples = 5 with vlm.temperature = 0.7.",
    )


async def _sent(client: VlmClient, request: VlmRequest) -> Record | None:
    answer = await client.send(request)
    return answer if isinstance(answer, Record) else None


def _one_word_request(client: VlmClient, shown: str, asked: str) -> VlmRequest:
    return yes_no_request(_encoded(client, picture(shown)), _concept(asked), _FRAMING)


def _without_image(request: VlmRequest) -> VlmRequest:
    return replace(request, parts=tuple(part for part in request.parts if isinstance(part, str)))


def _concept(colour: str) -> Concept:
    return Concept(f"probe-{colour}", colour, f"The disc is {colour}.")


def _encoded(client: VlmClient, pixels: Pixels) -> bytes:
    """The picture at the size at which images will be sent, so that its tokens are theirs."""
    side_px = client.settings.side_px
    grown = np.asarray(Image.fromarray(pixels).resize((side_px, side_px), Image.Resampling.NEAREST))
    return encode(grown, side_px, client.settings.encoding, jpeg_quality=JPEG_QUALITY)


def _verdicts(record: Record, questions: Sequence[Question]) -> Mapping[str, Verdict]:
    try:
        return parse_judgements(usable_text(record), questions)
    except AnswerFault:
        return {}


def _word_verdict(record: Record | None) -> Verdict | None:
    try:
        return None if record is None else verdict_of_yes_no(record.top_logprobs)
    except AnswerFault:
        return None


def _is_bare_json(record: Record) -> bool:
    try:
        return isinstance(json.loads(record.text or ""), dict)
    except ValueError:
        return False


def _tokens_per_image(with_image: Record | None, without: Record | None) -> int | None:
    if with_image is None or without is None or not (with_image.is_counted and without.is_counted):
        return None
    difference = with_image.input_tokens - without.input_tokens
    return difference if difference > 0 else None


def _name(client: VlmClient) -> str:
    return f"{client.settings.model!r} at {client.settings.base_url}"
