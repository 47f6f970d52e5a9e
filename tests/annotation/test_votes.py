from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from annotation.votes import (
    UNCERTAIN_WEIGHT,
    alignment_scores,
    combined,
    latest,
    matrix,
    score_matrix,
    training_votes,
    votes_by_witness,
    votes_of,
)
from data_contracts.concepts import Concept, Vocabulary

VOCABULARY = Vocabulary.of([Concept("a", "a"), Concept("b", "b")])


def ledger(*rows: tuple[str, str, str, str, str, float | None]) -> pd.DataFrame:
    columns = ["image_id", "concept_id", "witness", "witness_model", "state", "probability"]
    return pd.DataFrame(rows, columns=columns).astype({"probability": "float64"})


def test_states_become_evidence_and_never_collapse() -> None:
    rows = ledger(
        ("i1", "a", "vlm", "m", "present", None),
        ("i2", "a", "vlm", "m", "absent", None),
        ("i3", "a", "vlm", "m", "uncertain", None),
        ("i4", "a", "vlm", "m", "not_assessed", None),
        ("i5", "a", "vlm", "m", "uncertain", 0.75),
    )
    votes = votes_of(rows, ["i1", "i2", "i3", "i4", "i5", "i6"], VOCABULARY)
    np.testing.assert_allclose(votes.value[:, 0], [1, 0, 0.5, 0.5, 0.75, 0.5])
    np.testing.assert_allclose(votes.weight[:, 0], [1, 1, 0, 0, UNCERTAIN_WEIGHT / 2, 0])
    assert not votes.weight[:, 1].any()


@pytest.mark.parametrize(
    ("state", "stated", "value"),
    [("present", 0.8, 0.8), ("present", 0.1, 0.5), ("absent", 0.1, 0.1), ("absent", 0.9, 0.5)],
)
def test_a_stated_probability_is_kept_on_its_states_side(state: str, stated: float, value: float) -> None:
    votes = votes_of(ledger(("i", "b", "vlm", "m", state, stated)), ["i"], VOCABULARY)
    assert votes.value[0, 1] == pytest.approx(value)


def test_the_last_answer_of_each_witness_and_model_stands() -> None:
    rows = ledger(
        ("i", "a", "vlm", "one", "present", None),
        ("i", "a", "vlm", "two", "present", None),
        ("i", "a", "vlm", "one", "absent", None),
    )
    assert latest(rows)[["witness_model", "state"]].to_numpy().tolist() == [["two", "present"], ["one", "absent"]]
    by_witness = votes_by_witness(rows, ["i"], VOCABULARY)
    assert {name: votes.value[0, 0] for name, votes in by_witness.items()} == {("vlm", "two"): 1, ("vlm", "one"): 0}


def test_experts_come_before_given_labels_before_machines_in_training() -> None:
    rows = ledger(
        ("i1", "a", "expert", "e", "absent", None),
        ("i1", "a", "given", "csv", "present", None),
        ("i2", "a", "given", "csv", "absent", None),
        ("i2", "a", "vlm", "m", "present", None),
        ("i3", "a", "vlm", "m", "present", None),
        ("i3", "a", "vlm", "n", "absent", None),
        ("i4", "a", "alignment", "x", "present", None),
    )
    votes = training_votes(rows, ["i1", "i2", "i3", "i4"], VOCABULARY)
    np.testing.assert_allclose(votes.value[:, 0], [0, 0, 0.5, 0.5])
    np.testing.assert_allclose(votes.weight[:, 0], [1, 1, 1, 0])


def test_combining_weighs_by_decision() -> None:
    rows = ledger(("i", "a", "vlm", "m", "present", None), ("i", "a", "vlm", "n", "uncertain", 0.1))
    mixed = combined(list(votes_by_witness(rows, ["i"], VOCABULARY).values()))
    weak = UNCERTAIN_WEIGHT * 0.8
    assert mixed.value[0, 0] == pytest.approx((1 + 0.1 * weak) / (1 + weak))
    assert mixed.weight[0, 0] == 1


def test_matrix_leaves_gaps_where_the_table_has_none() -> None:
    frame = pd.DataFrame({"image_id": ["y", "x", "z"], "concept_id": ["a", "b", "a"], "p": [0.1, 0.2, 0.3]})
    np.testing.assert_allclose(matrix(frame, "p", ["x", "y"], VOCABULARY), [[np.nan, 0.2], [0.1, np.nan]], rtol=1e-6)


def test_scores_are_log_odds_where_fitted_and_similarity_elsewhere() -> None:
    table = pa.table(
        {
            "image_id": ["x", "x"],
            "concept_id": ["a", "b"],
            "similarity": [0.3, 0.4],
            "probability": pa.array([0.5, None], pa.float64()),
            "heatmap": [[1.0], [2.0]],
        }
    )
    np.testing.assert_allclose(score_matrix(alignment_scores(table), ["x"], VOCABULARY), [[0.0, 0.4]], atol=1e-6)
    assert len(alignment_scores(None)) == 0
