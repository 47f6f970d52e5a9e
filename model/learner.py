"""The network of one seed while it is trained: building it, one optimiser step, one validation, its state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data_contracts.tables import Split
from model.backbones import Backbone
from model.concept_encoder import Intervention
from model.config import TrainConfig
from model.data import Rows, in_batches
from model.devices import resolve_device
from model.losses import Losses, LossWeights, StepTotals, Targets, balanced_class_weights, losses
from model.metrics import mean_defined, per_class
from model.network import ImageNetwork, NetworkOutput, Sizes
from model.parallel import Processes
from model.prepare import Prepared
from model.resume import State, optimiser_state, random_state, restore_optimiser, restore_random
from model.schedules import parameter_groups, set_step_size
from model.systems.registry import build_network
from model.training_interventions import drawn_intervention

_VALIDATION_BATCH = 64

_N_STATISTICS_IMAGES = 1024
"""Images that set the feature scale when the backbone is fine-tuned; a frozen one uses all training images."""


class Step(NamedTuple):
    """The images of one optimiser step."""

    rows: Rows
    """Of all processes."""
    batches: list[Rows]
    """Of this process, one after another."""


class Learner:
    """Head, backbone where it is fine-tuned, and optimiser, on the device."""

    def __init__(
        self, prepared: Prepared, backbone: Backbone, config: TrainConfig, seed: int, processes: Processes
    ) -> None:
        """Make the network with random weights; the caller has seeded torch."""
        self.config, self.seed, self.processes = config, seed, processes
        self.device = resolve_device(config.device)
        self.dataset, self.inputs = prepared.dataset, prepared.inputs
        self.backbone = backbone if config.freeze_backbone else copy.deepcopy(backbone)
        self.train_rows, self.val_rows = self.dataset.rows(Split.TRAIN), self.dataset.rows(Split.VAL)
        self.targets = Targets(
            torch.tensor(self.dataset.class_index()),  # copies: pandas and Arrow hand out read-only memory
            torch.tensor(self.dataset.concepts),
            torch.tensor(self.dataset.mask),
        ).to(self.device)
        self.loss_weights = self._loss_weights()
        sizes = Sizes(self.backbone.n_features, len(self.dataset.vocabulary), len(self.dataset.class_names))
        self.head = build_network(sizes, config).to(self.device)

    def begin(self, state: State | None, rng: np.random.Generator) -> None:
        """Make everything ready for the first step, or as `state` has it; `rng` chooses images for statistics."""
        if state is None:
            self._set_feature_scale(rng)
        on_gpu = self.device.type == "cuda"
        tuned = None if self.config.freeze_backbone else self.backbone.module.requires_grad_(True)
        self.model: nn.Module = self.head
        if tuned is not None:
            self.model = ImageNetwork(tuned, self.head).to(self.device)
            if on_gpu:
                self.model.to(memory_format=torch.channels_last)  # what half-precision convolutions want
        groups = parameter_groups(self.head, tuned, self.config)
        self.optimiser = torch.optim.AdamW(groups, fused=True)  # half the time of a step on cached features
        self.half = _half_precision(self.config, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.half is torch.float16)
        if state is not None:
            self._restore(state)
        elif self.processes.n > 1:
            # The same weights everywhere, but not the same hidden features.
            torch.manual_seed(self.seed + 1_000_003 * self.processes.rank)
        wrapped = self.processes.wrapped(self.model, self.device)
        self._no_sync = getattr(wrapped, "no_sync", nullcontext)
        self._trained: Callable[..., NetworkOutput] = torch.compile(wrapped) if self.config.compile else wrapped

    def train_step(self, step: Step, inputs: Iterator[Tensor], size_fraction: float) -> Tensor:
        """One optimiser step at this part of the full step size; returns this process's part of its losses (4,)."""
        set_step_size(self.optimiser.param_groups, size_fraction)
        self.optimiser.zero_grad(set_to_none=True)
        in_one_piece = self.processes.n == 1 and len(step.batches) == 1
        totals = None if in_one_piece else StepTotals.of(self._targets(step.rows), self.loss_weights)
        sums = torch.zeros(len(Losses._fields), device=self.device)
        for n, rows in enumerate(step.batches, start=1):
            with nullcontext() if n == len(step.batches) else self._no_sync():
                targets = self._targets(rows)
                output = self._forward(self._trained, next(inputs), drawn_intervention(targets, self.config))
                terms = losses(output, targets, self.loss_weights, totals)
                # Several processes average their gradients, and the parts of a step are to be added.
                self.scaler.scale(terms.total * self.processes.n).backward()
            sums += torch.stack(terms).detach()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return sums

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Macro-F1 and losses of the validation split; NaN where it has no images."""
        self.model.eval()
        if len(self.val_rows) == 0:
            return {"val_macro_f1": float("nan"), "val_loss": float("nan")}
        n_classes = len(self.dataset.class_names)
        totals = StepTotals.of(self._targets(self.val_rows), self.loss_weights)
        sums = torch.zeros(len(Losses._fields), device=self.device)
        confusion = torch.zeros(n_classes * n_classes, dtype=torch.int64, device=self.device)
        batches = in_batches(self.processes.share(self.val_rows), _VALIDATION_BATCH)
        for rows, inputs in zip(batches, self.inputs.batches(batches), strict=True):
            output, targets = self._forward(self.model, inputs), self._targets(rows)
            cells = targets.classes * n_classes + output.class_logits.argmax(1)
            confusion += torch.bincount(cells, minlength=n_classes * n_classes)
            sums += torch.stack(losses(output, targets, self.loss_weights, totals))
        counts = self.processes.total(confusion).reshape(n_classes, n_classes).cpu().numpy()
        return {"val_macro_f1": mean_defined(per_class(counts).f1), **named("val", self.processes.total(sums))}

    def weights(self) -> dict[str, Tensor]:
        """A copy of all weights, on the CPU."""
        return {key: value.detach().cpu().clone() for key, value in self.model.state_dict().items()}

    def put_state(self, state: State) -> None:
        """Add weights, optimiser, scaler and random generators of all processes to a state."""
        state.put("model", self.model.state_dict())
        state.put("optimiser", optimiser_state(self.optimiser))
        state.tensors["random"] = self.processes.gathered(random_state(self.device).to(self.device)).cpu()
        state.values["scaler"] = self.scaler.state_dict()

    def _restore(self, state: State) -> None:
        self.model.load_state_dict(state.part("model"))
        restore_optimiser(self.optimiser, state.part("optimiser"))
        self.scaler.load_state_dict(state.values["scaler"])
        restore_random(state.tensors["random"][self.processes.rank], self.device)

    def _forward(
        self, model: Callable[..., NetworkOutput], inputs: Tensor, intervention: Intervention | None = None
    ) -> NetworkOutput:
        inputs = inputs.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None):
            return model(inputs) if intervention is None else model(inputs, intervention)

    def _targets(self, rows: Rows) -> Targets:
        return self.targets.take(torch.from_numpy(rows).to(self.device, non_blocking=True))

    def _loss_weights(self) -> LossWeights:
        n_classes, config = len(self.dataset.class_names), self.config
        classes = torch.ones(n_classes, device=self.device)
        if config.class_weights:
            classes = balanced_class_weights(self.targets.classes[torch.from_numpy(self.train_rows)], n_classes)
        return LossWeights(
            config.lambda_concept, config.lambda_neural, classes, config.focal_gamma, config.label_smoothing
        )

    @torch.no_grad()
    def _set_feature_scale(self, rng: np.random.Generator) -> None:
        """Mean and deviation of the training features, in one pass over batches."""
        rows = self.train_rows
        if not self.config.freeze_backbone:
            rows = rng.permutation(rows)[:_N_STATISTICS_IMAGES]
            self.backbone.module.to(self.device).eval()
        n, total, squares = 0, torch.zeros(1), torch.zeros(1)
        for inputs in self.inputs.batches(in_batches(rows, 32)):
            features = inputs if self.config.freeze_backbone else self.backbone.module(inputs.to(self.device))
            features = features.cpu().double()
            n, total, squares = n + len(features), total + features.sum(0), squares + features.square().sum(0)
        mean = total / n
        self.head.standardise.fit(mean.float(), (squares / n - mean.square()).clamp(min=0).float())


def _half_precision(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """Half type for the backbone: only when it is trained, on a GPU; bfloat16 where the GPU has it."""
    if config.freeze_backbone or not config.mixed_precision or device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def named(split: str, terms: Tensor) -> dict[str, float]:
    """`train_loss` or `val_loss` for the total, `train_concept_loss` and so on for its terms."""
    names = [f"{split}_loss" if name == "total" else f"{split}_{name}_loss" for name in Losses._fields]
    return dict(zip(names, terms.tolist(), strict=True))
