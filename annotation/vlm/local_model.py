"""A Hugging Face vision-language model with its processor: prompts from conversations, answers to jobs."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jinja2
import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from annotation.vlm.local_jobs import Answer, Job, NoAnswer, first_line

_LEAST_LOG_PROBABILITY = -9999.0
"""The protocol's number for what is next to impossible; JSON has no infinity."""
_MARKUP = re.compile(r"[<\[].*[>\]]")

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


@dataclass(frozen=True)
class LocalModel:
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
            raise NoAnswer(400, "The request holds no message of the user.")
        first["content"].insert(0, {"type": "text", "text": f"{system}\n\n"})
        return turns

    def render(self, conversation: list[dict[str, Any]]) -> str:
        """The prompt of a conversation; raises `NoAnswer` where the chat template does not allow it."""
        # Thinking aloud would use up the room of a short JSON answer.
        options = {"enable_thinking": False} if "enable_thinking" in str(self.template) else {}
        try:
            return self.processor.apply_chat_template(
                conversation, chat_template=self.template, add_generation_prompt=True, tokenize=False, **options
            )
        except (jinja2.TemplateError, ValueError, TypeError, LookupError) as error:
            raise NoAnswer(400, f"The chat template refuses these messages ({first_line(error)}).") from error

    @torch.inference_mode()
    def generate(self, jobs: Sequence[Job]) -> list[Answer]:
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
            logits_processor=[Draw(jobs, self.model.device)] if jobs[0].temperature else [],
            stopping_criteria=[_Enough(jobs, limits, start)],
        )
        tokens = output.sequences[:, start:].tolist()
        return [
            self._read_off(job, self._until_end(tokens[row][: limits[row]]), n_prompts[row], row, output.logits)
            for row, job in enumerate(jobs)
        ]

    def _inputs(self, jobs: Sequence[Job]) -> Any:
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
        """Tokens that the context leaves for an answer; raises `NoAnswer` when there is no room."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and n_prompt >= context:
            raise NoAnswer(
                400,
                f"The request takes {n_prompt} tokens, and the model's context holds {context}: lower "
                "vlm.image_side_px, or ask about fewer concepts.",
            )
        return sys.maxsize if context is None else context - n_prompt

    def _until_end(self, ids: list[int]) -> list[int]:
        ends = [k for k, token_id in enumerate(ids) if token_id in self._end_ids]
        return ids[: ends[0] + 1] if ends else ids

    def _read_off(self, job: Job, ids: list[int], n_prompt: int, row: int, logits: tuple[Tensor, ...]) -> Answer:
        rows = None if job.n_top is None else torch.stack([step[row] for step in logits[: len(ids)]])  # (T, V)
        return Answer(
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
            raise NoAnswer(500, "The model computed numbers that are not finite; its log-probabilities mean nothing.")
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

    def __init__(self, jobs: Sequence[Job], limits: Sequence[int], start: int) -> None:
        self._jobs, self._limits, self._start = jobs, limits, start

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        n_tokens = input_ids.shape[1] - self._start
        done = [n_tokens >= n or job.future.cancelled() for job, n in zip(self._jobs, self._limits, strict=True)]
        return torch.tensor(done, device=input_ids.device)


class Draw(LogitsProcessor):
    """Sampling, as noise under the greedy choice (the Gumbel trick).

    Every row draws from its own generator, so that a seed gives the same answer alone and in any batch, and the
    random numbers of the process are left alone.
    """

    def __init__(self, jobs: Sequence[Job], device: torch.device) -> None:
        self._temperature = jobs[0].temperature
        self._generators = [torch.Generator(device) for _ in jobs]
        for generator, job in zip(self._generators, jobs, strict=True):
            _ = generator.seed() if job.seed is None else generator.manual_seed(job.seed)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """(B, V) scores whose greatest is the token drawn."""
        noise = torch.stack([torch.empty_like(scores[0]).exponential_(generator=g) for g in self._generators])
        return scores / self._temperature - noise.clamp_min(torch.finfo(noise.dtype).tiny).log()
