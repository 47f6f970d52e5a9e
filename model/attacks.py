"""Small changes of the pixels that are chosen to mislead: FGSM and PGD, and noise of the same size as their control.

A strength ε is in units of pixel values in [0, 1], before standardisation: 8/255 is eight of an 8-bit image's 256
grey values, whatever mean and deviation the backbone wants. What is changed is the square that the network sees.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.backbones import Preprocessing

PGD_STEPS = 10
_PGD_REACH = 2.5
"""All steps together could go so many times ε (Madry et al., ICLR 2018): enough to reach and follow the border."""


class PixelNetwork(nn.Module):
    """(B, 3, S, S) pixels in [0, 1] → class logits (B, C): standardisation and the network in one."""

    mean: Tensor
    std: Tensor

    def __init__(self, image_network: nn.Module, preprocess: Preprocessing) -> None:
        """Wrap a network of preprocessed images."""
        super().__init__()
        self.network = image_network
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1))

    def standardised(self, x: Tensor) -> Tensor:
        """What the network reads."""
        return (x - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        """Class logits."""
        logits: Tensor = self.network(self.standardised(x)).class_logits
        return logits


def fgsm(network: PixelNetwork, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """One step of ε along the sign of the loss's gradient (Goodfellow et al., ICLR 2015), within [0, 1]."""
    return (x + epsilon * _gradient(network, x, y).sign()).clamp(0, 1)


def pgd(network: PixelNetwork, x: Tensor, y: Tensor, epsilon: float, *, generator: torch.Generator) -> Tensor:
    """Projected gradient ascent in the ε-cube around x from a random start (Madry et al., ICLR 2018), within [0, 1]."""
    step = _PGD_REACH * epsilon / PGD_STEPS
    low, high = (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1)
    moved = uniform_noise(x, epsilon, generator=generator)
    for _ in range(PGD_STEPS):
        moved = torch.minimum(torch.maximum(moved + step * _gradient(network, moved, y).sign(), low), high)
    return moved


def uniform_noise(x: Tensor, radius: float, *, generator: torch.Generator) -> Tensor:
    """Each pixel and channel moved by up to `radius` at random, within [0, 1]."""
    noise = torch.empty(x.shape).uniform_(-radius, radius, generator=generator) if radius > 0 else torch.zeros(x.shape)
    return (x + noise.to(x)).clamp(0, 1)


def _gradient(network: PixelNetwork, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(x), y, reduction="sum"), x)
    return gradient
