"""What goes between the parts of the local endpoint: a request made ready, its answer, or why there is none."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

OUT_OF_MEMORY = 507
"""The HTTP status nearest to it: insufficient storage."""


class NoAnswer(Exception):
    """Why one request gets no answer: an HTTP status and words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, eq=False)
class Job:
    """One request, ready for the model."""

    prompt: str = field(repr=False)
    images: tuple[Image.Image, ...] = field(repr=False)
    token_limit: int
    temperature: float = 0.0
    seed: int | None = None
    n_top: int | None = None
    """Log-probabilities wanted beside each token's own; None: none at all."""
    future: Future[Answer] = field(default_factory=Future)

    @property
    def kind(self) -> tuple[int, float]:
        """Equal for requests that may share a batch; seeds may differ, each row draws from its own."""
        return len(self.images), self.temperature


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it took."""

    text: str
    is_cut: bool
    """Whether the limit ended it, not the model."""
    n_prompt_tokens: int
    n_tokens: int
    """Generated tokens, the closing one included."""
    log_probabilities: list[dict[str, Any]] | None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine."""
    words = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in words or "can't allocate memory" in words)
    )


def first_line(error: BaseException) -> str:
    """An error for one line of a message."""
    return (str(error).strip().splitlines() or [""])[0][:200].rstrip(".") or type(error).__name__
