"""Speed of training: the head beside a ResNet50, and epochs on cached features of every system.

    python benchmarks/training_speed.py [--only head features] [--batch 32] [--side 224] [--repeats 3]

Random weights and pixels: only time is measured. The head's cost is a difference of a few thousandths of a step, less
than two runs of the same step differ by, so it is also timed alone, on features of the same size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from torch.nn import functional as F

from data_contracts.concepts import Concept, Vocabulary
from data_contracts.dataset import AlignedDataset
from data_contracts.ports import Pixels
from model.backbones import build_backbone
from model.config import TrainConfig
from model.fit import fit, prepare_for
from model.losses import LossWeights, Targets, losses
from model.network import ImageNetwork, MedMICN, Sizes
from model.systems.registry import SYSTEMS, system

N_CONCEPTS, N_CLASSES = 31, 5


def seconds(step: Callable[[], None], repeats: int) -> list[float]:
    step()
    times = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        step()
        times.append(time.perf_counter() - started_s)
    return times


def stepper(module: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
    module.train()

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        optimiser.step()

    return step


def head_overhead(batch: int, side_px: int, repeats: int) -> None:
    torch.manual_seed(0)
    images, y = torch.randn(batch, 3, side_px, side_px), torch.randint(0, N_CLASSES, (batch,))
    targets = Targets(y, torch.rand(batch, N_CONCEPTS), torch.ones(batch, N_CONCEPTS, dtype=torch.bool))
    weights = LossWeights(1.0, 0.1, torch.ones(N_CLASSES))
    bare = timm.create_model("resnet50", num_classes=N_CLASSES)
    trunk, n_features = timm.create_model("resnet50", num_classes=0), 2048
    head = MedMICN(Sizes(n_features, N_CONCEPTS, N_CLASSES), TrainConfig())
    whole, alone = ImageNetwork(trunk, head), MedMICN(Sizes(n_features, N_CONCEPTS, N_CLASSES), TrainConfig())
    features = torch.randn(batch, n_features, requires_grad=True)
    times = {
        "bare ResNet50": seconds(stepper(bare, lambda: F.cross_entropy(bare(images), y)), repeats),
        "with the head": seconds(stepper(whole, lambda: losses(whole(images), targets, weights).total), repeats),
        "the head alone": seconds(
            stepper(alone, lambda: losses(alone(features), targets, weights).total), 10 * repeats
        ),
    }
    reference = statistics.median(times["bare ResNet50"])
    print(
        f"\n| training step, batch {batch}, {side_px} px | seconds (lowest–highest) | of the bare step |\n|---|---|---|"
    )
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle:.4f} ({min(values):.4f}–{max(values):.4f}) | {middle / reference:.2%} |")


def synthetic(n_images: int) -> AlignedDataset:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "image_id": [f"i{n}" for n in range(n_images)],
            "path": "x.png",
            "label": [f"class {n}" for n in rng.integers(0, N_CLASSES, n_images)],
            "split": np.where(rng.random(n_images) < 2 / 3, "train", "val"),
            "group_id": None,
        }
    )
    targets = rng.random((n_images, N_CONCEPTS)).astype(np.float32)
    vocabulary = Vocabulary.of([Concept(f"c{k}", f"concept {k}") for k in range(N_CONCEPTS)])
    classes = tuple(f"class {n}" for n in range(N_CLASSES))
    return AlignedDataset(frame, targets, np.ones_like(targets, dtype=bool), vocabulary, classes)


def grey(_image_id: str) -> Pixels:
    return np.full((32, 32, 3), 128, np.uint8)


def cached_features(n_images: int, epochs: int) -> None:
    print(
        f"\n| system, {n_images} images × 1,280 cached features | seconds an epoch | epochs a second |\n|---|---|---|"
    )
    common = TrainConfig(epochs=epochs, seeds=(0,), image_size_px=32)
    with tempfile.TemporaryDirectory() as folder:
        dataset, total_s = synthetic(n_images), 0.0
        backbone = build_backbone(common.backbone, size_px=common.image_size_px)
        for name in SYSTEMS:
            config = system(name).config(common)
            prepared, backbone = prepare_for([config], dataset, grey, cache_dir=Path(folder))
            epoch_s = fit(prepared, backbone, config).history["seconds"].median()
            total_s += epoch_s
            print(f"| {name} | {epoch_s:.3f} | {1 / epoch_s:.1f} |")
    minutes = total_s * 5 * TrainConfig().epochs / 60
    print(f"\nall systems × 5 seeds × {TrainConfig().epochs} epochs: {minutes:.1f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("head", "features"), default=["head", "features"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if "features" in arguments.only:
        cached_features(arguments.images, arguments.epochs)
    if "head" in arguments.only:
        head_overhead(arguments.batch, arguments.side, arguments.repeats)


if __name__ == "__main__":
    main()
