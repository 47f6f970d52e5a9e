"""The chat-completions protocol of the local endpoint: a request's body as a job, an answer as a completion."""

from __future__ import annotations

import base64
import binascii
import io
import json
import time
import uuid
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from annotation.vlm.local_jobs import Answer, Job, NoAnswer
from annotation.vlm.local_model import LocalModel

_MAX_IMAGE_PIXELS = 16_000_000
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_MAX_TOP_LOG_PROBABILITIES = 20
_DEFAULT_TOKEN_LIMIT = 1024
"""Most tokens of an answer whose request names no limit."""


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class _Url(BaseModel):
    url: str


class _ImageUrl(BaseModel):
    type: Literal["image_url"]
    image_url: _Url


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[_Text | _ImageUrl, Field(discriminator="type")]]

    @property
    def parts(self) -> list[_Text | _ImageUrl]:
        return [_Text(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class _Schema(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    body: dict[str, Any] = Field(alias="schema")


class _Format(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None


class _Body(BaseModel):
    """A request; fields that would change the answer but are not supported are refused, not ignored."""

    model: str
    messages: list[_Message]
    response_format: _Format | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=_MAX_TOP_LOG_PROBABILITIES)
    top_p: float | None = Field(None, ge=1, le=1)
    n: Literal[1, None] = None
    stream: Literal[False, None] = None
    stop: None = None
    tools: None = None


def read_job(body: bytes, vlm: LocalModel) -> Job:
    """The job in one request body; raises `NoAnswer`."""
    try:
        asked = _Body.model_validate_json(body)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False)[:5])
        raise NoAnswer(400, f"The request could not be understood: {faults}.") from None
    if asked.model != vlm.name:
        raise NoAnswer(404, f"The model {asked.model!r} does not exist; use {vlm.name!r}.")
    limit = asked.max_completion_tokens or asked.max_tokens or _DEFAULT_TOKEN_LIMIT
    if any(isinstance(p, _ImageUrl) for m in asked.messages if m.role != "user" for p in m.parts):
        raise NoAnswer(400, "Only messages of the user may hold images.")
    return Job(
        vlm.render(_conversation(asked, vlm)),
        tuple(_decode(p.image_url.url) for m in asked.messages for p in m.parts if isinstance(p, _ImageUrl)),
        limit,
        asked.temperature or 0.0,
        asked.seed,
        (asked.top_logprobs or 0) if asked.logprobs else None,
    )


def _conversation(asked: _Body, vlm: LocalModel) -> list[dict[str, Any]]:
    """The messages in the form that chat templates take, with the schema in the system's words."""
    spoken = [m for m in asked.messages if m.role not in {"system", "developer"}]
    system = [p.text for m in asked.messages if m not in spoken for p in m.parts if isinstance(p, _Text)]
    turns = [{"role": m.role, "content": [_part(p, vlm) for p in m.parts]} for m in spoken]
    return vlm.with_system(vlm.plain("\n".join([*system, *_schema_words(asked.response_format)])), turns)


def _part(part: _Text | _ImageUrl, vlm: LocalModel) -> dict[str, str]:
    return {"type": "text", "text": vlm.plain(part.text)} if isinstance(part, _Text) else {"type": "image"}


def _schema_words(wanted: _Format | None) -> list[str]:
    if wanted is None or wanted.type == "text":
        return []
    if wanted.json_schema is None:
        return ["Answer with one JSON object and nothing else."]
    compact = json.dumps(wanted.json_schema.body, ensure_ascii=False, separators=(",", ":"))
    return [f"Answer with one JSON object that keeps this schema: {compact}"]


def _decode(url: str) -> Image.Image:
    """The image in a data URL; nothing is ever fetched."""
    head, comma, data = url.partition(",")
    if not comma or head not in {"data:image/png;base64", "data:image/jpeg;base64"}:
        raise NoAnswer(400, "Images must be data URLs that hold PNG or JPEG in base64; nothing is fetched.")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=("PNG", "JPEG"))
        if image.width * image.height > _MAX_IMAGE_PIXELS:
            raise NoAnswer(400, f"An image has more than {_MAX_IMAGE_PIXELS:,} pixels.")
        return image.convert("RGB")
    except (binascii.Error, OSError, SyntaxError, ValueError, *_BOMBS) as error:
        raise NoAnswer(400, "An image could not be decoded.") from error


def completion_of(vlm: LocalModel, answer: Answer) -> dict[str, Any]:
    """An answer as the protocol's completion."""
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": vlm.name,
        "system_fingerprint": vlm.fingerprint,
        "choices": [
            {
                "index": 0,
                "finish_reason": "length" if answer.is_cut else "stop",
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None if answer.log_probabilities is None else {"content": answer.log_probabilities},
            }
        ],
        "usage": {
            "prompt_tokens": answer.n_prompt_tokens,
            "completion_tokens": answer.n_tokens,
            "total_tokens": answer.n_prompt_tokens + answer.n_tokens,
        },
    }


def error_of(failure: NoAnswer) -> dict[str, Any]:
    """A failure as the protocol's error."""
    kind = "server_error" if failure.status >= 500 else "invalid_request_error"
    return {"error": {"message": failure.message, "type": kind, "param": None, "code": None}}
