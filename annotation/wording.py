"""What a concept's name means, apart from how it is written: spelling, number, word order, equivalents, negation.

A negated name and its positive are one concept with two states, so both have one key and differ in polarity.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from annotation.lexicon import (
    EQUIVALENTS,
    NEGATING_PREFIXES,
    NOT_VISUAL,
    NOUNS_AFTER_A_QUALITY,
    NOUNS_OF_QUALITIES,
    OPPOSED_PREFIXES,
    OPPOSITES,
    PLURALS,
    QUALITIES,
    RELATIONS,
    SINGULAR_IN_S,
    SPELLINGS,
    VISUAL_ALL_THE_SAME,
)
from data_contracts.concepts import slug

_NEGATIONS = (
    re.compile(
        r"(?:with\s+)?(?:(?:complete|total|entire)\s+)?"
        r"(?:absence\s+of|lack\s+of|free\s+(?:of|from)|devoid\s+of|negative\s+for|"
        # "absent or sparse granules" does not say that there are none.
        r"(?:absent|lacks|lacking|without|not|nil|no(?!\s+(?:more|less|fewer|longer|larger|smaller|other|later)\b))"
        r"(?!\s+(?:or|and|to)\b))\s+(?P<rest>.+)",
        re.IGNORECASE,
    ),
    re.compile(
        r"(?P<rest>.+?)(?<!\bor)(?<!\band)(?:\s+(?:is|are))?\s+(?:absent|lacking|not\s+(?:seen|visible|present))",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<rest>.+\w)-free", re.IGNORECASE),
)
_FILLERS = (
    re.compile(
        r"(?:(?:the\s+)?presence\s+of|evidence\s+of|signs?\s+of|with|has|have|having|shows|showing|visible|obvious|"
        r"discernible|any|some|the|an)\s+(?P<rest>.+)",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<rest>.+?)\s+(?:(?:is|are)\s+)?(?:present|visible|seen)", re.IGNORECASE),
)
_SYMBOLS = (
    (re.compile(r"['’]s\b"), ""),
    (re.compile("[>≥]"), " more "),
    (re.compile("[<≤]"), " less "),
    (re.compile("[&/]"), " and "),
)
_ENDINGS = (
    *(("omata", "oma"), ("ae", "a"), ("ss", "ss"), ("us", "us"), ("is", "is"), ("ies", "y")),
    *((f"{ending}es", ending) for ending in ("ss", "sh", "ch", "x", "z", "us")),
    ("s", ""),
)
"""Endings of plurals and what they become, the first that fits; some are those of singulars and stay."""
_WORD = re.compile(r"[^\W_]+")
_ACCENT = re.compile("[\u0300-\u036f]")
_SPELLING_RULES = [(re.compile(british), american) for british, american in SPELLINGS]
_QUALITY_OF = {word: quality for quality, words in QUALITIES.items() for word in words}
_PHRASES = {tuple(phrase.split()): standing.split() for phrase, standing in EQUIVALENTS.items()}
_LONGEST_PHRASE = max(map(len, _PHRASES))
_LEFT_OUT = frozenset({"the", "an", "is", "are"})
_NEGATIVE_WORDS = frozenset({"no", "not", "without", "absent", "lacking"})
_MOST_PASSES = 8
"""One pass can make way for another (a plural that hides a phrase); two or three have always been enough."""


@dataclass(frozen=True)
class Wording:
    """A name taken apart: what it is about, and whether it affirms or denies it."""

    key: str
    """Canonical words, equal for names that mean the same; never empty."""
    negated: bool
    """Whether the name says that the thing is not there."""
    positive: str
    """The name as it was written, without its negation and without words like `presence of`."""


@lru_cache(maxsize=8192)
def normalise(name: str) -> Wording:
    """What a name means: canonical key and polarity. The key of a key is itself, and `absence of x` flips `x`."""
    positive, negated = _without_negation(" ".join(name.split()))
    key = _key(positive)
    for _ in range(_MOST_PASSES):
        rest, flips = _without_negation(key)
        again = _key(rest)
        if again == key:
            break
        key, negated = again, negated ^ flips
    return Wording(key, negated, positive)


def plain(name: str) -> str:
    """The words of a name in lower case, American spelling and the singular; empty when it has none."""
    return " ".join(_plain_words(name))


def opposes(a: str, b: str) -> bool:
    """Whether two names differ in words that exclude each other, such as `left` and `right`."""
    one, other = normalise(a).key.split(), normalise(b).key.split()
    only_a, only_b = set(one) - set(other), set(other) - set(one)
    if one != other and sorted(one) == sorted(other):
        # The same words in another order: "pale center with dark border" against "dark center with pale border".
        return any(sum(bool(side & set(one)) for side in sides) > 1 for sides in OPPOSITES)
    if bool(only_a & _NEGATIVE_WORDS) != bool(only_b & _NEGATIVE_WORDS):
        return True
    return any(_exclude(x, y) for x in only_a for y in only_b)


def mentions(text: str, name: str) -> bool:
    """Whether the words of `name` stand in `text`, in any spelling and number; no for names of one or two letters."""
    wanted = plain(name)
    return sum(c.isalpha() for c in wanted) > 2 and f" {wanted} " in f" {plain(text)} "


def not_visual_word(name: str) -> str | None:
    """The first word or phrase of a name that no image can show, such as `age`; None when there is none."""
    words = f" {plain(name)} "
    for visible in VISUAL_ALL_THE_SAME:
        words = words.replace(f" {visible} ", " ")
    found = [(words.find(f" {word} "), -len(word), word) for word in NOT_VISUAL if f" {word} " in words]
    return min(found)[2] if found else None


def _without_negation(text: str) -> tuple[str, bool]:
    """The text without negations and empty words around it, and whether an odd number of negations went."""
    negated = False
    while True:
        rest = _rest(_NEGATIONS, text)
        if rest is not None:
            text, negated = rest, not negated
            continue
        rest = _rest(_FILLERS, text)
        if rest is None:
            return text, negated
        text = rest


def _rest(patterns: Iterable[re.Pattern[str]], text: str) -> str | None:
    for pattern in patterns:
        match = pattern.fullmatch(text)
        if match and any(c.isalnum() for c in match["rest"]):
            return match["rest"]
    return None


def _key(text: str) -> str:
    words = _without_empty_nouns(_with_equivalents(_plain_words(text)))
    if not words:
        return " ".join(_plain_words(slug(text)))
    parts = " ".join(words).split(" and ")
    return " and ".join(sorted(" ".join(_ordered(part.split())) for part in parts))


def _plain_words(text: str) -> list[str]:
    for symbol, word in _SYMBOLS:
        text = symbol.sub(word, text)
    folded = unicodedata.normalize("NFKD", _ACCENT.sub("", unicodedata.normalize("NFKD", text)).casefold())
    words = [_singular(_spelled(_singular(word))) for word in _WORD.findall(folded)]
    kept = [word for word in words if word not in _LEFT_OUT] or words
    return _with_non_joined(kept)


def _spelled(word: str) -> str:
    for british, american in _SPELLING_RULES:
        word = british.sub(american, word)
    return word


def _singular(word: str) -> str:
    while (shorter := _one_step_singular(word)) != word:
        word = shorter
    return word


def _one_step_singular(word: str) -> str:
    if word in PLURALS:
        return PLURALS[word]
    if len(word) < 4 or word in SINGULAR_IN_S:
        return word
    for ending, singular in _ENDINGS:
        if word.endswith(ending):
            return word.removesuffix(ending) + singular
    return word


def _with_non_joined(words: Sequence[str]) -> list[str]:
    """`non lobed` becomes `nonlobed`, which is another word than `lobed`."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "non":
            joined[-1] += word
        else:
            joined.append(word)
    return joined


def _with_equivalents(words: Sequence[str]) -> list[str]:
    """The words with every listed phrase replaced by the one that stands for it, longest phrases first."""
    found: list[str] = []
    i = 0
    while i < len(words):
        for n in range(min(_LONGEST_PHRASE, len(words) - i), 0, -1):
            standing = _PHRASES.get(tuple(words[i : i + n]))
            if standing is not None:
                found += standing
                i += n
                break
        else:
            found.append(words[i])
            i += 1
    return found


def _without_empty_nouns(words: Sequence[str]) -> list[str]:
    """`red color`, `red in color` and `red colored` become `red`, so does `round shape` become `round`."""
    kept: list[str] = []
    for word in words:
        before = kept[:-1] if kept[-1:] == ["in"] else kept
        quality = _QUALITY_OF.get(before[-1]) if before else None
        if quality is not None and word in NOUNS_AFTER_A_QUALITY.get(quality, ()):
            kept = before
        else:
            kept.append(word)
    return kept


def _ordered(words: list[str]) -> list[str]:
    """The words in an order that does not matter to the meaning: `X of Y` as `Y X`, adjectives sorted."""
    if words[1:2] == ["of"] and len(words) > 2 and not RELATIONS & {words[0], *words[2:]}:
        words = [*words[2:], words[0]]
    if not words or RELATIONS & set(words):
        return words
    *before, last = words
    if not any(word in _QUALITY_OF for word in before):
        # "border irregularity" and "border is irregular" are "irregular border".
        quality = NOUNS_OF_QUALITIES.get(last, last)
        return [quality, *before] if quality != last or last in _QUALITY_OF else words
    described = words if last in _QUALITY_OF else before
    qualities = [_QUALITY_OF.get(word) for word in described]
    if None in qualities or len(set(qualities)) < len(qualities):
        return words
    return [*sorted(described), *words[len(described) :]]


def _exclude(a: str, b: str) -> bool:
    if any(c.isdigit() for c in a) and any(c.isdigit() for c in b):
        return True
    if any(_side(a, sides) != _side(b, sides) for sides in OPPOSITES if _side(a, sides) and _side(b, sides)):
        return True
    if any(a == prefix + b or b == prefix + a for prefix in NEGATING_PREFIXES):
        return True
    return any(_differ_in_prefix(a, b, prefixes) for prefixes in OPPOSED_PREFIXES)


def _side(word: str, sides: Sequence[frozenset[str]]) -> int:
    """Number of the side on which a word stands, from 1; 0 when on none."""
    return next((number for number, side in enumerate(sides, 1) if word in side), 0)


def _differ_in_prefix(a: str, b: str, prefixes: Sequence[str]) -> bool:
    stems = [{w.removeprefix(p) for p in prefixes if w.startswith(p) and len(w) > len(p) + 2} for w in (a, b)]
    return bool(stems[0] & stems[1])
