"""Several processes that train one network: who takes which images, and what they tell each other.

Every process knows the whole order of images and all targets, so images are shared out without talking: of each step
and of each validation split, process r of n takes every n-th image from the r-th on. None is lost, none seen twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data_contracts.errors import ConfigurationError
from model.config import TrainConfig

_LONGEST_WAIT = timedelta(hours=24)
"""The others wait while the first process computes the features of a large data set."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    n: int = 1

    @classmethod
    def current(cls) -> Processes:
        """As `torch.distributed` has it; one process alone where it was not begun."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and speaks to people."""
        return self.rank == 0

    def share(self, rows: np.ndarray) -> np.ndarray:
        """This process's part of the rows."""
        return rows[self.rank :: self.n]

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes."""
        if self.n > 1:
            dist.all_reduce(values)
        return values

    def gathered(self, values: Tensor) -> Tensor:
        """(n, …) the values of every process, in order."""
        if self.n == 1:
            return values.unsqueeze(0)
        parts = [torch.empty_like(values) for _ in range(self.n)]
        dist.all_gather(parts, values)
        return torch.stack(parts)

    def agreed(self, value: bool) -> bool:
        """What the first process says."""
        if self.n == 1:
            return value
        said = torch.tensor([value], dtype=torch.int32, device=_group_device())
        dist.broadcast(said, 0)
        return bool(said.item())

    def wait(self) -> None:
        """Return when all have come here."""
        if self.n > 1:
            dist.barrier()

    def wrapped(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with gradients averaged over all processes after each backward pass."""
        if self.n == 1 or not any(p.requires_grad for p in model.parameters()):
            return model
        # Terms of the loss can be off (λ = 0, no rule), and their parameters then have no gradient.
        devices = [device.index] if device.type == "cuda" and device.index is not None else None
        return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)


@contextmanager
def joined() -> Iterator[Processes]:
    """Inside, the processes that `torchrun` started are one group; without it, this process is alone."""
    if not dist.is_available() or dist.is_initialized() or not dist.is_torchelastic_launched():
        yield Processes.current()
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(dist.get_node_local_rank() % torch.cuda.device_count())
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_LONGEST_WAIT)
    try:
        yield Processes.current()
    finally:
        dist.destroy_process_group()


def require_processes(config: TrainConfig, *, is_trained: bool = False) -> Processes:
    """The processes as configured; raises `ConfigurationError` when others were started and there is work to do."""
    here = Processes.current()
    if here.n != config.processes and not is_trained:
        raise ConfigurationError(
            f"train.processes: expected {config.processes} processes that train together, found {here.n}; nothing was "
            "trained.",
            remedy="Give `medmicn train --set train.processes=N`, which starts them, or use torchrun and "
            "`model.parallel.joined()`.",
        )
    return here


def _group_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
