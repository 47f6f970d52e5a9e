"""The local endpoint: a Hugging Face vision-language model in process, behind the chat-completions protocol.

Any image-text-to-text model with a chat template, from the hub or a folder; safetensors only, and none of its own code.
Requests that wait together go through one `generate`. Greedy answers are the same alone and in a batch in float32
(CPU); in bfloat16 (CUDA) sums are rounded differently in another batch, so that a close call may fall otherwise.

`generate` cannot enforce a JSON schema: the schema goes into the words, and whoever asks validates the answer.
"""

from __future__ import annotations

import asyncio
import threading
from functools import lru_cache
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from annotation.vlm.local_engine import Engine, free_memory
from annotation.vlm.local_jobs import NoAnswer
from annotation.vlm.local_loading import load
from annotation.vlm.local_protocol import completion_of, error_of, read_job

_LOADING = threading.Lock()


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
    engine: Engine = request.app.state.engine
    body = await request.body()
    try:
        job = await asyncio.to_thread(read_job, body, engine.vlm)
        return JSONResponse(completion_of(engine.vlm, await asyncio.wrap_future(engine.submit(job))))
    except NoAnswer as failure:
        # The same request would fail again: the openai client is told not to repeat it.
        return JSONResponse(error_of(failure), failure.status, headers={"x-should-retry": "false"})


def release() -> None:
    """Forget the loaded model: its memory is free, and its thread gone, once no application uses it."""
    with _LOADING:
        _shared_engine.cache_clear()
    free_memory()


@lru_cache(maxsize=1)
def _shared_engine(model: str, device: str, batch_size: int, offline: bool) -> Engine:
    """The engine of a model: every client of a process uses the same weights."""
    return Engine(load(model, device, offline), batch_size)
