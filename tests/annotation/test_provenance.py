from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotation.provenance import Source, sources_of


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (Source("melanoma", None, 1, "irregular borders"), "class 'melanoma' (round 1): \"irregular borders\""),
        (Source("melanoma", "nevus", 1, "uneven outline"), "'melanoma' against 'nevus': \"uneven outline\""),
        (Source(None, None, 2, "haze"), 'all images (round 2): "haze"'),
    ],
)
def test_people_read_where_a_concept_came_from(source: Source, line: str) -> None:
    assert source.line == line


awkward = st.text(alphabet=st.one_of(st.sampled_from("'\"\\:()\n"), st.characters(codec="utf-8")), max_size=12)


@given(st.none() | awkward, st.none() | awkward, st.integers(1, 9), awkward)
def test_every_line_is_read_back(name: str | None, against: str | None, round_number: int, words: str) -> None:
    is_pair = name is not None and against is not None
    source = Source(name, against if is_pair else None, 1 if is_pair else round_number, words)
    assert sources_of([source.line]) == [source]


@pytest.mark.parametrize("cell", [None, math.nan, [], ["a person said so"], "class 'a' (round 1): \"x\""])
def test_other_cells_have_no_sources(cell: object) -> None:
    assert sources_of(cell) == []
