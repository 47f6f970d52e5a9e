"""One thing the embedded endpoint can talk about: a measured quantity above a cut, with its words.

A definition states its cut in words, and can be read back from them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_NUMBER = r"(-?\d+(?:\.\d+)?)"


@dataclass(frozen=True)
class Nouns:
    """What the parts of an image are called in one modality."""

    whole: str = "main object"
    dark: str = "dark part"
    pale: str = "pale part"
    field: str = "dark field"

    def put_into(self, template: str) -> str:
        """A template with these nouns; `{cut}` stays."""
        return template.format(whole=self.whole, dark=self.dark, pale=self.pale, field=self.field, cut="{cut}")


_NOUNS: tuple[tuple[str, Nouns], ...] = (
    (r"skin|derm|lesion|mole|naev|nevus|melanom", Nouns("lesion", "dark part", "pale part")),
    (r"blood|smear|leuk|cytolog|cell|marrow", Nouns("cell", "nucleus", "cytoplasm")),
    (r"\bct\b|tomogra|chest|lung|thora|x-?ray|radiogra", Nouns(field="lung")),
)
_ALL_NOUNS = (Nouns(), *(nouns for _, nouns in _NOUNS))


def _any_noun(part: str) -> str:
    """Pattern of all nouns for one part of an image."""
    return "(?:" + "|".join(sorted({getattr(nouns, part) for nouns in _ALL_NOUNS})) + ")"


def nouns_of(modality: str) -> Nouns:
    """The nouns that fit a modality; general ones when it is not known."""
    return next((n for pattern, n in _NOUNS if re.search(pattern, modality.lower())), Nouns())


@dataclass(frozen=True)
class Attribute:
    """One quantity above a cut."""

    quantity: str
    """Name in `Measurements`."""
    name: str
    """Plain words, with nouns in braces."""
    statement: str
    """The definition, with nouns and `{cut}` in braces."""
    seen: str
    """The evidence phrase, with `{value}` in braces."""
    usual_cut: float
    """The cut for words that state none."""
    softness: float
    """Distance from the cut at which a judgement is fairly sure (odds 1:e)."""
    synonyms: str = ""
    """Other words for it, separated by `|`, as a regular expression."""
    decimals: int = 0
    """Decimals of the cut when it is spoken."""

    @property
    def is_general(self) -> bool:
        """Whether it is about the image as a whole, and so the first suspect for a mere difference of cameras."""
        return self.quantity.startswith("image_")

    def concept_name(self, nouns: Nouns) -> str:
        """Its name in a modality."""
        return nouns.put_into(self.name)

    def definition(self, cut: float, nouns: Nouns) -> str:
        """One sentence that states the cut."""
        return nouns.put_into(self.statement).format(cut=f"{cut:.{self.decimals}f}")

    @cached_property
    def _grammar(self) -> re.Pattern[str]:
        pieces = re.split(r"\{(\w+)\}", self.statement)
        pattern = "".join(
            re.escape(piece) if i % 2 == 0 else _NUMBER if piece == "cut" else _any_noun(piece)
            for i, piece in enumerate(pieces)
        )
        return re.compile(pattern, re.IGNORECASE)

    def cut_in(self, definition: str) -> float | None:
        """The cut that a definition of this attribute states; None for any other sentence."""
        match = self._grammar.fullmatch(definition.strip())
        return float(match.group(1)) if match else None

    def is_meant_by(self, words: str) -> bool:
        """Whether words of someone else mean this attribute."""
        return bool(self.synonyms) and re.search(rf"\b(?:{self.synonyms})\b", words.lower()) is not None
