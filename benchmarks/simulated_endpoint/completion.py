"""A chat completion in OpenAI's form."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .faults import IN_ANSWER, IN_TEXT, Hit, spoiled_answer, spoiled_text
from .names import CHARACTERS_PER_TOKEN, JsonObject
from .question import Question, n_tokens
from .witness import Witness, answer, said_of_concept


@dataclass(frozen=True)
class Manner:
    """How the simulated endpoint behaves towards its callers."""

    seed: int = 0
    latency_s: float = 0.0
    latency_jitter_s: float = 0.0
    models: tuple[str, ...] = ()
    """Names that it knows; empty: it answers to every name."""
    api_key: str | None = None
    keeps_schema: bool = True
    reports_usage: bool = True
    reports_logprobs: bool = True
    batch_seconds: float = 2.0
    batch_failure_share: float = 0.0


class Completion(NamedTuple):
    """A chat completion and the tokens it is billed for."""

    body: JsonObject
    n_prompt_tokens: int
    n_completion_tokens: int


def complete(question: Question, witness: Witness, manner: Manner, hits: Sequence[Hit] = ()) -> Completion:
    """The completion that answers a question, with the faults that hit it."""
    choices = [_choice(question, witness, manner, hits, n) for n in range(question.n_answers)]
    n_completion_tokens = sum(n_tokens(len(c["message"]["content"] or c["message"]["refusal"] or "")) for c in choices)
    body: JsonObject = {
        "id": f"chatcmpl-{os.urandom(12).hex()}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": question.model,
        "system_fingerprint": f"simulated-{witness.seed}",
        "choices": choices,
    }
    if manner.reports_usage:
        total = question.n_prompt_tokens + n_completion_tokens
        counts = {"prompt_tokens": question.n_prompt_tokens, "completion_tokens": n_completion_tokens}
        body["usage"] = {**counts, "total_tokens": total}
    return Completion(body, question.n_prompt_tokens, n_completion_tokens)


def _choice(question: Question, witness: Witness, manner: Manner, hits: Sequence[Hit], index: int) -> JsonObject:
    # Samples of one request differ from each other where a witness wavers, and come again when it is asked again.
    salt = f"{question.salt}/{index}" if question.salt else ""
    text, logprobs = _text_of(question, witness, salt, hits)
    if question.schema is not None and not manner.keeps_schema:
        text = f"I looked at the image with care. Here is my answer:\n\n```json\n{text}\n```\n\nI hope this helps!"
    message: JsonObject = {"role": "assistant", "content": text, "refusal": None}
    finish_reason = "stop"
    if question.max_tokens is not None and n_tokens(len(text)) > question.max_tokens:
        message["content"], finish_reason = text[: question.max_tokens * CHARACTERS_PER_TOKEN], "length"
    for hit in hits:
        if hit.name == "refusal":
            message |= {"content": None, "refusal": "I'm sorry, but I can't help with identifying this image."}
        elif hit.name == "empty_content":
            message["content"] = None if hit.draw < 0.5 else ""
        elif hit.name == "cut_off" and message["content"]:
            message["content"], finish_reason = text[: len(text) * 3 // 5], "length"
    logprobs = logprobs if manner.reports_logprobs else None
    return {"index": index, "finish_reason": finish_reason, "message": message, "logprobs": logprobs}


def _text_of(question: Question, witness: Witness, salt: str, hits: Sequence[Hit]) -> tuple[str, JsonObject | None]:
    """The text of an answer, and its log-probabilities if it is one word and they were asked for."""
    in_text = [hit for hit in hits if hit.name in IN_TEXT]
    if question.schema is not None:
        content = answer(question.schema, question.sight, witness, salt)
        content = spoiled_answer(content, [hit for hit in hits if hit.name in IN_ANSWER])
        return spoiled_text(json.dumps(content, ensure_ascii=False), content, in_text), None
    if "yes or no" not in question.text.lower():
        return spoiled_text("I see an image.", {}, in_text), None
    named = re.search(r"\"id\"\s*:\s*\"([^\"]+)\"", question.text)
    concept_id = named.group(1) if named else hashlib.sha256(question.text.encode()).hexdigest()
    probability = said_of_concept(concept_id, question.sight, witness, salt).probability
    word = "yes" if probability > 0.5 else "no"
    n_top = question.n_top_logprobs
    return spoiled_text(word, {}, in_text), None if n_top is None else _logprobs(word, probability, n_top)


def _logprobs(word: str, probability: float, n_top: int) -> JsonObject:
    """Log-probabilities of a one-word answer; "yes" and "no" come in two spellings, and a little goes elsewhere."""
    shares = {"yes": 0.8 * probability, "Yes": 0.19 * probability}
    shares |= {"no": 0.8 * (1 - probability), "No": 0.19 * (1 - probability)}
    shares |= {"I": 0.004, "The": 0.003, "Un": 0.002, "\n": 0.001}
    ranked = sorted(shares, key=lambda token: -shares[token])[:n_top]

    def entry(token: str) -> JsonObject:
        logprob = math.log(max(shares[token], 1e-9))
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    return {"content": [{**entry(word), "top_logprobs": [entry(token) for token in ranked]}], "refusal": None}
