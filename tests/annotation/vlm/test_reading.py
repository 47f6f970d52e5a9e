from __future__ import annotations

import math

import pytest

from annotation.vlm.reading import reading_of


@pytest.mark.parametrize(
    ("name", "quantity", "negated"),
    [
        ("erythema", "red_share_percent", False),
        ("irregular borders", "outline_gap_percent", False),
        ("ground-glass opacity", "field_haze_percent", False),
        ("absence of lobar consolidation", "field_white_percent", True),
        ("no red colour", "red_share_percent", True),
        ("Bilateral involvement", "field_both_sides_percent", False),
    ],
)
def test_words_of_others_are_understood(name: str, quantity: str, negated: bool) -> None:
    reading = reading_of(name, "Some definition that states no measured cut.")
    assert reading is not None
    assert (reading.attribute.quantity, reading.negated) == (quantity, negated)


@pytest.mark.parametrize("name", ["Auer rods", "redundant folds", "patient is tired", "north"])
def test_unknown_words_are_not_guessed(name: str) -> None:
    assert reading_of(name, "") is None


def test_probability_is_even_at_the_cut_and_grows_with_the_distance() -> None:
    reading = reading_of("large lesion", "The lesion covers more than 20.0 % of the image.")
    assert reading is not None
    below, at, above = (reading.probability({"area_percent": v}) for v in (10.0, 20.0, 30.0))
    assert below is not None
    assert above is not None
    assert at == 0.5
    assert below < 0.05
    assert above == pytest.approx(1 - below)
    assert reading.probability({}) is None
    assert reading.probability({"area_percent": math.nan}) is None


def test_negation_turns_the_probability_round() -> None:
    positive, negative = reading_of("red", ""), reading_of("no red", "")
    assert positive is not None
    assert negative is not None
    measured = {"red_share_percent": 80.0}
    assert negative.probability(measured) == pytest.approx(1 - (positive.probability(measured) or 0))


def test_evidence_states_the_number() -> None:
    reading = reading_of("x", "The lesion covers more than 20.0 % of the image.")
    assert reading is not None
    assert reading.evidence({"area_percent": 31.26}) == "covers 31.3 % of the image"
