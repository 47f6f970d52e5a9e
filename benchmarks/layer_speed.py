"""Concept encoder and logic layer against the usual loop over concepts: milliseconds a step, side by side.

    python benchmarks/layer_speed.py [--features 384 1000 1280] [--repeats 60]

The loop has one linear layer, one activation and one blend for each concept in turn, as public code of concept
embedding models has. `plain` is a forward and backward pass; `RandInt` replaces a quarter of the concepts by their
labels in each training step, which the public loop draws anew for each concept. `encoder` leaves the logic layer out.
Loop and layer are timed in turn, so that both meet the same disturbances, and the least disturbed tenth of each is
averaged. `floor` is the two matrix products that neither can do without: loop / floor bounds what can be won.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from model.concept_encoder import ConceptCode, ConceptEncoder, Intervention
from model.config import TrainConfig
from model.logic import reasoning_layer

BATCH, SIZE, CLASSES, RANDINT = 32, 8, 2, 0.25


class LoopEncoder(nn.Module):
    """Concept embeddings, concept after concept."""

    def __init__(self, n_features: int, n_concepts: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.contexts = nn.ModuleList(
            nn.Sequential(nn.Linear(n_features, 2 * size), nn.LeakyReLU()) for _ in range(n_concepts)
        )
        self.score = nn.Sequential(nn.Linear(2 * size, 1), nn.Sigmoid())

    def forward(self, f: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, F) → embeddings (B, K, m) and probabilities (B, K)."""
        embeddings, probabilities = [], []
        for i, generate in enumerate(self.contexts):
            context = generate(f)
            said = self.score(context)
            probabilities.append(said)
            if labels is not None:
                chosen = torch.nonzero(torch.bernoulli(torch.full((len(self.contexts),), RANDINT))).reshape(-1)
                if i in chosen:
                    said = labels[:, i : i + 1]
            blended = context[:, : self.size] * said + context[:, self.size :] * (1 - said)
            embeddings.append(blended.unsqueeze(1))
        return torch.cat(embeddings, dim=1), torch.cat(probabilities, dim=1)


def loop_logic(layer: nn.Module, embeddings: Tensor, probabilities: Tensor) -> Tensor:
    """The reasoner of the public code, Gödel: truth values of the classes."""
    values = probabilities.unsqueeze(-1).repeat(1, 1, CLASSES)
    sign = torch.sigmoid(layer.sign(embeddings))
    agrees = torch.minimum(torch.maximum(1 - sign, values), torch.maximum(sign, 1 - values))
    scores = torch.log_softmax(layer.filter(embeddings), dim=1)
    chosen = torch.sigmoid(scores - layer.temperature * scores.mean(dim=1, keepdim=True))
    return torch.min(torch.maximum(agrees, 1 - chosen), dim=1)[0]


def step_of(module: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], None]:
    def step() -> None:
        module.zero_grad(set_to_none=True)
        forward().sum().backward()

    return step


def steps(n_features: int, n_concepts: int, kind: str) -> tuple[Callable[[], None], ...]:
    """One step of the loop, of the layer, and of the matrix products alone."""
    with_randint, with_logic = kind == "RandInt", kind != "encoder"
    torch.manual_seed(0)
    f, labels = torch.randn(BATCH, n_features), torch.randint(0, 2, (BATCH, n_concepts)).float()
    logic = reasoning_layer(CLASSES, TrainConfig(logic="dcr", embedding_size=SIZE))
    loop = nn.ModuleList([LoopEncoder(n_features, n_concepts, SIZE), logic])
    ours = nn.ModuleList([ConceptEncoder(n_features, n_concepts, SIZE), logic])

    def looped() -> Tensor:
        embeddings, probabilities = loop[0](f, labels if with_randint else None)
        return loop_logic(logic, embeddings, probabilities) if with_logic else embeddings.sum() + probabilities.sum()

    def at_once() -> Tensor:
        told = torch.rand(BATCH, n_concepts) < RANDINT
        code: ConceptCode = ours[0](f, Intervention(labels, told) if with_randint else None)
        return logic(code).truth if with_logic else code.embeddings.sum() + code.probabilities.sum()

    product = nn.Linear(n_features, n_concepts * 2 * SIZE)
    return step_of(loop, looped), step_of(ours, at_once), step_of(product, lambda: product(f))


def milliseconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[384, 1000, 1280])
    parser.add_argument("--concepts", type=int, nargs="+", default=[48, 200])
    parser.add_argument("--repeats", type=int, default=60)
    options = parser.parse_args()
    print("| threads | features | concepts | step | loop (ms) | layer (ms) | floor (ms) | times as fast | at most |")
    print("|---|---|---|---|---|---|---|---|---|")
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        for n_features in options.features:
            for n_concepts in options.concepts:
                for kind in ("encoder", "plain", "RandInt"):
                    measured = steps(n_features, n_concepts, kind)
                    for step in measured * 3:
                        step()
                    times = np.array([[milliseconds(step) for step in measured] for _ in range(options.repeats)])
                    least = np.sort(times, axis=0)[: max(1, options.repeats // 10)].mean(0)
                    loop, layer, floor = least
                    print(
                        f"| {n_threads} | {n_features} | {n_concepts} | {kind} | {loop:.2f} | {layer:.2f} "
                        f"| {floor:.2f} | {loop / layer:.1f} | {loop / floor:.1f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
