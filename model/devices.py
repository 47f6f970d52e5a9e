"""Where and how torch computes: device, random numbers, threads. Each is left as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data_contracts.errors import ConfigurationError

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
def reproducible(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws from `seed` and chooses deterministic kernels; outside, nothing has changed."""
    cudnn = torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before


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
