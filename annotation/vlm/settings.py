"""Settings of the vision-language client: one sentence under every field, checked on construction."""

from __future__ import annotations

import ipaddress
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

EMBEDDED = "embedded"
"""The `base_url` of the built-in endpoint, reached in process."""

IN_PROCESS = "transformers"
"""The `base_url` of a Hugging Face model that is loaded into this process."""

MEASUREMENT_VERSION = 1
"""Raised whenever the embedded endpoint may answer the same image differently."""

EMBEDDED_MODEL = f"medmicn-embedded-measurements-{MEASUREMENT_VERSION}"
"""The model name under which the embedded endpoint signs its answers: old answers never pass for new ones."""

JPEG_QUALITY = 95
"""Of the images that are sent: no structure worth a judgement is lost."""

_EMBEDDED_SIDE_PX = 256
_REMOTE_SIDE_PX = 512


class VlmSettings(BaseModel):
    """How to reach a vision-language model, and what it may cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str = EMBEDDED
    """`embedded`; `transformers`: a Hugging Face model in this process; or the address of an OpenAI-compatible endpoint
    such as `http://localhost:11434/v1` (OpenAI, Azure, vLLM, Ollama, LM Studio, llama.cpp)."""
    model: str = EMBEDDED_MODEL
    """Model name as the endpoint knows it; for `transformers` a hub id or a local folder."""
    azure_api_version: str | None = None
    """API version of an Azure deployment whose `base_url` ends in `/openai/deployments/NAME`."""
    concurrency: int = Field(8, ge=1, le=1024)
    """Most requests in flight at once."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Most requests sent in a minute; none: no limit of our own."""
    tokens_per_minute: float | None = Field(None, gt=0)
    """Most tokens, input and output, sent for in a minute; none: no limit of our own."""
    timeout_s: float = Field(120.0, gt=0)
    """Seconds until one request counts as lost, however slowly its answer trickles in."""
    max_retries: int = Field(5, ge=0, le=20)
    """Times the client repeats a request that met a full queue, a server error or a broken connection."""
    max_wait_s: float = Field(1800.0, ge=0)
    """Seconds a run waits for an endpoint that asks for patience; after that the work is deferred (exit code 4)."""
    image_side_px: int | None = Field(None, ge=32, le=4096)
    """Longer side of the images that are sent; none: 256 for the embedded endpoint, 512 for any other."""
    image_format: Literal["PNG", "JPEG"] | None = None
    """Format of the images that are sent; none: PNG (lossless) in this process, JPEG of quality 95 else."""
    max_cost_usd: float | None = Field(None, gt=0)
    """Most money one command may spend; needs known prices."""
    max_requests: int | None = Field(None, ge=1)
    """Most requests one command may send, repeated ones included."""
    input_usd_per_million_tokens: float | None = Field(None, ge=0)
    """Price of a million input tokens; none: as the package genai-prices knows it."""
    output_usd_per_million_tokens: float | None = Field(None, ge=0)
    """Price of a million output tokens; none: as the package genai-prices knows it."""
    temperature: float | None = Field(0.0, ge=0, le=2)
    """Sampling temperature; none: the field is not sent, as some models demand."""
    seed: int | None = 0
    """Sampling seed; none: the field is not sent."""
    samples: int = Field(1, ge=1, le=25)
    """Answers asked for per image; with more than one the probability is the share of them that say present."""
    probability: Literal["stated", "logprobs"] = "stated"
    """Where probabilities come from: `stated` by the model; `logprobs` of one yes-or-no request per concept."""
    concepts_per_request: int = Field(40, ge=1)
    """Most questions in one request; longer vocabularies are asked in chunks."""
    examples: int = Field(0, ge=0, le=16)
    """Training images with an expert's answers that are shown before each image; 0: none."""
    batch: bool = False
    """Whether judging goes through the endpoint's Batch API: half the price at OpenAI, answers within a day."""
    batch_wait_s: float = Field(0.0, ge=0)
    """Seconds to wait for batches before the work is deferred; the same command collects them later."""
    probe: bool = True
    """Whether a few drawn pictures test at start that the endpoint sees images and keeps the schema."""
    local_batch_size: int = Field(4, ge=1)
    """Images in one forward pass of a model in this process."""
    device: str = "auto"
    """Where a model in this process computes: `auto`, `cpu`, `cuda`, or `cuda:N`."""
    max_output_tokens: int | None = Field(None, ge=16)
    """Most tokens of one answer; none: what the number of concepts needs, with room."""
    output_limit_field: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    """Name of the request field for that limit; some older servers only know `max_tokens`."""

    @field_validator("base_url")
    @classmethod
    def _http_or_here(cls, value: str) -> str:
        parts = urlsplit(value)
        if value not in {EMBEDDED, IN_PROCESS} and not (parts.scheme in {"http", "https"} and parts.hostname):
            raise ValueError(f"expected 'embedded', 'transformers' or an http(s) address, got {value!r}")
        if parts.username or parts.password:
            raise ValueError("expected an address without user name or password; keys belong in the environment")
        return value

    @model_validator(mode="before")
    @classmethod
    def _installed_measurements(cls, values: object) -> object:
        """The embedded endpoint is the installed one, whatever version a stored configuration names."""
        if isinstance(values, dict) and values.get("base_url", EMBEDDED) == EMBEDDED:
            return {**values, "model": EMBEDDED_MODEL}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.is_embedded and self.model == EMBEDDED_MODEL and "model" not in self.model_fields_set:
            raise ValueError(f"base_url {self.base_url!r} needs a model name")
        if (self.input_usd_per_million_tokens is None) != (self.output_usd_per_million_tokens is None):
            raise ValueError("expected both of input_usd_per_million_tokens and output_usd_per_million_tokens, or none")
        if self.samples > 1 and not self.temperature:
            raise ValueError("samples above 1 need temperature above 0 (0.7 is usual): equal answers tell nothing")
        if self.samples > 1 and self.probability == "logprobs":
            raise ValueError("expected one of samples above 1 and probability = 'logprobs', not both")
        if self.probability == "logprobs" and self.is_embedded:
            raise ValueError("the embedded endpoint measures and has no log-probabilities: use probability = 'stated'")
        if self.batch and not self.is_remote:
            raise ValueError("batch needs an endpoint with a Batch API; leave it out for a model in this process")
        return self

    @property
    def is_embedded(self) -> bool:
        """Whether the built-in endpoint answers, in process."""
        return self.base_url == EMBEDDED

    @property
    def is_in_process(self) -> bool:
        """Whether a Hugging Face model in this process answers."""
        return self.base_url == IN_PROCESS

    @property
    def is_remote(self) -> bool:
        """Whether requests go through a network, be it this machine's own."""
        return not (self.is_embedded or self.is_in_process)

    @property
    def host(self) -> str:
        """Host that requests go to; empty when they stay in this process."""
        return (urlsplit(self.base_url).hostname or "") if self.is_remote else ""

    @property
    def is_loopback(self) -> bool:
        """Whether nothing leaves this machine."""
        return not self.is_remote or is_loopback(self.host)

    @property
    def side_px(self) -> int:
        """Longer side of the images that are sent, in pixels."""
        return self.image_side_px or (_EMBEDDED_SIDE_PX if self.is_embedded else _REMOTE_SIDE_PX)

    @property
    def encoding(self) -> Literal["PNG", "JPEG"]:
        """Format of the images that are sent."""
        return self.image_format or ("JPEG" if self.is_remote else "PNG")

    @property
    def judging_parameters(self) -> dict[str, Any]:
        """What decides a judgement besides words and pixels: how an answer comes about, and how many make one."""
        return self.parameters | {"samples": self.samples}

    @property
    def parameters(self) -> dict[str, Any]:
        """What decides one answer besides words and pixels: the model, how it samples, how images are encoded."""
        return {
            "model": self.model,
            "temperature": self.temperature,
            "seed": self.seed,
            "by": self.probability,
            "image": [self.side_px, self.encoding],
        }


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
