"""What happened so far."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

from .completion import Completion
from .names import JsonObject
from .question import Question


@dataclass
class Tally:
    """What the simulator has seen and done since it started."""

    requests_received: int = 0
    """On any path of the protocol."""
    chat_requests_received: int = 0
    bytes_received: int = 0
    completed_answers: int = 0
    """Chat answers that were delivered whole."""
    abandoned_answers: int = 0
    """Chat answers whose caller had gone; they are billed."""
    batch_answers: int = 0
    prompt_tokens_billed: int = 0
    """Of every chat answer that was made, delivered or not."""
    completion_tokens_billed: int = 0
    batch_prompt_tokens_billed: int = 0
    batch_completion_tokens_billed: int = 0
    duplicate_requests: int = 0
    """Chat requests whose body had come before."""
    duplicate_answers: int = 0
    """Answers billed, in chat or batch, for a body that had been answered and billed before."""
    answers_without_truth: int = 0
    """Answers about an image that the truth file does not have."""
    concurrency: int = 0
    max_concurrency: int = 0
    """Most chat requests in flight at once."""
    faults_served: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    """HTTP status → responses, chat and all others."""

    def __post_init__(self) -> None:
        self._requested: set[str] = set()
        self._answered: set[str] = set()

    def as_json(self) -> JsonObject:
        """All counters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def asked(self, question: Question) -> None:
        """Count a chat request that could be read."""
        self.duplicate_requests += question.key in self._requested
        self._requested.add(question.key)

    def billed(self, question: Question, completion: Completion, *, in_batch: bool = False) -> None:
        """Count an answer that was made."""
        self.duplicate_answers += question.key in self._answered
        self._answered.add(question.key)
        if in_batch:
            self.batch_answers += 1
            self.batch_prompt_tokens_billed += completion.n_prompt_tokens
            self.batch_completion_tokens_billed += completion.n_completion_tokens
        else:
            self.prompt_tokens_billed += completion.n_prompt_tokens
            self.completion_tokens_billed += completion.n_completion_tokens
