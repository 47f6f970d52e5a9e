from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from annotation.trust.audit_sheet import AUDIT_EVIDENCE
from annotation.trust.expert_cells import CELL_COLUMNS, expert_cells
from data_contracts.concepts import Concept, Vocabulary

VOCABULARY = Vocabulary.of([Concept("a", "a"), Concept("b", "b")])


def answer(image: str, concept: str, state: str, *, who: str = "dr", evidence: str | None = None) -> dict[str, object]:
    return {
        "image_id": image,
        "concept_id": concept,
        "witness": "expert",
        "witness_model": who,
        "state": state,
        "probability": np.nan,
        "evidence": evidence,
    }


def drawn(image: str, concept: str, probability: float) -> dict[str, object]:
    return {
        "image_id": image,
        "concept_id": concept,
        "round": 1,
        "stratum": "s",
        "inclusion_probability": probability,
    }


def test_drawn_cells_are_weighted_by_what_they_stand_for_and_corrections_do_not_count_beside_them() -> None:
    ledger = pd.DataFrame(
        [
            answer("i", "a", "present", evidence=AUDIT_EVIDENCE),
            answer("j", "a", "absent", evidence=AUDIT_EVIDENCE),
            answer("k", "a", "present"),
            answer("k", "b", "present"),
        ]
    )
    design = pd.DataFrame([drawn("i", "a", 0.5), drawn("j", "a", 0.1), drawn("l", "a", 0.1)])
    cells = expert_cells(ledger, design, VOCABULARY)
    assert list(cells) == CELL_COLUMNS
    assert list(zip(cells["image_id"], cells["concept_id"], strict=True)) == [("i", "a"), ("j", "a"), ("k", "b")]
    assert cells["true"].tolist() == [1, 0, 1]
    weight = cells["weight"].to_numpy()
    assert weight[1] / weight[0] == pytest.approx(5)
    assert weight[:2].sum() == pytest.approx((2 + 10) ** 2 / (2**2 + 10**2))
    assert weight[2] == 1
    assert cells["drawn"].tolist() == [True, True, False]


def test_experts_who_differ_or_cannot_tell_settle_nothing() -> None:
    ledger = pd.DataFrame(
        [
            answer("i", "a", "present"),
            answer("i", "a", "absent", who="other"),
            answer("j", "a", "uncertain"),
            answer("k", "a", "absent"),
            answer("k", "a", "present"),
        ]
    )
    cells = expert_cells(ledger, None, VOCABULARY)
    assert cells[["image_id", "true"]].to_numpy().tolist() == [["k", 1.0]]


def test_images_of_one_patient_are_in_one_fold_and_folds_do_not_hang_on_the_others() -> None:
    ledger = pd.DataFrame([answer(f"i{n}", "a", "present") for n in range(60)])
    groups = {f"i{n}": f"patient {n // 3}" for n in range(60)}
    cells = expert_cells(ledger, None, VOCABULARY, groups=groups)
    by_patient = cells.groupby(cells["image_id"].map(groups))["fold"].nunique()
    assert set(by_patient) == {1}
    assert cells["fold"].nunique() == 5
    fewer = expert_cells(ledger.head(20), None, VOCABULARY, groups=groups)
    assert fewer["fold"].tolist() == cells["fold"].head(20).tolist()


def test_nobody_answered() -> None:
    empty = pd.DataFrame([answer("i", "a", "present")]).iloc[:0]
    assert expert_cells(empty, None, VOCABULARY).empty
    assert expert_cells(empty, pd.DataFrame([drawn("i", "a", 0.5)]), VOCABULARY).empty
