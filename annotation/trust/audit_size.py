"""How many cells an expert would have to answer before good labels and poor ones can be told apart."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from annotation.trust.agreement import kappa_interval

GOOD_KAPPA = 0.7
"""Agreement of labels that deserve to be told from poor ones."""
POOR_KAPPA = 0.4
"""Agreement below which a concept is not worth keeping (`AuditOptions.keep_kappa`)."""
_RAREST = 0.1
_N = 10_000


def cells_to_settle(prevalence: npt.NDArray[np.float64]) -> int:
    """Answers after which labels of kappa 0.7 are surely above 0.4, on every concept, in tens.

    The interval of kappa (Fleiss, Cohen and Everitt, 1969) shrinks with the root of the cells' number. Rare answers
    count as one in ten, because the draw asks for them out of proportion.

    Args:
        prevalence: (K,) share of presence of each concept, NaN for a concept without a label.
    """
    shares = prevalence[np.isfinite(prevalence)]
    cells = sum(_cells(float(share)) for share in np.clip(shares, _RAREST, 1 - _RAREST))
    return 10 * math.ceil(cells / 10)


def _cells(share: float) -> int:
    """Of one concept whose labels are present as often as the truth."""
    chance = share**2 + (1 - share) ** 2
    wrong = (1 - GOOD_KAPPA) * (1 - chance) / 2
    table = np.array([share - wrong, wrong, wrong, 1 - share - wrong]) * _N
    found = kappa_interval(*table)
    return math.ceil(_N * ((found.value - found.low) / (GOOD_KAPPA - POOR_KAPPA)) ** 2)
