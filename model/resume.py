"""The state of a training on disk, so that a killed one goes on from the very step, and a finished seed stays trained.

One safetensors file a seed: tensors, and the rest as JSON in its header; one rename makes it whole. Nothing in it can
run code. A file is for one training only: its key covers configuration, data set, backbone and versions.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data_contracts.dataset import AlignedDataset
from data_contracts.files import write_bytes
from model.augment import Augmentation
from model.backbones import Backbone
from model.config import TrainConfig

logger = logging.getLogger(__name__)

FORMAT = "medmicn-training/1"

_WITHOUT_EFFECT = {"seeds", "device", "decode_threads", "save_every_s", "logger", "pixel_cache_gb"}
"""Settings that do not change what one seed learns."""


@dataclass
class State:
    """Named tensors, and JSON-ready values."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix.`, without it."""
        return {key.removeprefix(f"{prefix}."): t for key, t in self.tensors.items() if key.startswith(f"{prefix}.")}

    def put(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors under `prefix.`."""
        self.tensors |= {f"{prefix}.{key}": tensor for key, tensor in tensors.items()}


def training_key(
    config: TrainConfig, dataset: AlignedDataset, backbone: Backbone, augmentation: Augmentation, device: torch.device
) -> str:
    """sha256 of everything that decides what a seed learns."""
    digest = hashlib.sha256()
    described = {
        "train": config.model_dump(mode="json", exclude=_WITHOUT_EFFECT),
        "backbone": backbone.key,
        "augmentation": augmentation.describe(),
        "vocabulary": dataset.vocabulary.sha256,
        "class_names": list(dataset.class_names),
        "device": device.type,
        "torch": torch.__version__,
    }
    digest.update(json.dumps(described, sort_keys=True).encode())
    digest.update(dataset.frame[["image_id", "label", "split"]].to_csv(index=False).encode())
    digest.update(dataset.concepts.tobytes())
    digest.update(dataset.mask.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class StateFile:
    """Where the state of one seed is kept, and for which training."""

    path: Path
    key: str

    def write(self, state: State) -> None:
        """Put the state on the disk, in place of what was there; raises `StorageError`."""
        header = {"format": FORMAT, "key": self.key, "values": json.dumps(state.values)}
        tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state.tensors.items()}
        write_bytes(self.path, save(tensors, metadata=header))

    @property
    def is_finished(self) -> bool:
        """Whether this seed is trained to its end."""
        state = self.read()
        return state is not None and bool(state.values.get("finished"))

    def read(self) -> State | None:
        """The state, or None with a sentence where there is none, a damaged one, or one of another training."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as stream:
                header = stream.metadata() or {}
                if header.get("format") != FORMAT or header.get("key") != self.key:
                    logger.warning(
                        "%s: the state of a training with another configuration or data set; it was not used.",
                        self.path.name,
                    )
                    return None
                tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 - no mapping
                return State(tensors, json.loads(header["values"]))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            logger.warning("%s: cannot be read (%s); this seed begins anew.", self.path.name, error)
            return None


def state_file(folder: Path, key: str, seed: int) -> StateFile:
    """The file of one seed."""
    return StateFile(folder / f"seed-{seed}.safetensors", key)


def forget(folder: Path) -> None:
    """Delete the states of all seeds: what they led to is stored elsewhere."""
    for path in folder.glob("seed-*.safetensors"):
        path.unlink(missing_ok=True)


# ---- parts of a state ------------------------------------------------------------------------------------------


def optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors of the optimiser, `<parameter number>.<name>`; step sizes follow from the number of steps."""
    per_parameter = optimiser.state_dict()["state"]
    return {f"{n}.{name}": value for n, state in per_parameter.items() for name, value in state.items()}


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimiser_state` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def random_state(device: torch.device) -> Tensor:
    """(bytes,) uint8 state of torch's generator that training on this device draws from, the CPU's before it."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def restore_random(state: Tensor, device: torch.device) -> None:
    """Put back what `random_state` gave."""
    n_cpu = len(torch.get_rng_state())
    torch.set_rng_state(state[:n_cpu].contiguous())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[n_cpu:].contiguous(), device)
