"""Where tensors go."""

from __future__ import annotations


def resolve_device(name: str) -> str:
    """`auto` becomes `cuda` where there is a GPU, else `cpu`; other names are returned as they are."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
