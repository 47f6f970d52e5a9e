"""How the embedded endpoint understands a concept: from its definition's own grammar, or else from its words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from annotation.vlm.attributes import Attribute
from annotation.vlm.catalogue import ATTRIBUTES
from annotation.vlm.measure import Measurements

_NEGATION = re.compile(
    r"\b(no|not|without|absence of|absent|lack of|lacks|lacking|free of|non|nil|none|low|little|few)\b"
)


@dataclass(frozen=True)
class Reading:
    """How a concept is decided: an attribute above a cut, or not above it."""

    attribute: Attribute
    cut: float
    negated: bool = False

    def probability(self, measured: Measurements) -> float | None:
        """How likely the concept is present, from the distance to the cut; None when it cannot be measured."""
        value = measured.get(self.attribute.quantity)
        if value is None or not math.isfinite(value):
            return None
        odds = max(-12.0, min(12.0, (value - self.cut) / self.attribute.softness))
        above = 1 / (1 + math.exp(-odds))
        return 1 - above if self.negated else above

    def evidence(self, measured: Measurements) -> str:
        """A short phrase with the measured number."""
        attribute = self.attribute
        return attribute.seen.format(value=f"{measured[attribute.quantity]:.{attribute.decimals}f}")


def reading_of(name: str, definition: str) -> Reading | None:
    """How to decide a concept, from its definition's own grammar or else from its words; None when not measurable."""
    for attribute in ATTRIBUTES:
        cut = attribute.cut_in(definition)
        if cut is not None:
            return Reading(attribute, cut)
    for attribute in _by_words(name):
        return Reading(attribute, attribute.usual_cut, _NEGATION.search(name.lower()) is not None)
    return None


def _by_words(name: str) -> Iterator[Attribute]:
    return (attribute for attribute in ATTRIBUTES if attribute.is_meant_by(name))
