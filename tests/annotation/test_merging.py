from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from annotation.merging import Answer, Merged, merge
from annotation.provenance import Source
from annotation.text import minilm_embedder
from annotation.vlm.schema import Proposal
from data_contracts.ports import TextEmbedder


@pytest.fixture(scope="module")
def minilm() -> TextEmbedder:
    return minilm_embedder()


def answer(class_name: str, *proposals: Proposal | str, against: str | None = None) -> Answer:
    rows = [Proposal(p, f"See {p}.") if isinstance(p, str) else p for p in proposals]
    return Answer(Source(class_name, against), rows)


def merged(*answers: Answer, embed: TextEmbedder | None = None, characters: int = 30) -> list[Merged]:
    return merge(answers, embed, 0.90, characters)


def names(concepts: Sequence[Merged]) -> list[str]:
    return [c.name for c in concepts]


def test_spelling_number_and_order_make_no_new_concept() -> None:
    found = merged(answer("a", "Dark centres", "irregular borders"), answer("b", "border irregularity", "dark center"))
    assert names(found) == ["Dark centres", "border irregularity"]
    assert found[0].synonyms == ()
    assert found[1].synonyms == ("irregular borders",)
    assert [s.line for s in found[0].sources] == [
        "class 'a' (round 1): \"Dark centres\"",
        "class 'b' (round 1): \"dark center\"",
    ]


def test_answers_take_turns_and_pairs_come_after_classes() -> None:
    pair = answer("a", "x1", "p1", against="b")
    found = merged(pair, answer("a", "a1", "a2"), answer("b", "b1", "x1"))
    assert names(found) == ["a1", "b1", "a2", "x1", "p1"]
    assert [s.against for s in found[3].sources] == [None, "b"]


def test_a_negation_joins_its_positive_whichever_comes_first() -> None:
    negative = Proposal("absence of scale", "No scale is seen.", None, ("without scales",), "dry skin")
    for answers in ([answer("a", negative), answer("b", "scales")], [answer("b", "scales"), answer("a", negative)]):
        (found,) = merged(*answers)
        assert (found.name, found.definition) == ("scales", "See scales.")
        assert found.contrast == ""
        assert found.synonyms == ()
        assert {s.words for s in found.sources} == {"absence of scale", "scales"}


def test_a_lone_negation_is_reworded_to_what_is_missing() -> None:
    (found,) = merged(answer("a", Proposal("Absence of lobar consolidation", "No lobe is white.")))
    assert found.name == "lobar consolidation"
    assert found.definition == "Lobar consolidation can be seen."
    assert [s.words for s in found.sources] == ["Absence of lobar consolidation"]


def test_a_shorter_wording_stands_for_one_that_is_too_long() -> None:
    long = "numerous vacuoles in the whole cytoplasm"
    (found,) = merged(answer("a", long), answer("b", Proposal("foam", "d", None, (long,))), characters=30)
    assert found.name == "foam"
    assert found.synonyms == (long,)


def test_what_a_model_calls_a_synonym_is_one() -> None:
    told = Proposal("prominent nucleoli", "d", None, ("conspicuous nucleoli", "no nucleoli", "Prominent nucleolus"))
    (found,) = merged(answer("a", told), answer("b", "conspicuous nucleolus"))
    assert found.name == "prominent nucleoli"
    # Neither a negation nor the name in another number is a synonym.
    assert found.synonyms == ("conspicuous nucleolus",)
    (found,) = merged(answer("b", "conspicuous nucleolus"), answer("a", told))
    assert found.synonyms == ("prominent nucleoli",)


def test_a_synonym_that_names_another_concept_is_left_out() -> None:
    # The name came first, so the model that calls it a synonym of two things cannot take it away.
    told = [Proposal("streaks", "d", None, ("rays",)), Proposal("spokes", "d", None, ("rays",))]
    found = merged(answer("b", "rays"), answer("a", *told))
    assert [(c.name, c.synonyms) for c in found] == [("rays", ("streaks", "spokes"))]
    apart = merged(answer("a", Proposal("ring", "d", "rim", ("band",)), Proposal("band", "d", "rim")))
    assert [(c.name, c.synonyms) for c in apart] == [("ring", ()), ("band", ())]


def test_a_synonym_that_is_the_opposite_is_not_believed() -> None:
    told = Proposal("large nucleus", "d", None, ("small nucleus",))
    found = merged(answer("a", told), answer("b", "small nucleus"))
    assert names(found) == ["large nucleus", "small nucleus"]
    assert found[0].synonyms == ()


def test_the_first_contrast_and_definition_stand() -> None:
    (found,) = merged(
        answer("a", Proposal("halo", "", None, (), "")), answer("b", Proposal("halos", "A ring.", None, (), "a fold"))
    )
    assert (found.definition, found.contrast) == ("A ring.", "a fold")


def in_group(group: str, *values: str) -> list[Proposal]:
    return [Proposal(v, f"See {v}.", group) for v in values]


def test_one_group_under_two_names_is_one_group() -> None:
    found = merged(
        answer("a", *in_group("nucleus shape", "round nucleus")),
        answer("b", *in_group("shape of the nuclei", "lobed nucleus")),
    )
    assert [c.group for c in found] == ["nucleus shape", "nucleus shape"]


def test_a_group_of_one_is_no_group() -> None:
    assert merged(answer("a", *in_group("nucleus shape", "round nucleus"), "halo"))[0].group is None


def test_groups_that_only_share_a_vague_name_stay_apart() -> None:
    # Each answer means the colour of something else: one choice among all four would be wrong.
    nucleus = answer("a", *in_group("colour", "dark nucleus", "pale nucleus"))
    cytoplasm = answer("b", *in_group("color", "blue cytoplasm", "pink cytoplasm"))
    assert [c.group for c in merged(nucleus, cytoplasm)] == ["colour", None, "colour", None]
    shared = answer("b", *in_group("color", "dark nuclei", "violet nucleus"))
    assert [c.group for c in merged(nucleus, shared)] == ["colour", "colour", "colour"]


def test_what_is_missing_is_no_value_of_a_group() -> None:
    # "granules" and "fine granules" hold together; as values of one group they could not.
    found = merged(answer("a", *in_group("kind of granules", "no granules", "fine granules", "coarse granules")))
    assert {c.name: c.group for c in found} == {
        "granules": None,
        "fine granules": "kind of granules",
        "coarse granules": "kind of granules",
    }


def by_angle(degrees: dict[str, float]) -> TextEmbedder:
    def embed(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        angles = np.radians([degrees[t] for t in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    return embed


def test_values_of_one_group_in_one_answer_stay_apart_however_close() -> None:
    embed = by_angle({"beaded rim": 0, "dotted rim": 10, "pearly rim": 12})
    values = in_group("rim look", "beaded rim", "dotted rim")
    assert len(merged(answer("a", *values), embed=embed)) == 2
    # Another answer's word for one of the values is the same value.
    found = merged(answer("a", *values), answer("b", *in_group("rim look", "pearly rim")), embed=embed)
    assert [(c.name, c.synonyms) for c in found] == [("beaded rim", ("pearly rim",)), ("dotted rim", ())]


@pytest.mark.parametrize(("degrees", "n_concepts"), [(25.5, 1), (26.5, 2)])
def test_names_closer_than_the_cosine_are_one(degrees: float, n_concepts: int) -> None:
    # cos 25.5° = 0.9026, cos 26.5° = 0.8949
    embed = by_angle({"veil": 0, "film": degrees})
    assert len(merged(answer("a", "veil"), answer("b", "film"), embed=embed)) == n_concepts


def test_closeness_does_not_pass_on() -> None:
    # Each is close to the next, the last is far from the first.
    embed = by_angle({"veil": 0, "film": 20, "sheet": 40})
    assert names(merged(answer("a", "veil", "film", "sheet"), embed=embed)) == ["veil", "sheet"]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("several small vacuoles", "numerous tiny vacuoles"),
        ("crusted lesion surface", "crusts on the lesion surface"),
        ("peripheral lung opacity", "opacity at the lung periphery"),
        ("scattered red granules", "red granules scattered around"),
        ("granules in the cytoplasm", "cytoplasm with granules"),
    ],
)
def test_minilm_joins_what_the_lexicon_cannot(a: str, b: str, minilm: TextEmbedder) -> None:
    assert len(merged(answer("x", a), answer("y", b))) == 2
    (found,) = merged(answer("x", a), answer("y", b), embed=minilm)
    assert found.synonyms == (b,)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("left lung opacity", "right lung opacity"),
        ("upper lobe opacity", "lower lobe opacity"),
        ("nodule with calcification", "nodule without calcification"),
        ("thick wall", "thin wall"),
        ("lobed nucleus", "non-lobed nucleus"),
        ("pale centre with dark border", "dark centre with pale border"),
    ],
)
def test_minilm_puts_opposites_close_and_they_stay_apart(a: str, b: str, minilm: TextEmbedder) -> None:
    vectors = minilm([a, b])
    assert vectors[0] @ vectors[1] > 0.90, "the embedding tells them apart by itself: another example is needed"
    assert len(merged(answer("x", a), answer("y", b), embed=minilm)) == 2
