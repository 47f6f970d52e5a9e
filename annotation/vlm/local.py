"""The local endpoint: a Hugging Face vision-language model in process, behind the chat-completions protocol.

Any image-text-to-text model with a chat template, from the hub or a folder; safetensors only, and none of its own code.
Requests that wait together go through one `generate`. Greedy answers are the same alone and in a batch in float32
(CPU); in bfloat16 (CUDA) sums are rounded differently in another batch, so that a close call may fall otherwise.

`generate` cannot enforce a JSON schema: the schema goes into the words, and whoever asks validates the answer.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import copy
import gc
import io
import json
import logging
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import torch
import transformers
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LogitsProcessor, StoppingCriteria
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from annotation.text import quiet_loading
from data_contracts.errors import ConfigurationError

logger = logging.getLogger(__name__)

_PATIENCE_S = 0.02
"""How long the first request of a batch waits for company."""
_MAX_IMAGE_PIXELS = 16_000_000
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_MAX_TOP_LOG_PROBABILITIES = 20
_DEFAULT_TOKEN_LIMIT = 1024
"""Most tokens of an answer whose request names no limit."""
_LEAST_LOG_PROBABILITY = -9999.0
"""The protocol's number for what is next to impossible; JSON has no infinity."""

_OUT_OF_MEMORY = 507
"""The HTTP status nearest to it: insufficient storage."""

_LOADING = threading.Lock()
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MARKUP = re.compile(r"[<\[].*[>\]]")
_SYSTEM_MARK, _USER_MARK = "the system speaks", "the user speaks"

_PLAIN_DECODING: dict[str, Any] = {
    # The request decides how tokens are drawn, never a file beside the weights; a penalty on repetition, for one,
    # breaks JSON, which repeats its keys.
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "max_length": None,
}


class _NoAnswer(Exception):
    """Why one request gets no answer: an HTTP status and words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def create_app(model: str, *, device: str = "auto", batch_size: int = 4, offline: bool = False) -> FastAPI:
    """The application that answers with `model`; loads it, unless the one loaded last is the same.

    Args:
        model: A hub name (`ORG/NAME`) or a folder; requests must name the model by the same words.
        device: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.
        batch_size: Most requests that run through the model at once.
        offline: Look on this machine only.

    Raises:
        ConfigurationError: The model or the device cannot be used.
    """
    with _LOADING:
        engine = _shared_engine(model, device, batch_size, offline)
    app = FastAPI(title="medmicn local endpoint", openapi_url=None, docs_url=None, redoc_url=None)
    # In the state, not in closures: FastAPI keeps every endpoint function for ever, and with it what that encloses.
    app.state.engine = engine
    app.add_api_route("/v1/models", _models)
    app.add_api_route("/v1/chat/completions", _chat, methods=["POST"])
    return app


async def _models(request: Request) -> dict[str, Any]:
    entry = {"id": request.app.state.engine.vlm.name, "object": "model", "created": 0, "owned_by": "local"}
    return {"object": "list", "data": [entry]}


async def _chat(request: Request) -> JSONResponse:
    engine: _Engine = request.app.state.engine
    body = await request.body()
    try:
        job = await asyncio.to_thread(_read, body, engine.vlm)
        return JSONResponse(_completion(engine.vlm, await asyncio.wrap_future(engine.submit(job))))
    except _NoAnswer as failure:
        # The same request would fail again: the openai client is told not to repeat it.
        return JSONResponse(_error(failure), failure.status, headers={"x-should-retry": "false"})


def release() -> None:
    """Forget the loaded model: its memory is free, and its thread gone, once no application uses it."""
    with _LOADING:
        _shared_engine.cache_clear()
    _free_memory()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@lru_cache(maxsize=1)
def _shared_engine(model: str, device: str, batch_size: int, offline: bool) -> _Engine:
    """The engine of a model: every client of a process uses the same weights."""
    return _Engine(_load(model, device, offline), batch_size)


# --- What is asked ---------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True, eq=False)
class _Job:
    """One request, ready for the model."""

    prompt: str = field(repr=False)
    images: tuple[Image.Image, ...] = field(repr=False)
    token_limit: int
    temperature: float = 0.0
    seed: int | None = None
    n_top: int | None = None
    """Log-probabilities wanted beside each token's own; None: none at all."""
    future: Future[_Answer] = field(default_factory=Future)

    @property
    def kind(self) -> tuple[int, float]:
        """Equal for requests that may share a batch; seeds may differ, each row draws from its own."""
        return len(self.images), self.temperature


def _read(body: bytes, vlm: _Vlm) -> _Job:
    """The job in one request body; raises `_NoAnswer`."""
    try:
        asked = _Body.model_validate_json(body)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False)[:5])
        raise _NoAnswer(400, f"The request could not be understood: {faults}.") from None
    if asked.model != vlm.name:
        raise _NoAnswer(404, f"The model {asked.model!r} does not exist; use {vlm.name!r}.")
    limit = asked.max_completion_tokens or asked.max_tokens or _DEFAULT_TOKEN_LIMIT
    if any(isinstance(p, _ImageUrl) for m in asked.messages if m.role != "user" for p in m.parts):
        raise _NoAnswer(400, "Only messages of the user may hold images.")
    return _Job(
        vlm.render(_conversation(asked, vlm)),
        tuple(_decode(p.image_url.url) for m in asked.messages for p in m.parts if isinstance(p, _ImageUrl)),
        limit,
        asked.temperature or 0.0,
        asked.seed,
        (asked.top_logprobs or 0) if asked.logprobs else None,
    )


def _conversation(asked: _Body, vlm: _Vlm) -> list[dict[str, Any]]:
    """The messages in the form that chat templates take, with the schema in the system's words."""
    spoken = [m for m in asked.messages if m.role not in {"system", "developer"}]
    system = [p.text for m in asked.messages if m not in spoken for p in m.parts if isinstance(p, _Text)]
    turns = [{"role": m.role, "content": [_part(p, vlm) for p in m.parts]} for m in spoken]
    return vlm.with_system(vlm.plain("\n".join([*system, *_schema_words(asked.response_format)])), turns)


def _part(part: _Text | _ImageUrl, vlm: _Vlm) -> dict[str, str]:
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
        raise _NoAnswer(400, "Images must be data URLs that hold PNG or JPEG in base64; nothing is fetched.")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=("PNG", "JPEG"))
        if image.width * image.height > _MAX_IMAGE_PIXELS:
            raise _NoAnswer(400, f"An image has more than {_MAX_IMAGE_PIXELS:,} pixels.")
        return image.convert("RGB")
    except (binascii.Error, OSError, SyntaxError, ValueError, *_BOMBS) as error:
        raise _NoAnswer(400, "An image could not be decoded.") from error


# --- What is answered ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """What the model said, and what it took."""

    text: str
    is_cut: bool
    """Whether the limit ended it, not the model."""
    n_prompt_tokens: int
    n_tokens: int
    """Generated tokens, the closing one included."""
    log_probabilities: list[dict[str, Any]] | None


def _completion(vlm: _Vlm, answer: _Answer) -> dict[str, Any]:
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


def _error(failure: _NoAnswer) -> dict[str, Any]:
    kind = "server_error" if failure.status >= 500 else "invalid_request_error"
    return {"error": {"message": failure.message, "type": kind, "param": None, "code": None}}


# --- Batches ---------------------------------------------------------------------------------------------------------


class _Engine:
    """Runs jobs through a model, in batches, on one thread that only lives while there is work or a user."""

    def __init__(self, vlm: _Vlm, batch_size: int) -> None:
        self.vlm = vlm
        self._batch_size = batch_size
        self._fits: dict[int, int] = {}
        """Largest batch that fits into memory, by images a request; only where the wanted one did not."""
        self._waiting: list[_Job] = []
        self._changed = threading.Condition()
        self._is_working = False
        # An idle thread of an executor neither holds its owner in memory nor the process at its end.
        self._thread = ThreadPoolExecutor(1, "medmicn-local-vlm")

    def submit(self, job: _Job) -> Future[_Answer]:
        """The future answer; cancelling it takes the job out of the queue or ends its part of the batch."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()
            if not self._is_working:
                self._is_working = True
                self._thread.submit(self._work)
        return job.future

    def _work(self) -> None:
        while batch := self._next_batch():
            self._answer(batch)

    def _next_batch(self) -> list[_Job]:
        """Jobs of the kind that waited longest; none, and the work is over, when nothing waits."""
        with self._changed:
            self._changed.wait_for(self._is_full, _PATIENCE_S)
            batch = self._alike()
            taken = set(batch)
            self._waiting = [job for job in self._waiting if job not in taken and not job.future.cancelled()]
            self._is_working = bool(batch)
            return batch

    def _is_full(self) -> bool:
        """Whether waiting longer changes nothing."""
        alike = self._alike()
        return not alike or len(alike) == self._most(alike[0])

    def _alike(self) -> list[_Job]:
        waiting = [job for job in self._waiting if not job.future.cancelled()]
        return [job for job in waiting if job.kind == waiting[0].kind][: self._most(waiting[0])] if waiting else []

    def _most(self, job: _Job) -> int:
        return self._fits.get(len(job.images), self._batch_size)

    def _answer(self, jobs: Sequence[_Job]) -> None:
        """Give every job its answer or its failure; what fails together is tried again in smaller batches."""
        failure = self._try(jobs)
        if failure is None:
            return
        if len(jobs) == 1:
            logger.warning("Local model %s: no answer to one request: %s", self.vlm.name, failure.message)
            if jobs[0].future.set_running_or_notify_cancel():
                jobs[0].future.set_exception(failure)
            return
        size = self._halved(jobs) if failure.status == _OUT_OF_MEMORY else 1
        for start in range(0, len(jobs), size):
            self._answer(jobs[start : start + size])

    def _halved(self, jobs: Sequence[_Job]) -> int:
        """The batch size to go on with, kept for later batches of this kind."""
        size = len(jobs) // 2
        self._fits[len(jobs[0].images)] = size
        advice = f"Set vlm.local_batch_size = {size}, or lower vlm.image_side_px."
        logger.warning("Local model %s: out of memory with %d requests at once. %s", self.vlm.name, len(jobs), advice)
        _free_memory()
        return size

    def _try(self, jobs: Sequence[_Job]) -> _NoAnswer | None:
        try:
            answers = self.vlm.generate(jobs)
        except _NoAnswer as failure:
            return failure.with_traceback(None)
        except Exception as error:
            # A new object: the frames of the old one hold the tensors that did not fit.
            return _failure(error)
        for job, answer in zip(jobs, answers, strict=True):
            if job.future.set_running_or_notify_cancel():
                job.future.set_result(answer)
        return None


def _failure(error: Exception) -> _NoAnswer:
    if not _is_out_of_memory(error):
        return _NoAnswer(500, f"The model failed on this request ({_first_line(error)}).")
    return _NoAnswer(
        _OUT_OF_MEMORY,
        "The model ran out of memory on one request alone. Lower vlm.image_side_px or vlm.max_output_tokens, or choose "
        "a smaller model; vlm.local_batch_size and vlm.concurrency cannot help any more.",
    )


def _is_out_of_memory(error: BaseException) -> bool:
    words = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in words or "can't allocate memory" in words)
    )


# --- The model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Vlm:
    """A loaded model with its processor."""

    name: str
    processor: Any = field(repr=False)
    template: Any = field(repr=False)
    """The chat template: Jinja, or several by name, of which the one called `default` is used."""
    takes_system: bool
    """Whether the chat template passes on what the system says."""
    model: Any = field(default=None, repr=False)

    @property
    def fingerprint(self) -> str:
        """What decides an answer besides the model: the library and the numbers it computes with."""
        return f"transformers-{transformers.__version__}-{str(self.model.dtype).removeprefix('torch.')}"

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        """Words that a tokenizer turns into control tokens, such as the place of an image or the end of a turn."""
        added = self.processor.tokenizer.added_tokens_decoder.values()
        words: set[str] = {token.content for token in added if token.special or _MARKUP.fullmatch(token.content)}
        words.add(getattr(self.processor, "image_token", None) or "")
        longest_first = sorted((word for word in words if word.strip()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _end_ids(self) -> set[int]:
        ids = self.model.generation_config.eos_token_id
        ids = self.processor.tokenizer.eos_token_id if ids is None else ids
        return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)

    def plain(self, text: str) -> str:
        """`text` with a space inside every control token: a concept's name can neither end a turn nor add an image."""
        return self._control_tokens.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def with_system(self, system: str, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """`turns` with the system's words before them, or at the head of the user's where the template wants that."""
        if not system:
            return turns
        if self.takes_system:
            return [{"role": "system", "content": [{"type": "text", "text": system}]}, *turns]
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if first is None:
            raise _NoAnswer(400, "The request holds no message of the user.")
        first["content"].insert(0, {"type": "text", "text": f"{system}\n\n"})
        return turns

    def render(self, conversation: list[dict[str, Any]]) -> str:
        """The prompt of a conversation; raises `_NoAnswer` where the chat template does not allow it."""
        # Thinking aloud would use up the room of a short JSON answer.
        options = {"enable_thinking": False} if "enable_thinking" in str(self.template) else {}
        try:
            return self.processor.apply_chat_template(
                conversation, chat_template=self.template, add_generation_prompt=True, tokenize=False, **options
            )
        except (jinja2.TemplateError, ValueError, TypeError, LookupError) as error:
            raise _NoAnswer(400, f"The chat template refuses these messages ({_first_line(error)}).") from error

    @torch.inference_mode()
    def generate(self, jobs: Sequence[_Job]) -> list[_Answer]:
        """The answers to jobs of one kind, in one batch."""
        inputs = self._inputs(jobs)
        n_prompts = inputs["attention_mask"].sum(1).tolist()  # (B,) without padding
        limits = [min(job.token_limit, self._room(n)) for job, n in zip(jobs, n_prompts, strict=True)]
        config = copy.deepcopy(self.model.generation_config)
        config.update(
            **_PLAIN_DECODING,
            max_new_tokens=max(limits),
            pad_token_id=self.processor.tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=any(job.n_top is not None for job in jobs),
        )
        start = inputs["input_ids"].shape[1]
        output = self.model.generate(
            **inputs,
            generation_config=config,
            logits_processor=[_Draw(jobs, self.model.device)] if jobs[0].temperature else [],
            stopping_criteria=[_Enough(jobs, limits, start)],
        )
        tokens = output.sequences[:, start:].tolist()
        return [
            self._read_off(job, self._until_end(tokens[row][: limits[row]]), n_prompts[row], row, output.logits)
            for row, job in enumerate(jobs)
        ]

    def _inputs(self, jobs: Sequence[_Job]) -> Any:
        prompts, images = [job.prompt for job in jobs], [list(job.images) for job in jobs]
        bos = self.processor.tokenizer.bos_token
        inputs = self.processor(
            text=prompts,
            images=images if images[0] else None,
            padding=True,
            return_tensors="pt",
            # A template that writes the first token itself must not get a second one.
            add_special_tokens=not (bos and prompts[0].startswith(bos)),
        )
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def _room(self, n_prompt: int) -> int:
        """Tokens that the context leaves for an answer; raises `_NoAnswer` when there is no room."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and n_prompt >= context:
            raise _NoAnswer(
                400,
                f"The request takes {n_prompt} tokens, and the model's context holds {context}: lower "
                "vlm.image_side_px, or ask about fewer concepts.",
            )
        return sys.maxsize if context is None else context - n_prompt

    def _until_end(self, ids: list[int]) -> list[int]:
        ends = [k for k, token_id in enumerate(ids) if token_id in self._end_ids]
        return ids[: ends[0] + 1] if ends else ids

    def _read_off(self, job: _Job, ids: list[int], n_prompt: int, row: int, logits: tuple[Tensor, ...]) -> _Answer:
        rows = None if job.n_top is None else torch.stack([step[row] for step in logits[: len(ids)]])  # (T, V)
        return _Answer(
            text=self._spell(ids, skip_special_tokens=True),
            is_cut=ids[-1] not in self._end_ids,
            n_prompt_tokens=n_prompt,
            n_tokens=len(ids),
            log_probabilities=None if rows is None else self._log_probabilities(rows, ids, job.n_top or 0),
        )

    def _log_probabilities(self, logits: Tensor, ids: list[int], n_top: int) -> list[dict[str, Any]]:
        """The protocol's entry for each token, from (T, V) scores before any temperature."""
        every = logits.float().log_softmax(-1)
        if every.isnan().any():
            raise _NoAnswer(500, "The model computed numbers that are not finite; its log-probabilities mean nothing.")
        best = every.topk(n_top, -1)
        return [
            {
                **self._entry(token_id, every[step, token_id]),
                "top_logprobs": [
                    self._entry(int(i), value) for i, value in zip(best.indices[step], best.values[step], strict=True)
                ],
            }
            for step, token_id in enumerate(ids)
        ]

    def _entry(self, token_id: int, log_probability: Tensor) -> dict[str, Any]:
        return {
            "token": self._spell([token_id]),
            "logprob": max(float(log_probability), _LEAST_LOG_PROBABILITY),
            "bytes": None,
        }

    def _spell(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        # Without the clean-up that some tokenizers do, which moves spaces inside JSON.
        return self.processor.tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )


class _Enough(StoppingCriteria):
    """Ends each row at its own limit, or when nobody waits for it any more."""

    def __init__(self, jobs: Sequence[_Job], limits: Sequence[int], start: int) -> None:
        self._jobs, self._limits, self._start = jobs, limits, start

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        n_tokens = input_ids.shape[1] - self._start
        done = [n_tokens >= n or job.future.cancelled() for job, n in zip(self._jobs, self._limits, strict=True)]
        return torch.tensor(done, device=input_ids.device)


class _Draw(LogitsProcessor):
    """Sampling, as noise under the greedy choice (the Gumbel trick).

    Every row draws from its own generator, so that a seed gives the same answer alone and in any batch, and the
    random numbers of the process are left alone.
    """

    def __init__(self, jobs: Sequence[_Job], device: torch.device) -> None:
        self._temperature = jobs[0].temperature
        self._generators = [torch.Generator(device) for _ in jobs]
        for generator, job in zip(self._generators, jobs, strict=True):
            _ = generator.seed() if job.seed is None else generator.manual_seed(job.seed)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        noise = torch.stack([torch.empty_like(scores[0]).exponential_(generator=g) for g in self._generators])
        return scores / self._temperature - noise.clamp_min(torch.finfo(noise.dtype).tiny).log()


# --- Loading ---------------------------------------------------------------------------------------------------------


_NO_ROOM = (
    "Choose a smaller model, or device = 'cpu'; vlm.local_batch_size, vlm.concurrency and vlm.image_side_px only help "
    "once the weights fit."
)
_FROM_HERE = (
    "A model needs all its files on this machine: config.json, weights as .safetensors, the processor, the tokenizer "
    "and the chat template."
)
_FROM_HUB = (
    "Correct vlm.model (ORG/NAME), or download it once with a network and point vlm.model to the folder; the weights "
    "must be .safetensors, and models that bring their own code are refused."
)


def _load(name: str, device_name: str, offline: bool) -> _Vlm:
    """The model of that name, ready to generate; raises `ConfigurationError`."""
    device = _device(device_name)
    if not _HUB_NAME.fullmatch(name) and not Path(name).is_dir():
        raise _unusable(name, "there is no such folder", "Correct vlm.model: a hub name (ORG/NAME) or a folder.")
    options: dict[str, Any] = {"local_files_only": offline, "trust_remote_code": False}
    is_here = offline or Path(name).is_dir()
    # A download of gigabytes shows its progress.
    with _explained(name, device, is_here), quiet_loading() if is_here else nullcontext():
        config = AutoConfig.from_pretrained(name, **options)
        _require_vlm(name, config)
        processor = AutoProcessor.from_pretrained(name, **options)
        vlm = _with_chat(name, processor)
        model: Any
        model, report = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        _require_complete(name, report)
        vlm = replace(vlm, model=model.to(device).eval())
    _pad_left(processor.tokenizer)
    return vlm


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"device: {name!r} cannot be used ({_first_line(error)}).", remedy="Use device = 'auto' or 'cpu'."
        ) from error
    return device


@contextmanager
def _explained(name: str, device: torch.device, is_here: bool) -> Iterator[None]:
    """Inside, whatever a model's files make its loader raise becomes a `ConfigurationError` with a remedy."""
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            what, remedy = f"its weights do not fit into the memory of {device}", _NO_ROOM
        else:
            what = f"could not be loaded ({_first_line(error)})"
            remedy = _FROM_HERE if is_here else _FROM_HUB
        raise _unusable(name, what, remedy) from error


def _require_vlm(name: str, config: Any) -> None:
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise _unusable(
            name,
            f"expected an image-text-to-text model, got one of type {config.model_type!r}",
            "Choose a model that takes images and text and answers in text.",
        )


def _require_complete(name: str, report: Any) -> None:
    """Raise `ConfigurationError` when weights are missing: random ones in their place would answer all the same."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise _unusable(
            name,
            f"its files lack {len(missing)} weights of the model (first: {missing[0]!r})",
            "Download the model again, complete.",
        )


def _with_chat(name: str, processor: Any) -> _Vlm:
    """The model without its weights, and where its chat template wants the system; raises `ConfigurationError`."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise _unusable(name, "its files lack the processor of images and text", _FROM_HERE)
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if template is None:
        raise _unusable(
            name, "has no chat template", "Choose a model that was tuned for chat (often named -it, -chat)."
        )
    for vlm in (_Vlm(name, processor, template, True), _Vlm(name, processor, template, False)):
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _USER_MARK}]}]
        try:
            prompt = vlm.render(vlm.with_system(_SYSTEM_MARK, turns))
        except _NoAnswer:
            continue
        # A template that expects plain strings writes a list as Python shows it.
        if _SYSTEM_MARK in prompt and _USER_MARK in prompt and "'type'" not in prompt:
            return vlm
    raise _unusable(
        name, "its chat template takes no images beside text", "Choose a model that was tuned for chat about images."
    )


def _pad_left(tokenizer: Any) -> None:
    """Let every prompt of a batch end where its answer begins."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _unusable(name: str, what: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(f"vlm.model {name!r}: {what}.", remedy=remedy)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200].rstrip(".") or type(error).__name__
