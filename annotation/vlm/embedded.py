"""The embedded endpoint: an ASGI application that speaks the chat-completions protocol and answers from measurements.

It sees what any endpoint sees: the prompt and the re-encoded pixels of a request. It proposes what it can measure,
judges definitions that state a measured cut, falls back to a lexicon for other words, and says `uncertain` for
everything else. It is no vision-language model and signs with a name that says so.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image

from annotation.prompts import CONCEPTS_MARK, MODALITY_MARK
from annotation.proposal_prompts import OTHERS_MARK
from annotation.vlm.attributes import nouns_of
from annotation.vlm.measure import Measurements, measure
from annotation.vlm.questions import NONE_OF_THEM, UNCERTAIN_CHOICE, free_name
from annotation.vlm.reading import reading_of
from annotation.vlm.select import select_concepts
from annotation.vlm.settings import EMBEDDED_MODEL, MEASUREMENT_VERSION
from annotation.vlm.tokens import image_tokens, text_tokens
from data_contracts.ports import Pixels

_MAX_THREADS = 4
_MAX_IMAGE_PIXELS = 16_000_000
_SURE = 0.56
_NOT_MEASURABLE = "not measurable here"


class _BadRequest(ValueError):
    """A request that this endpoint cannot understand."""


@dataclass(frozen=True)
class _Question:
    """What a request asks: its text, and its images in two groups."""

    text: str
    images: list[Pixels]
    others: list[Pixels]


def create_app(n_threads: int | None = None) -> FastAPI:
    """The application; measuring runs on `n_threads` threads (default: one per core, at most four)."""
    app = FastAPI(title="medmicn embedded endpoint", openapi_url=None, docs_url=None, redoc_url=None)
    workers = ThreadPoolExecutor(n_threads or min(_MAX_THREADS, os.cpu_count() or 1), "medmicn-measure")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": EMBEDDED_MODEL, "object": "model", "created": 0, "owned_by": "medmicn"}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> JSONResponse:
        body = await request.body()
        status, content = await asyncio.get_running_loop().run_in_executor(workers, _respond, body)
        return JSONResponse(content, status_code=status)

    return app


def _respond(body: bytes) -> tuple[int, dict[str, Any]]:
    """HTTP status and body for one request body."""
    try:
        content = json.loads(body)
        if content.get("model") != EMBEDDED_MODEL:
            return 404, _error(f"The model {content.get('model')!r} does not exist; use {EMBEDDED_MODEL!r}.")
        if content.get("stream"):
            return 400, _error("This endpoint does not stream.")
        question = _read_question(content["messages"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return 400, _error(f"The request could not be understood: {type(error).__name__}.")
    answer = json.dumps(_answer(question), ensure_ascii=False)
    return 200, _completion(question, answer, content.get("max_completion_tokens") or content.get("max_tokens"))


def _read_question(messages: list[dict[str, Any]]) -> _Question:
    texts: list[str] = []
    images: list[Pixels] = []
    others: list[Pixels] = []
    into = images
    for part in _parts(messages):
        if part.get("type") == "text":
            texts.append(str(part["text"]))
            into = others if texts[-1].startswith(OTHERS_MARK) else into
        elif part.get("type") == "image_url":
            into.append(_decode(part["image_url"]["url"]))
    return _Question("\n".join(texts), images, others)


def _parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content") if message.get("role") == "user" else None
        found += [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    return found


def _decode(url: str) -> Pixels:
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise _BadRequest("images must be data URLs")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        if image.width * image.height > _MAX_IMAGE_PIXELS:
            raise _BadRequest("image too large")
        return np.asarray(image.convert("RGB"))
    except (binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _BadRequest("image could not be decoded") from error


def _answer(question: _Question) -> dict[str, Any]:
    if CONCEPTS_MARK in question.text and question.images:
        return _judge(question)
    if question.images:
        return _propose(question)
    return {"concepts": []}


def _judge(question: _Question) -> dict[str, Any]:
    listed = question.text.split(CONCEPTS_MARK, 1)[1]
    concepts, _ = json.JSONDecoder().raw_decode(listed.lstrip())
    # Examples come first: the image in question is the last one.
    measured = measure(question.images[-1])
    return {c["id"]: _choice(c, measured) if "choice_of" in c else _verdict(c, measured) for c in concepts}


def _verdict(concept: dict[str, Any], measured: Measurements) -> dict[str, Any]:
    reading = reading_of(concept["name"], concept.get("definition") or "")
    probability = None if reading is None else reading.probability(measured)
    if reading is None or probability is None:
        return {"state": "uncertain", "probability": 0.5, "evidence": _NOT_MEASURABLE}
    state = "present" if probability >= _SURE else "absent" if probability <= 1 - _SURE else "uncertain"
    return {"state": state, "probability": round(probability, 4), "evidence": reading.evidence(measured)}


def _choice(question: dict[str, Any], measured: Measurements) -> dict[str, Any]:
    """The likeliest measured value, if it stands out; with an unmeasurable value nothing can be excluded."""
    verdicts = {c["id"]: _verdict(c, measured) for c in question["choice_of"]}
    best = max(verdicts, key=lambda value: verdicts[value]["probability"])
    if verdicts[best]["state"] == "present":
        return {"choice": best} | {name: verdicts[best][name] for name in ("probability", "evidence")}
    if all(v["state"] == "absent" for v in verdicts.values()):
        sure = 1 - verdicts[best]["probability"]
        return {
            "choice": free_name(NONE_OF_THEM, verdicts),
            "probability": round(sure, 4),
            "evidence": verdicts[best]["evidence"],
        }
    return {"choice": free_name(UNCERTAIN_CHOICE, verdicts), "probability": 0.5, "evidence": _NOT_MEASURABLE}


def _propose(question: _Question) -> dict[str, Any]:
    modality = next((x for x in question.text.splitlines() if x.startswith(MODALITY_MARK)), "")
    nouns = nouns_of(modality.removeprefix(MODALITY_MARK))
    chosen = select_concepts([measure(p) for p in question.images], [measure(p) for p in question.others])
    concepts = [
        {"name": c.attribute.concept_name(nouns), "definition": c.attribute.definition(c.cut, nouns), "group": None}
        for c in chosen
    ]
    return {"concepts": concepts}


def _completion(question: _Question, answer: str, limit: int | None) -> dict[str, Any]:
    n_images = len(question.images) + len(question.others)
    n_input = text_tokens(len(question.text)) + n_images * image_tokens(EMBEDDED_MODEL, 512, 512)
    n_output = text_tokens(len(answer))
    is_cut = limit is not None and n_output > limit
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": EMBEDDED_MODEL,
        "system_fingerprint": f"measurements-{MEASUREMENT_VERSION}",
        "choices": [
            {
                "index": 0,
                "finish_reason": "length" if is_cut else "stop",
                "message": {
                    "role": "assistant",
                    "content": answer[: limit * 3] if is_cut and limit else answer,
                    "refusal": None,
                },
            }
        ],
        "usage": {"prompt_tokens": n_input, "completion_tokens": n_output, "total_tokens": n_input + n_output},
    }


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
