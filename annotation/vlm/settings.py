"""Settings of the vision-language client: one sentence under every field, checked on construction."""

from __future__ import annotations

from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

EMBEDDED = "embedded"
"""The `base_url` of the built-in endpoint, reached in process."""

MEASUREMENT_VERSION = 1
"""Raised whenever the embedded endpoint may answer the same image differently."""

EMBEDDED_MODEL = f"medmicn-embedded-measurements-{MEASUREMENT_VERSION}"
"""The model name under which the embedded endpoint signs its answers: old answers never pass for new ones."""

_EMBEDDED_SIDE_PX = 256
_REMOTE_SIDE_PX = 512


class VlmSettings(BaseModel):
    """How to reach a vision-language model, and what it may cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str = EMBEDDED
    """`embedded`, or the address of an OpenAI-compatible endpoint such as `http://localhost:11434/v1`."""
    model: str = EMBEDDED_MODEL
    """Model name as the endpoint knows it."""
    concurrency: int = Field(8, ge=1, le=1024)
    """Most requests in flight at once."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Most requests sent in a minute; none: no limit of our own."""
    tokens_per_minute: float | None = Field(None, gt=0)
    """Most tokens, input and output, sent for in a minute; none: no limit of our own."""
    timeout_s: float = Field(120.0, gt=0)
    """Seconds until one request counts as lost."""
    max_retries: int = Field(3, ge=0, le=20)
    """Times the client repeats a request that met a full queue, a server error or a broken connection."""
    image_side_px: int | None = Field(None, ge=32, le=4096)
    """Longer side of the images that are sent; none: 256 for the embedded endpoint, 512 for any other."""
    image_format: Literal["PNG", "JPEG"] = "PNG"
    """Format of the images that are sent; JPEG is smaller and slightly lossy."""
    max_cost_usd: float | None = Field(None, gt=0)
    """Most money one command may spend; needs both prices."""
    max_requests: int | None = Field(None, ge=1)
    """Most requests one command may send."""
    input_usd_per_million_tokens: float | None = Field(None, ge=0)
    """Price of a million input tokens."""
    output_usd_per_million_tokens: float | None = Field(None, ge=0)
    """Price of a million output tokens."""
    temperature: float | None = Field(0.0, ge=0, le=2)
    """Sampling temperature; none: the field is not sent, as some models demand."""
    seed: int | None = 0
    """Sampling seed; none: the field is not sent."""
    max_output_tokens: int | None = Field(None, ge=16)
    """Most tokens of one answer; none: what the number of concepts needs, with room."""
    output_limit_field: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    """Name of the request field for that limit; some older servers only know `max_tokens`."""

    @field_validator("base_url")
    @classmethod
    def _http_or_embedded(cls, value: str) -> str:
        parts = urlsplit(value)
        if value != EMBEDDED and not (parts.scheme in {"http", "https"} and parts.hostname):
            raise ValueError(f"expected 'embedded' or an http(s) address, got {value!r}")
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
        if self.max_cost_usd is not None and self.usd_per_token is None:
            raise ValueError("max_cost_usd needs input_usd_per_million_tokens and output_usd_per_million_tokens")
        if not self.is_embedded and self.model == EMBEDDED_MODEL and "model" not in self.model_fields_set:
            raise ValueError(f"base_url {self.base_url!r} needs a model name")
        return self

    @property
    def is_embedded(self) -> bool:
        """Whether the built-in endpoint answers, in process."""
        return self.base_url == EMBEDDED

    @property
    def side_px(self) -> int:
        """Longer side of the images that are sent, in pixels."""
        return self.image_side_px or (_EMBEDDED_SIDE_PX if self.is_embedded else _REMOTE_SIDE_PX)

    @property
    def usd_per_token(self) -> tuple[float, float] | None:
        """Price of one input and of one output token; None where unknown, (0, 0) for the embedded endpoint."""
        if self.input_usd_per_million_tokens is not None and self.output_usd_per_million_tokens is not None:
            return self.input_usd_per_million_tokens / 1e6, self.output_usd_per_million_tokens / 1e6
        return (0.0, 0.0) if self.is_embedded else None
