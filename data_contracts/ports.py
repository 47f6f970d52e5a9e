"""Shapes of the callables that cross room borders, so that no room needs to know another's classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
"""One image: (height, width, 3), RGB, 0–255."""

PixelReader = Callable[[str], Pixels]
"""Image id → its pixels; raises `ImageRejected` when they cannot be read."""

TextEmbedder = Callable[[Sequence[str]], npt.NDArray[np.float32]]
"""n texts → (n, D) float32, rows of unit length."""

Advance = Callable[[int], None]
"""Progress: called with the number of items that were just finished."""


def ignore_progress(_n_items: int) -> None:
    """The `Advance` for callers who do not watch."""
