from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annotation.filter import FilterOptions
from annotation.vlm.attributes import Attribute, Nouns, nouns_of
from annotation.vlm.catalogue import ATTRIBUTES
from annotation.vlm.reading import reading_of
from data_contracts.concepts import slug

ALL_NOUNS = [Nouns(), nouns_of("dermoscopy of skin lesions"), nouns_of("blood smear"), nouns_of("chest CT")]


@pytest.mark.parametrize("attribute", ATTRIBUTES, ids=lambda a: a.quantity)
@pytest.mark.parametrize("nouns", ALL_NOUNS, ids=lambda n: n.whole + "/" + n.field)
@given(cut=st.floats(0, 500))
@settings(max_examples=10)
def test_a_definition_reads_back_as_itself_and_nothing_else(attribute: Attribute, nouns: Nouns, cut: float) -> None:
    cut = round(cut, attribute.decimals)
    definition = attribute.definition(cut, nouns)
    reading = reading_of("any name", definition)
    assert reading is not None
    assert (reading.attribute, reading.negated) == (attribute, False)
    assert reading.cut == pytest.approx(cut)
    assert [a for a in ATTRIBUTES if a.cut_in(definition) is not None] == [attribute]


@pytest.mark.parametrize("nouns", ALL_NOUNS, ids=lambda n: n.whole + "/" + n.field)
def test_names_are_short_and_distinct(nouns: Nouns) -> None:
    names = [attribute.concept_name(nouns) for attribute in ATTRIBUTES]
    assert max(map(len, names)) <= FilterOptions().max_name_characters
    assert len({slug(name) for name in names}) == len(names)
