"""Who falls silent after the tests, and which concepts go."""

from __future__ import annotations

import pandas as pd
import pytest

from annotation.trust.honesty import COLUMNS as HONESTY
from annotation.trust.leaks import class_leak
from annotation.trust.refuse import refused_witnesses, silenced, unwitnessed, without_refused
from data_contracts.errors import DropReason

IMAGES = pd.DataFrame(
    {"image_id": [f"i{i}" for i in range(40)], "label": ["x", "y"] * 20, "split": "train", "rejected": None}
)
FAILED = pd.DataFrame(
    [["noise", "permutation", 40, 0.5, 0.5, 0.0, -0.04, 0.04, True, "fails", 0.0]], columns=list(HONESTY)
)


def ledger(witness: str, model: str, **states: list[str]) -> pd.DataFrame:
    return pd.concat(
        pd.DataFrame(
            {
                "image_id": IMAGES["image_id"][: len(said)],
                "concept_id": concept_id,
                "witness": witness,
                "witness_model": model,
                "state": said,
            }
        )
        for concept_id, said in states.items()
    )


MIXED = ["present", "present", "absent", "absent"] * 10
FROM_CLASS = ["present", "absent"] * 20
ONE = ledger("vlm", "one", noise=MIXED, disguise=FROM_CLASS, fine=MIXED)
TWO = ledger("vlm", "two", disguise=MIXED)
SCORES = pd.DataFrame({"image_id": "i0", "concept_id": ["noise", "disguise", "fine"], "similarity": 0.1})


def refused(judgements: pd.DataFrame, *, fitted: bool = True) -> set[tuple[str, str, str]]:
    table = refused_witnesses(FAILED, class_leak(judgements, IMAGES), judgements, fitted=fitted)
    return set(table[["source", "concept_id", "reason"]].itertuples(index=False, name=None))


def test_where_heads_were_fitted_the_judgements_are_refused_with_them() -> None:
    assert refused(ONE) == {
        ("alignment", "noise", "fails_null_test"),
        ("vlm:one", "noise", "fails_null_test"),
        ("vlm:one", "disguise", "leaks_class"),
        ("alignment", "disguise", "leaks_class"),
    }


def test_a_text_that_is_not_followed_silences_the_aligner_only() -> None:
    assert refused(ONE, fitted=False) == {
        ("alignment", "noise", "fails_null_test"),
        ("vlm:one", "disguise", "leaks_class"),
    }


def test_a_second_model_that_does_not_leak_carries_the_concept() -> None:
    both = pd.concat([ONE, TWO])
    table = refused_witnesses(FAILED, class_leak(both, IMAGES), both, fitted=True)
    assert set(table.loc[table["concept_id"] == "disguise", "source"]) == {"vlm:one"}
    assert unwitnessed(table, both, 40) == {"noise": DropReason.FAILS_NULL_TEST}


def test_what_refused_witnesses_say_is_not_fused() -> None:
    both = pd.concat([ONE, TWO])
    table = refused_witnesses(FAILED, class_leak(both, IMAGES), both, fitted=True)
    judgements, scores = silenced(both, SCORES, table)
    left = judgements[["witness_model", "concept_id"]].drop_duplicates().itertuples(index=False, name=None)
    assert set(left) == {("one", "fine"), ("two", "disguise")}
    assert set(scores["concept_id"]) == {"disguise", "fine"}


@pytest.mark.parametrize(("n_answered", "dropped"), [(7, True), (8, False)])
def test_people_carry_a_concept_once_they_answered_enough(n_answered: int, dropped: bool) -> None:
    judgements = pd.concat([ONE, ledger("expert", "ann", noise=MIXED[:n_answered])])
    table = refused_witnesses(FAILED, class_leak(ONE, IMAGES), judgements, fitted=True)
    assert ("noise" in unwitnessed(table, judgements, 40)) == dropped


def test_dropped_concepts_keep_their_place_and_come_back_when_they_pass() -> None:
    concepts = pd.DataFrame(
        {
            "concept_id": ["a", "b", "c"],
            "status": ["kept", "kept", "dropped"],
            "reason": [None, None, "too_long"],
            "position": pd.array([0, 1, None], "Int64"),
        }
    )
    after = without_refused(concepts, {"a": DropReason.LEAKS_CLASS})
    assert after["status"].tolist() == ["dropped", "kept", "dropped"]
    assert after["reason"].where(after["reason"].notna(), None).tolist() == ["leaks_class", None, "too_long"]
    assert after["position"].equals(concepts["position"])
    again = without_refused(after, {})
    assert again["status"].tolist() == concepts["status"].tolist()
