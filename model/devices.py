"""Where and how torch computes: device, random numbers, threads. Each is left as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data_contracts.errors import ConfigurationError, StepFailed
from model.config import TrainConfig

_LARGE_STEP = 1e8
"""Multiplications in a forward pass from which on several threads pay: more than 150 concepts on 1,280 features."""


def resolve_device(name: str) -> torch.device:
    """The torch device of that name; `auto` is a GPU if there is one. Raises `ConfigurationError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(
            f"device: {name!r} cannot be used ({reason}).", remedy="Use device = 'auto' or 'cpu'."
        ) from error
    return device


@contextmanager
def reproducible(seed: int, device: torch.device, *, deterministic: bool = False) -> Iterator[None]:
    """Inside, torch draws from `seed`; outside, nothing has changed.

    On a CPU the same seed then gives the same bits. A GPU chooses its fastest kernels, whose sums differ in the last
    bits from run to run, unless `deterministic` allows only those that do not; an operation without one is an error.
    """
    cudnn = torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark, torch.are_deterministic_algorithms_enabled())
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        cudnn.deterministic, cudnn.benchmark = deterministic, not deterministic
        torch.use_deterministic_algorithms(deterministic)
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before[:2]
            torch.use_deterministic_algorithms(before[2])


@contextmanager
def memory_advice(config: TrainConfig) -> Iterator[None]:
    """Inside, running out of memory becomes a `StepFailed` that says which setting to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        where = "the GPU" if isinstance(error, torch.OutOfMemoryError) else "this machine"
        raise StepFailed(
            f"Training: {where} has not enough memory for batches of {config.batch_size} images of "
            f"{config.image_size_px} px; what was trained before is kept.",
            remedy=_memory_remedy(config),
        ) from error


@contextmanager
def compiling(config: TrainConfig) -> Iterator[None]:
    """Inside, a failure of torch's compiler becomes a `ConfigurationError` with the remedy."""
    try:
        yield
    except Exception as error:
        if not (config.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))):
            raise
        reason = str(error).strip().split("\n")[0][:200]
        raise ConfigurationError(
            f"train.compile: the network could not be compiled ({reason}); nothing was trained.",
            remedy="Install a C++ compiler (g++ or clang), or use --set train.compile=false.",
        ) from error


def _out_of_memory(error: Exception) -> bool:
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _memory_remedy(config: TrainConfig) -> str:
    half = max(1, config.batch_size // 2)
    parts = [f"--set train.batch_size={half} --set train.accumulate_steps={2 * config.accumulate_steps}"]
    if not config.freeze_backbone:
        parts.append(f"a smaller train.image_size_px than {config.image_size_px}")
        parts += [] if config.mixed_precision else ["train.mixed_precision=true"]
        parts.append("train.freeze_backbone=true")
    return "Give the same command with " + ", or ".join(parts) + "."


@contextmanager
def few_threads(operations_per_step: float) -> Iterator[None]:
    """Inside, small steps run on one thread of the CPU; outside, nothing has changed.

    A step on cached features is a few hundred small operations, each a barrier for all threads: a second thread gains
    nothing, and where another process holds its core every barrier waits for a time slice (measured: 20 times slower).
    """
    before = torch.get_num_threads()
    if operations_per_step < _LARGE_STEP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
