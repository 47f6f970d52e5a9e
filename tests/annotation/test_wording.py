from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotation import lexicon
from annotation.wording import mentions, normalise, not_visual_word, opposes, plain

LEXICAL = sorted(
    {
        *lexicon.EQUIVALENTS,
        *lexicon.NOUNS_OF_QUALITIES,
        *lexicon.PLURALS,
        *(word for words in lexicon.QUALITIES.values() for word in words),
        *(word for words in lexicon.NOUNS_AFTER_A_QUALITY.values() for word in words),
        *lexicon.RELATIONS,
        *(
            "no",
            "without",
            "absence",
            "absent",
            "free",
            "lacks",
            "visible",
            "present",
            "and",
            "is",
            "the",
            "a",
            "scale",
        ),
    }
)
names = st.one_of(
    st.text(min_size=1, max_size=40),
    st.lists(st.sampled_from(LEXICAL), min_size=1, max_size=6).map(" ".join),
    st.lists(st.sampled_from(["absent", "free", "es", "s", "ae", "non", "ss", "ies", "us", "x"]), min_size=1).map(
        "".join
    ),
)


@given(names)
def test_the_key_of_a_key_is_itself(name: str) -> None:
    key = normalise(name).key
    assert key
    again = normalise(key)
    assert (again.key, again.negated) == (key, False)


@given(names.filter(lambda name: any(c.isalnum() for c in name)))
def test_absence_of_flips_the_polarity_and_keeps_the_key(name: str) -> None:
    absent, present = normalise(f"absence of {name}"), normalise(name)
    assert absent.key == present.key
    assert absent.negated is not present.negated


@given(names)
def test_case_and_blanks_mean_nothing(name: str) -> None:
    assert normalise(f"  {name}\n").key == normalise(name).key
    ascii_name = name.encode("ascii", "ignore").decode()
    assert normalise(ascii_name.upper()).key == normalise(ascii_name.lower()).key


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Ground-glass opacities", "ground glass opacity"),
        ("ground-glass opacification", "GGO"),
        ("oedema", "edema"),
        ("dark centres", "dark center"),
        ("tumours", "tumor"),
        ("haemorrhage", "hemorrhages"),
        ("grey fibres", "gray fiber"),
        ("localised nuclei", "localized nucleus"),
        ("naevi", "nevus"),
        ("vacuoles", "vacuole"),
        ("foci", "focus"),
        ("septa", "septum"),
        ("papillae", "papilla"),
        ("vertebrae", "vertebra"),
        ("bullae", "bulla"),
        ("masses", "mass"),
        ("large, round, dark nucleus", "dark round large nuclei"),
        ("irregularity of the borders", "border irregularity"),
        ("irregular margins", "irregular outline"),
        ("borders are irregular", "irregular border"),
        ("thickening of the wall", "thickened wall"),
        ("loss of volume", "volume loss"),
        ("nuclear shape", "shape of the nucleus"),
        ("reddish colour", "redness"),
        ("red in colour", "red"),
        ("round shape", "rounded"),
        ("well-demarcated edges", "sharply defined border"),
        ("poorly defined outline", "ill-defined border"),
        ("numerous vacuoles", "multiple vacuoles"),
        ("presence of crusts", "visible crust"),
        ("red dots and white lines", "white lines and red dots"),
        ("non-lobed nucleus", "nonlobed nuclei"),
    ],
)
def test_names_that_mean_the_same(a: str, b: str) -> None:
    assert normalise(a).key == normalise(b).key
    assert not normalise(a).negated
    assert not opposes(a, b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("reddish colour", "erythematous"),
        ("dark centre with pale border", "pale centre with dark border"),
        ("dark nucleus", "dark cytoplasm"),
        ("centre of a dark lesion", "dark centre of the lesion"),
        ("small vacuole", "vacuole"),
        ("nodule without calcification", "nodule"),
        ("more than 5 spots", "less than 5 spots"),
        ("> 5 spots", "< 5 spots"),
        ("blue-white veil", "white veil"),
        ("segmented nucleus", "unsegmented nucleus"),
        ("α granules", "β granules"),
        ("A lines", "B lines"),
    ],
)
def test_names_that_do_not(a: str, b: str) -> None:
    assert normalise(a).key != normalise(b).key


@pytest.mark.parametrize(
    ("name", "positive"),
    [
        ("absence of lobar consolidation", "lobar consolidation"),
        ("Absent hair", "hair"),
        ("no Auer rods", "Auer rods"),
        ("without scale", "scale"),
        ("lack of symmetry", "symmetry"),
        ("lacking granules", "granules"),
        ("free of crusts", "crusts"),
        ("hair-free", "hair"),
        ("granules absent", "granules"),
        ("vessels are not visible", "vessels"),
        ("no evidence of calcification", "calcification"),
        ("complete absence of any haze", "haze"),
    ],
)
def test_negations_leave_their_positive(name: str, positive: str) -> None:
    wording = normalise(name)
    assert wording.negated
    assert wording.positive == positive
    assert wording.key == normalise(positive).key


@pytest.mark.parametrize(
    "name",
    [
        "non-lobed nucleus",
        "nodular",
        "notched outline",
        "north",
        "nodule without calcification",
        "no more than two lobes",
        "absent or sparse granules",
        "free fluid",
        "loss of volume",
        "No.",
        "nothing",
    ],
)
def test_these_are_no_negations(name: str) -> None:
    assert not normalise(name).negated
    assert normalise(name).positive == name


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("large nucleus", "small nucleus"),
        ("regular border", "irregular edges"),
        ("dark centre", "bright center"),
        ("left lung opacity", "right lung opacity"),
        ("upper lobe opacity", "lower lobe opacity"),
        ("central haze", "peripheral haze"),
        ("single nodule", "multiple nodules"),
        ("high contrast", "low contrast"),
        ("increased density", "decreased density"),
        ("smooth surface", "rough surface"),
        ("symmetry", "asymmetry"),
        ("well-defined border", "ill-defined border"),
        ("hyperpigmented area", "hypopigmented area"),
        ("unilateral haze", "bilateral haze"),
        ("intralobular lines", "interlobular lines"),
        ("segmented nucleus", "unsegmented nucleus"),
        ("lobed nucleus", "non-lobed nucleus"),
        ("nodule with calcification", "nodule without calcification"),
        ("red granules", "blue granules"),
        ("two lobes", "three lobes"),
        ("5 spots", "10 spots"),
        ("dark centre with pale border", "pale centre with dark border"),
    ],
)
def test_opposites(a: str, b: str) -> None:
    assert opposes(a, b)
    assert opposes(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("large nucleus", "large dark nucleus"),
        ("irregular border", "jagged edges"),
        ("small vacuoles", "tiny vacuoles"),
        ("haze in the lung", "hazy lung"),
        ("no hair", "hair"),
        ("annular lesion", "nodular lesion"),
    ],
)
def test_no_opposites(a: str, b: str) -> None:
    assert not opposes(a, b)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("patient age", "patient"),
        ("long history", "history"),
        ("itchy rash", "itchy"),
        ("High blood pressure", "blood pressure"),
        ("elevated D-dimer", "d dimer"),
        ("female sex", "female"),
        ("age spots", None),
        ("male pattern baldness", None),
        ("painted look", None),
        ("large nucleus", None),
        ("reddish colour", None),
    ],
)
def test_what_no_image_shows(name: str, word: str | None) -> None:
    assert not_visual_word(name) == word


@pytest.mark.parametrize(
    ("text", "name", "is_mentioned"),
    [
        ("Typical of melanomas.", "melanoma", True),
        ("A melanocytic pattern.", "melanoma", False),
        ("Seen in a seborrhoeic keratosis", "Seborrheic keratoses", True),
        ("type A pattern", "A", False),
        ("anything", "…", False),
    ],
)
def test_a_mentioned_name_is_found_in_other_spelling(text: str, name: str, is_mentioned: bool) -> None:
    assert mentions(text, name) is is_mentioned


def test_the_lexicon_speaks_its_own_canonical_language() -> None:
    # A word that is not its own plain form could never be met.
    words = {
        *lexicon.EQUIVALENTS,
        *lexicon.EQUIVALENTS.values(),
        *lexicon.NOUNS_OF_QUALITIES,
        *lexicon.PLURALS.values(),
        *lexicon.NOT_VISUAL,
        *lexicon.VISUAL_ALL_THE_SAME,
        *(word for sides in lexicon.OPPOSITES for side in sides for word in side),
        *(word for qualities in lexicon.QUALITIES.values() for word in qualities),
    }
    assert {w: plain(w) for w in words if plain(w) != w} == {}
