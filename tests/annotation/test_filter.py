from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from annotation.filter import FilterOptions, drop_unseen, filter_concepts
from annotation.text import minilm_embedder
from data_contracts.concepts import slug
from data_contracts.ports import TextEmbedder
from data_contracts.tables import CONCEPTS, vocabulary_of

LONG = "a name that is far too long for people"


@pytest.fixture(scope="module")
def minilm() -> TextEmbedder:
    return minilm_embedder()


def by_angle(degrees: Mapping[str, float]) -> TextEmbedder:
    """An embedder of these texts into the plane, each at its angle."""

    def embed(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        angles = np.radians([degrees[t] for t in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    return embed


def unrelated(texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """An embedder that finds no two texts alike."""
    return np.eye(len(texts), dtype=np.float32)


def table(*names: str, **columns: Sequence[Any]) -> pd.DataFrame:
    n = len(names)
    rows: dict[str, Any] = {
        "concept_id": [slug(x) for x in names],
        "name": list(names),
        "definition": ["d"] * n,
        "group": [None] * n,
        "proposed_for": [["a"]] * n,
        "origin": ["vlm"] * n,
        "status": ["kept"] * n,
        "reason": [None] * n,
        "nearest": [None] * n,
        "similarity": [None] * n,
        "position": list(range(n)),
    }
    return pd.DataFrame(rows | {k: list(v) for k, v in columns.items()})


def reasons(result: pd.DataFrame) -> list[str | None]:
    return list(result["reason"].where(result["reason"].notna(), None))


def test_each_reason_with_its_neighbour_and_similarity() -> None:
    degrees = {"dotted": 0, "beaded": 20, "dark veil": 95, LONG: 50, "age": 30, "striped": 45, "melanoma": 90}
    result = filter_concepts(table(*list(degrees)[:-1]), ["melanoma"], by_angle(degrees))
    CONCEPTS.to_arrow(result, "test")
    assert reasons(result) == [None, "like_another", "like_a_class", "too_long", "not_visual", None]
    assert list(result["nearest"])[1:5] == ["dotted", "melanoma", "melanoma", "age"]
    for row, apart in ((1, 20), (2, 5), (3, 40)):
        np.testing.assert_allclose(result["similarity"][row], np.cos(np.radians(apart)), atol=1e-6)
    # A word of the lexicon is met or not met: there is no similarity.
    assert np.isnan(result["similarity"][4])
    assert vocabulary_of(result).ids == ("dotted", "striped")


@pytest.mark.parametrize(("degrees", "nearest"), [(30, "dotted"), (70, "melanoma")])
def test_a_long_name_is_told_the_closest_of_concepts_and_classes(degrees: float, nearest: str) -> None:
    embed = by_angle({"dotted": 0, LONG: degrees, "melanoma": 90})
    result = filter_concepts(table("dotted", LONG), ["melanoma"], embed)
    assert (reasons(result)[1], result["nearest"][1]) == ("too_long", nearest)


@pytest.mark.parametrize("n_characters", [30, 31])
def test_the_paper_limit_of_a_name(n_characters: int) -> None:
    result = filter_concepts(table("x" * n_characters), [], unrelated)
    assert (result["status"].iloc[0] == "kept") is (n_characters <= 30)


@pytest.mark.parametrize(("degrees", "dropped"), [(25.5, True), (26.5, False)])
def test_the_paper_threshold_between_concepts(degrees: float, dropped: bool) -> None:
    # cos 25.5° = 0.9026, cos 26.5° = 0.8949; the paper drops above 0.90.
    result = filter_concepts(table("dotted", "beaded"), [], by_angle({"dotted": 0, "beaded": degrees}))
    assert (result["status"].iloc[1] == "dropped") is dropped


@pytest.mark.parametrize(("degrees", "dropped"), [(31.5, True), (32.5, False)])
def test_the_paper_threshold_to_classes(degrees: float, dropped: bool) -> None:
    # cos 31.5° = 0.8526, cos 32.5° = 0.8434; the paper drops above 0.85.
    result = filter_concepts(table("dotted"), ["melanoma"], by_angle({"dotted": degrees, "melanoma": 0}))
    assert (result["status"].iloc[0] == "dropped") is dropped


def test_a_dropped_concept_drops_no_other() -> None:
    embed = by_angle({"dotted": 0, "beaded": 20, "striped": 40})
    result = filter_concepts(table("dotted", "beaded", "striped"), [], embed)
    assert list(result["status"]) == ["kept", "dropped", "kept"]


@pytest.mark.parametrize(
    ("name", "class_name"),
    [("naevi", "Nevus"), ("absence of tumours", "tumor"), ("nevus-like veil", "nevus")],
)
def test_a_class_in_other_words_is_dropped_though_its_text_is_far(name: str, class_name: str) -> None:
    result = filter_concepts(table(name), ["other", class_name], unrelated)
    assert (reasons(result), result["nearest"].iloc[0]) == (["like_a_class"], class_name)
    assert result["similarity"].iloc[0] == 0.0


@pytest.mark.parametrize(("origin", "expected"), [("vlm", "like_a_class"), ("embedded", None), ("user", None)])
def test_words_of_the_embedded_endpoint_meet_a_class_by_chance(origin: str, expected: str | None) -> None:
    result = filter_concepts(table("large lesion", origin=[origin]), ["lesion", "healthy"], unrelated)
    assert reasons(result) == [expected]


def test_the_same_thing_in_other_words_is_dropped_though_its_text_is_far() -> None:
    concepts = table("redness", "halo", "reddish colour", "no halo", origin=["vlm", "vlm", "vlm", "user"])
    result = filter_concepts(concepts, [], unrelated)
    assert reasons(result) == [None, "like_another", "like_another", None]
    assert list(result["nearest"])[1:3] == ["no-halo", "redness"]


@pytest.mark.parametrize(("groups", "expected"), [(["rim", "rim"], None), (["rim", None], "like_another")])
def test_values_of_one_group_do_not_drop_one_another(groups: list[str | None], expected: str | None) -> None:
    concepts = table("dotted", "beaded", group=groups)
    result = filter_concepts(concepts, [], by_angle({"dotted": 0, "beaded": 5}))
    assert reasons(result) == [None, expected]
    assert result["similarity"].iloc[1] == pytest.approx(np.cos(np.radians(5)))


def test_a_wanted_neighbour_hides_no_double() -> None:
    # The closest is another value of the group, the second closest is a double.
    embed = by_angle({"dotted": 0, "striped": 30, "beaded": 20})
    concepts = table("dotted", "striped", "beaded", group=[None, "rim", "rim"])
    result = filter_concepts(concepts, [], embed)
    assert reasons(result) == [None, None, "like_another"]
    assert result["nearest"].iloc[2] == "dotted"


def test_a_value_left_alone_in_its_group_has_none() -> None:
    result = filter_concepts(table("dotted", LONG, group=["rim", "rim"]), [], unrelated)
    assert result["group"].isna().tolist() == [True, False]
    by_a_person = table("dotted", LONG, group=["rim", "rim"], origin=["user", "vlm"])
    assert filter_concepts(by_a_person, [], unrelated)["group"].tolist() == ["rim", "rim"]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("left lung opacity", "right lung opacity"),
        ("upper lobe opacity", "lower lobe opacity"),
        ("thick wall", "thin wall"),
    ],
)
def test_opposites_are_close_in_text_and_both_stay(a: str, b: str, minilm: TextEmbedder) -> None:
    result = filter_concepts(table(a, b), ["covid"], minilm)
    assert result["similarity"].iloc[1] > 0.90
    assert reasons(result) == [None, None]


def test_doubles_that_only_the_text_shows_go(minilm: TextEmbedder) -> None:
    result = filter_concepts(table("granules in the cytoplasm", "cytoplasm with granules"), ["basophil"], minilm)
    assert reasons(result) == [None, "like_another"]


def test_what_a_person_gave_stays_and_others_give_way() -> None:
    concepts = table("dotted", LONG, "patient age", origin=["vlm", "user", "given"])
    embed = by_angle({"dotted": 10, LONG: 0, "patient age": 90, "melanoma": 1})
    result = filter_concepts(concepts, ["melanoma"], embed)
    assert list(result["status"]) == ["dropped", "kept", "kept"]
    assert vocabulary_of(result).ids == (slug(LONG), "patient-age")


def test_what_was_dropped_before_stays_dropped() -> None:
    concepts = table("a", "b", status=["dropped", "kept"], reason=["by_user", None], position=[None, 0])
    assert reasons(filter_concepts(concepts, [], unrelated)) == ["by_user", None]


def test_an_empty_table_passes() -> None:
    assert filter_concepts(table(), ["melanoma"], unrelated).empty


def test_the_input_is_left_alone() -> None:
    concepts = table("dotted", "beaded", LONG, group=[None, "rim", "rim"])
    before = concepts.copy(deep=True)
    filter_concepts(concepts, [], unrelated)
    pd.testing.assert_frame_equal(concepts, before)


def test_unseen_concepts_are_dropped_and_positions_close_up() -> None:
    seen = {"a": 0.5, "b": 0.3, "c": 0.46}
    result = drop_unseen(table("a", "b", "c"), seen, FilterOptions(projection_min_similarity=0.45))
    CONCEPTS.to_arrow(result, "test")
    assert reasons(result) == [None, "not_seen_in_any_image", None]
    assert result["similarity"].iloc[1] == pytest.approx(0.3)
    assert vocabulary_of(result).ids == ("a", "c")


def test_an_unseen_value_leaves_the_group_as_it_was_asked() -> None:
    # What is unseen is still asked for; another group would be another question, and paid for again.
    concepts = table("a", "b", group=["rim", "rim"])
    result = drop_unseen(concepts, {"a": 0.5, "b": 0.1}, FilterOptions(projection_min_similarity=0.45))
    assert reasons(result) == [None, "not_seen_in_any_image"]
    assert result["group"].tolist() == ["rim", "rim"]


def test_without_a_threshold_nothing_is_unseen() -> None:
    concepts = table("a")
    assert drop_unseen(concepts, {"a": -1.0}, FilterOptions()) is concepts
