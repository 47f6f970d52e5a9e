from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from annotation.filter import FilterOptions, drop_unseen, filter_concepts
from data_contracts.concepts import slug
from data_contracts.tables import CONCEPTS, vocabulary_of


def embed(texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Unit vectors with angles by hand: a text `x @30` lies at 30 degrees."""
    degrees = [float(t.split("@")[1]) for t in texts]
    return np.array([[np.cos(np.radians(d)), np.sin(np.radians(d))] for d in degrees], np.float32)


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


def test_each_reason_with_its_neighbour_and_similarity() -> None:
    concepts = table(
        "round @0", "rounder @20", "melanoma-like @95", "a name that is far too long for people @50", "far @45"
    )
    result = filter_concepts(concepts, ["melanoma @90"], embed)
    CONCEPTS.to_arrow(result, "test")
    assert list(result["reason"].where(result["reason"].notna(), None)) == [
        None,
        "like_another",
        "like_a_class",
        "too_long",
        None,
    ]
    assert list(result["nearest"])[1:3] == ["round-0", "melanoma @90"]
    np.testing.assert_allclose(result["similarity"][1], np.cos(np.radians(20)), atol=1e-6)
    np.testing.assert_allclose(result["similarity"][2], np.cos(np.radians(5)), atol=1e-6)
    assert vocabulary_of(result).ids == ("round-0", "far-45")


@pytest.mark.parametrize(("degrees", "dropped"), [(25.5, True), (26.5, False)])
def test_the_paper_threshold_between_concepts(degrees: float, dropped: bool) -> None:
    # cos 25.5° = 0.9026, cos 26.5° = 0.8949; the paper drops above 0.90.
    result = filter_concepts(table("a @0", f"b @{degrees}"), [], embed)
    assert (result["status"].iloc[1] == "dropped") is dropped


@pytest.mark.parametrize(("degrees", "dropped"), [(31.5, True), (32.5, False)])
def test_the_paper_threshold_to_classes(degrees: float, dropped: bool) -> None:
    # cos 31.5° = 0.8526, cos 32.5° = 0.8434; the paper drops above 0.85.
    result = filter_concepts(table(f"b @{degrees}"), ["class @0"], embed)
    assert (result["status"].iloc[0] == "dropped") is dropped


def test_a_dropped_concept_drops_no_other() -> None:
    result = filter_concepts(table("a @0", "b @20", "c @40"), [], embed)
    assert list(result["status"]) == ["kept", "dropped", "kept"]


def test_what_a_person_gave_stays_and_others_give_way() -> None:
    name = "a name that is far too long for people @0"
    concepts = table("proposed @10", name, origin=["vlm", "user"])
    result = filter_concepts(concepts, ["class @1"], embed)
    assert list(result["status"]) == ["dropped", "kept"]
    assert vocabulary_of(result).ids == (slug(name),)


def test_what_was_dropped_before_stays_dropped() -> None:
    concepts = table("a @0", "b @60", status=["dropped", "kept"], reason=["by_user", None], position=[None, 0])
    result = filter_concepts(concepts, [], embed)
    assert list(result["reason"].where(result["reason"].notna(), None)) == ["by_user", None]


def test_an_empty_table_passes() -> None:
    assert filter_concepts(table(), ["class @0"], embed).empty


def test_the_input_is_left_alone() -> None:
    concepts = table("a @0", "b @5")
    before = concepts.copy(deep=True)
    filter_concepts(concepts, [], embed)
    pd.testing.assert_frame_equal(concepts, before)


def test_unseen_concepts_are_dropped_and_positions_close_up() -> None:
    concepts = filter_concepts(table("a @0", "b @60", "c @120"), [], embed)
    seen = {"a-0": 0.5, "b-60": 0.3, "c-120": 0.46}
    result = drop_unseen(concepts, seen, FilterOptions(projection_min_similarity=0.45))
    CONCEPTS.to_arrow(result, "test")
    assert list(result["reason"].where(result["reason"].notna(), None)) == [None, "not_seen_in_any_image", None]
    assert result["similarity"].iloc[1] == pytest.approx(0.3)
    assert vocabulary_of(result).ids == ("a-0", "c-120")


def test_without_a_threshold_nothing_is_unseen() -> None:
    concepts = table("a @0")
    assert drop_unseen(concepts, {"a-0": -1.0}, FilterOptions()) is concepts
