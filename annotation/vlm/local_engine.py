"""Requests that wait together go through one `generate`; what fails together is tried again apart."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from annotation.vlm.local_jobs import OUT_OF_MEMORY, Answer, Job, NoAnswer, first_line, is_out_of_memory
from annotation.vlm.local_model import LocalModel

logger = logging.getLogger(__name__)

_PATIENCE_S = 0.02
"""How long the first request of a batch waits for company."""


class Engine:
    """Runs jobs through a model, in batches, on one thread that only lives while there is work or a user."""

    def __init__(self, vlm: LocalModel, batch_size: int) -> None:
        self.vlm = vlm
        self._batch_size = batch_size
        self._fits: dict[int, int] = {}
        """Largest batch that fits into memory, by images a request; only where the wanted one did not."""
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._is_working = False
        # An idle thread of an executor neither holds its owner in memory nor the process at its end.
        self._thread = ThreadPoolExecutor(1, "medmicn-local-vlm")

    def submit(self, job: Job) -> Future[Answer]:
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

    def _next_batch(self) -> list[Job]:
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

    def _alike(self) -> list[Job]:
        waiting = [job for job in self._waiting if not job.future.cancelled()]
        return [job for job in waiting if job.kind == waiting[0].kind][: self._most(waiting[0])] if waiting else []

    def _most(self, job: Job) -> int:
        return self._fits.get(len(job.images), self._batch_size)

    def _answer(self, jobs: Sequence[Job]) -> None:
        """Give every job its answer or its failure; what fails together is tried again in smaller batches."""
        failure = self._try(jobs)
        if failure is None:
            return
        if len(jobs) == 1:
            logger.warning("Local model %s: no answer to one request: %s", self.vlm.name, failure.message)
            if jobs[0].future.set_running_or_notify_cancel():
                jobs[0].future.set_exception(failure)
            return
        size = self._halved(jobs) if failure.status == OUT_OF_MEMORY else 1
        for start in range(0, len(jobs), size):
            self._answer(jobs[start : start + size])

    def _halved(self, jobs: Sequence[Job]) -> int:
        """The batch size to go on with, kept for later batches of this kind."""
        size = len(jobs) // 2
        self._fits[len(jobs[0].images)] = size
        advice = f"Set vlm.local_batch_size = {size}, or lower vlm.image_side_px."
        logger.warning("Local model %s: out of memory with %d requests at once. %s", self.vlm.name, len(jobs), advice)
        free_memory()
        return size

    def _try(self, jobs: Sequence[Job]) -> NoAnswer | None:
        try:
            answers = self.vlm.generate(jobs)
        except NoAnswer as failure:
            return failure.with_traceback(None)
        except Exception as error:
            # A new object: the frames of the old one hold the tensors that did not fit.
            return _failure(error)
        for job, answer in zip(jobs, answers, strict=True):
            if job.future.set_running_or_notify_cancel():
                job.future.set_result(answer)
        return None


def _failure(error: Exception) -> NoAnswer:
    if not is_out_of_memory(error):
        return NoAnswer(500, f"The model failed on this request ({first_line(error)}).")
    return NoAnswer(
        OUT_OF_MEMORY,
        "The model ran out of memory on one request alone. Lower vlm.image_side_px or vlm.max_output_tokens, or choose "
        "a smaller model; vlm.local_batch_size and vlm.concurrency cannot help any more.",
    )


def free_memory() -> None:
    """Give back what nothing uses any more, also to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
