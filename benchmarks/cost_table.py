"""What the head costs over the bare backbone: parameters and operations, beside the paper's figures.

    python benchmarks/cost_table.py [--backbones resnet50 embedded …]

Counted with torch's FlopCounterMode on one image of 224 px, weights random. A multiplication with its addition is two
operations; the paper's figures (+1.04 M parameters, +1 MFLOP on ResNet50) only fit together if it is one.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model.backbones import SUGGESTED, build_backbone
from model.config import TrainConfig
from model.network import Sizes
from model.systems.registry import SYSTEMS, build_network

PAPER = "paper, on ResNet50: +1.04 M parameters, +1 MFLOP"
CONCEPTS = {"COVID-CT": (8, 2), "DDI": (13, 2), "WBCAtt": (31, 5), "SkinCon": (48, 2)}
"""Concepts and classes of a few data sets."""


def n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def n_operations(module: nn.Module, inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(inputs)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=list(SUGGESTED))
    parser.add_argument("--systems", nargs="+", default=["med-micn-paper"])
    options = parser.parse_args()
    print("| backbone | parameters (M) | MFLOP | system | concepts | head parameters (M) | head MFLOP | head of all |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.backbones:
        backbone = build_backbone(name, size_px=224, pretrained=False)
        size, cost = n_parameters(backbone.module), n_operations(backbone.module, torch.zeros(1, 3, 224, 224))
        for data_set, (n_concepts, n_classes) in CONCEPTS.items():
            for system in options.systems:
                config = SYSTEMS[system].config(TrainConfig())
                head = build_network(Sizes(backbone.n_features, n_concepts, n_classes), config)
                added = n_operations(head, torch.zeros(1, backbone.n_features))
                print(
                    f"| {name} | {size / 1e6:.2f} | {cost / 1e6:,.0f} | {system} | {n_concepts} ({data_set}) "
                    f"| {n_parameters(head) / 1e6:.3f} | {added / 1e6:.3f} | {added / (cost + added):.3%} |"
                )
    print(f"\n{PAPER}")


if __name__ == "__main__":
    main()
