from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_contracts.concepts import Concept, Vocabulary, slug
from data_contracts.errors import ContractViolation, VocabularyMismatch

names = st.text(min_size=1, max_size=40).filter(lambda text: text.strip())


@given(names)
def test_a_slug_is_never_empty_and_survives_a_second_pass(name: str) -> None:
    assert slug(name)
    assert slug(slug(name)) == slug(name)


def test_names_without_ascii_do_not_collide() -> None:
    assert slug("白い") != slug("黒い")


@given(st.lists(names, max_size=8, unique_by=slug))
def test_json_round_trip_keeps_order_and_hash(texts: list[str]) -> None:
    vocabulary = Vocabulary.of(Concept(slug(text), text) for text in texts)
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary


def test_order_is_part_of_the_hash() -> None:
    a, b = Concept("a", "A"), Concept("b", "B")
    assert Vocabulary((a, b)).sha256 != Vocabulary((b, a)).sha256


def test_duplicate_ids_are_refused() -> None:
    with pytest.raises(ContractViolation, match="occurs twice"):
        Vocabulary((Concept("a", "A"), Concept("a", "another")))


def test_a_changed_file_no_longer_matches_its_hash() -> None:
    content = json.loads(Vocabulary((Concept("a", "A"),)).to_json())
    content["concepts"][0]["name"] = "B"
    with pytest.raises(VocabularyMismatch, match="vocabulary hash"):
        Vocabulary.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"concepts": [{"nope": 1}], "sha256": "x"}'])
def test_malformed_json_is_refused(text: str) -> None:
    with pytest.raises(ContractViolation):
        Vocabulary.from_json(text)


def test_an_unknown_concept_is_named() -> None:
    vocabulary = Vocabulary((Concept("a", "A"),))
    with pytest.raises(ContractViolation, match="'b' is unknown"):
        vocabulary.position("b")
    assert "a" in vocabulary
    assert "b" not in vocabulary


def test_groups_list_their_members_in_order() -> None:
    vocabulary = Vocabulary((Concept("x", "X", group="shape"), Concept("y", "Y"), Concept("z", "Z", group="shape")))
    assert vocabulary.groups == {"shape": ("x", "z")}
