"""Which measured attributes tell the images of a class from others, and where to cut them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from annotation.vlm.attributes import Attribute
from annotation.vlm.catalogue import ATTRIBUTES
from annotation.vlm.measure import Measurements
from annotation.vlm.segment import otsu

Values = npt.NDArray[np.float64]

MAX_CONCEPTS = 6
_AT_LEAST = 4

_LEAST_MEASURED_SHARE = 0.8
_LEAST = (0.75, 0.3)
"""Least AUROC of class against others, and least difference of their rates, for an attribute to be proposed."""
_LEAST_IF_CLEAR = (0.56, 0.12)
_CLEAR = 0.78
"""Share of the variance that the two sides of the cut explain, above which they count as two clean groups."""
_LEAST_MINORITY_SHARE = 0.08
_MOST_CORRELATION = 0.8
_MOST_CORRELATION_WITHIN = 0.6


@dataclass(frozen=True)
class Chosen:
    """An attribute with its cut, and how well it tells the class from the others."""

    attribute: Attribute
    cut: float
    score: float
    is_telling: bool
    """Whether the difference between class and others is more than these few images show by chance."""


def select_concepts(
    images: Sequence[Measurements], others: Sequence[Measurements], n: int = MAX_CONCEPTS
) -> list[Chosen]:
    """At most `n` attributes that are commoner in `images` than in `others`, best first, none much like another.

    The cut splits all images together into a low and a high group and does not look at the class. Attributes that
    tell little are only taken to fill up to `_AT_LEAST`. Without `others`, attributes whose two groups are clearest
    come first.
    """
    everything = [*images, *others]
    kept: list[tuple[Chosen, Values]] = []
    for attribute in ATTRIBUTES:
        values = np.array([m.get(attribute.quantity, np.nan) for m in everything])
        found = _candidate(attribute, values, len(images))
        if found is not None and not any(_say_the_same(values, other, len(images)) for _, other in kept):
            kept.append((found, values))
    ranked = sorted((chosen for chosen, _ in kept), key=lambda c: (not c.is_telling, -c.score))
    n_telling = sum(chosen.is_telling for chosen in ranked)
    return ranked[: min(n, max(n_telling, _AT_LEAST))]


def _candidate(attribute: Attribute, values: Values, n_images: int) -> Chosen | None:
    known = np.isfinite(values)
    if known.mean() < _LEAST_MEASURED_SHARE or np.ptp(values[known]) < attribute.softness:
        return None
    low, high = np.percentile(values[known], [4, 96])
    # Below zero a statement such as "more than -3 units redder" would no longer say what it means.
    cut = max(0.0, round(otsu(np.clip(values[known], low, high)), attribute.decimals))
    above = values[known] > cut
    if not _LEAST_MINORITY_SHARE <= above.mean() <= 1 - _LEAST_MINORITY_SHARE:
        return None
    clearness = _clearness(values[known], above)
    own, rest = values[:n_images][known[:n_images]], values[n_images:][known[n_images:]]
    if not rest.size:
        return Chosen(attribute, cut, clearness - attribute.is_general, is_telling=not attribute.is_general)
    auroc = float((own[:, None] > rest[None, :]).mean() + 0.5 * (own[:, None] == rest[None, :]).mean())
    difference = float((own > cut).mean() - (rest > cut).mean())
    if difference <= 0:
        return None
    # Two clean groups are a fact about the images even where chance made the samples of the classes alike.
    least_auroc, least_difference = _LEAST_IF_CLEAR if clearness > _CLEAR else _LEAST
    is_telling = auroc >= least_auroc and difference >= least_difference and not attribute.is_general
    return Chosen(attribute, cut, auroc + difference + clearness - attribute.is_general, is_telling)


def _clearness(values: Values, above: npt.NDArray[np.bool_]) -> float:
    """Share of the variance that the two groups explain."""
    means = np.where(above, values[above].mean(), values[~above].mean())
    return float(means.var() / max(values.var(), 1e-12))


def _say_the_same(a: Values, b: Values, n_images: int) -> bool:
    """Whether two quantities go together, also among the images of one class: two traits of a class need not."""
    within = [_correlation(a[part], b[part]) for part in (slice(0, n_images), slice(n_images, None))]
    return _correlation(a, b) > _MOST_CORRELATION and max(within) > _MOST_CORRELATION_WITHIN


def _correlation(a: Values, b: Values) -> float:
    known = np.isfinite(a) & np.isfinite(b)
    if known.sum() < 4 or np.ptp(a[known]) == 0 or np.ptp(b[known]) == 0:
        return 0.0
    return float(abs(np.corrcoef(a[known], b[known])[0, 1]))
