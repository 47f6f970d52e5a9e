"""What the page can do only with help from outside: predict, intervene, and price a change of the concepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd


@dataclass(frozen=True)
class Predicted:
    """What the trained classifier says of one image."""

    class_name: str
    class_probabilities: Mapping[str, float]
    concept_probabilities: Mapping[str, float]
    """By concept id; empty for a classifier without concepts."""
    rule: str | None = None
    rule_holds: bool | None = None
    warning: str | None = None
    """Why the class should not be relied on."""
    class_map: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    """(H, W) in 0–1: what in the image speaks for the class."""


@dataclass(frozen=True)
class Cost:
    """What a change of the concepts brings with it."""

    n_questions: int
    """Cells that the vision-language model is asked about."""
    n_requests: int
    price: str
    """In words, with its source."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Why cells are asked → how many."""


Predict = Callable[[str], Predicted]
"""Image id → prediction, with the class's map."""

Intervene = Callable[[str, Mapping[str, bool]], tuple[Predicted, Predicted]]
"""Image id and concepts that are set → prediction before and after."""

CostOf = Callable[[pd.DataFrame], Cost]
"""A `concepts` table as it would be → what judging for it would take."""


@dataclass(frozen=True)
class Ports:
    """What flows hand to the page; what is None is not offered."""

    predict: Predict | None = None
    intervene: Intervene | None = None
    cost: CostOf | None = None
