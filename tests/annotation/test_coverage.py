from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import pytest

from annotation.coverage import coverage, uncovered
from annotation.filter import filter_concepts
from annotation.propose import propose
from annotation.provenance import Source
from annotation.text import minilm_embedder

CLASSES = ["cyst", "mole", "wart"]


def concept(name: str, *sources: Source, **columns: Any) -> dict[str, Any]:
    return {
        "concept_id": name,
        "name": name,
        "proposed_for": list(dict.fromkeys(s.class_name for s in sources)),
        "status": "kept",
        "reason": None,
        "provenance": [s.line for s in sources] or None,
    } | columns


def table(*rows: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(rows).assign(position=range(len(rows)))


def of(class_name: str, words: str = "x") -> Source:
    return Source(class_name, None, 1, words)


def telling(concepts: pd.DataFrame, class_names: Sequence[str] = CLASSES) -> dict[str, list[str]]:
    found = coverage(concepts, class_names)
    assert (found["n_distinguishing"] == found["concept_ids"].map(len)).all()
    return {f"{r.class_a}-{r.class_b}": r.concept_ids for r in found.itertuples()}


def test_a_concept_tells_its_class_from_the_others() -> None:
    found = telling(table(concept("dome", of("cyst")), concept("brown", of("cyst"), of("mole"))))
    assert found == {"cyst-mole": ["dome"], "cyst-wart": ["dome", "brown"], "mole-wart": ["brown"]}


def test_what_a_pair_was_asked_about_tells_that_pair_whatever_else_is_said() -> None:
    rough = concept("rough", of("wart"), of("mole"), Source("wart", "mole", 1, "rough"))
    assert telling(table(rough)) == {"cyst-mole": ["rough"], "cyst-wart": ["rough"], "mole-wart": ["rough"]}


def test_absence_in_one_class_and_presence_in_the_other_tell_apart() -> None:
    hair = concept("hair", of("mole", "dark hair"), of("wart", "absence of hair"))
    assert telling(table(hair))["mole-wart"] == ["hair"]
    # Both for one class say nothing about it.
    torn = concept("hair", of("mole", "dark hair"), of("mole", "no hair"))
    assert telling(table(torn)) == {"cyst-mole": [], "cyst-wart": [], "mole-wart": []}


def test_only_kept_concepts_count_in_their_order() -> None:
    concepts = table(
        concept("second", of("cyst")), concept("gone", of("cyst"), status="dropped"), concept("first", of("cyst"))
    ).assign(position=pd.array([1, None, 0], dtype="Int64"))
    assert telling(concepts)["cyst-mole"] == ["first", "second"]


def test_without_provenance_the_classes_it_was_proposed_for_count() -> None:
    concepts = table(concept("dome", proposed_for=["cyst"])).drop(columns="provenance")
    assert telling(concepts)["cyst-mole"] == ["dome"]


def test_a_class_and_a_pair_without_concepts_are_said_with_what_to_do() -> None:
    concepts = table(
        concept("round", of("mole"), of("wart")),
        concept("like a cyst", of("cyst"), status="dropped", reason="like_a_class"),
        concept("stalk", of("wart"), status="dropped", reason="too_long"),
    )
    about_cyst, about_pair = uncovered(concepts, CLASSES)
    assert about_cyst.startswith("Class 'cyst': no kept concept")
    assert "like a cyst (like_a_class)" in about_cyst
    assert about_pair.startswith("Classes 'mole' and 'wart': no kept concept")
    assert "stalk" in about_pair
    for sentence in (about_cyst, about_pair):
        assert "--concepts FILE" in sentence
        assert "concepts.proposed_per_class" in sentence


def test_many_pairs_are_one_sentence() -> None:
    names = [f"c{i}" for i in range(6)]
    found = uncovered(table(concept("all alike", *(of(name) for name in names))), names)
    assert len(found) == 1
    assert found[0].startswith("15 pairs of classes")
    assert "and 10 more" in found[0]


@pytest.mark.parametrize("class_names", [[], ["cyst"], CLASSES])
def test_nothing_is_said_where_nobody_said_what_concepts_are_for(class_names: list[str]) -> None:
    given = table(concept("dome"), concept("brown"))
    assert uncovered(given, class_names) == []
    assert len(coverage(given, class_names)) == len(class_names) * (len(class_names) - 1) // 2


async def test_what_the_embedded_endpoint_proposes_covers_its_classes(read: Any, make_embedded: Any) -> None:
    samples = {"a": [f"large-{i}" for i in range(6)], "b": [f"small-{i}" for i in range(6)]}
    async with make_embedded() as client:
        proposed = await propose(samples, read, client, "skin", embed=minilm_embedder())
    kept = filter_concepts(proposed, list(samples), minilm_embedder())
    (row,) = coverage(kept, list(samples)).itertuples()
    assert row.n_distinguishing == len(row.concept_ids) > 0
    sentences = uncovered(kept, list(samples))
    assert not any("tells them apart" in s for s in sentences)
