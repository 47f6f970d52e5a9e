from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_contracts.errors import ContractViolation
from data_contracts.tables import (
    ALIGNMENT,
    CONCEPTS,
    IMAGES,
    JUDGEMENTS,
    LABELS,
    Contract,
    State,
    dataset_contract,
    to_pandas,
    vocabulary_of,
)


def judgement(**changes: object) -> pd.DataFrame:
    row: dict[str, object] = {
        "image_id": "i1",
        "concept_id": "c1",
        "witness": "vlm",
        "witness_model": "m",
        "state": "present",
        "probability": 0.9,
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
    }
    return pd.DataFrame([row | changes])


@pytest.mark.parametrize("contract", [IMAGES, CONCEPTS, JUDGEMENTS, ALIGNMENT, LABELS])
def test_an_empty_frame_keeps_its_contract(contract: Contract) -> None:
    table = contract.to_arrow(contract.empty(), "nowhere")
    contract.check(table, "nowhere")
    assert table.column_names == contract.column_names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": "maybe"}, "expected one of .*got 'maybe'"),
        ({"probability": 1.5}, r"numbers in \[0.0, 1.0\]"),
        ({"probability": -0.1}, r"numbers in \[0.0, 1.0\]"),
        ({"image_id": None}, "1 are null"),
        ({"witness": "oracle"}, "got 'oracle'"),
        ({"created_at": "yesterday"}, "created_at"),
    ],
)
def test_a_broken_judgement_is_refused_with_its_column(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ContractViolation, match=message):
        JUDGEMENTS.to_arrow(judgement(**changes), "ledger")


def test_every_fault_is_collected_in_one_pass() -> None:
    with pytest.raises(ContractViolation) as caught:
        JUDGEMENTS.to_arrow(judgement(state="maybe", witness="oracle"), "ledger")
    assert len(caught.value.faults) == 2


def test_duplicate_keys_are_refused() -> None:
    row = {
        "image_id": "a",
        "concept_id": "c",
        "present": True,
        "probability": 0.9,
        "decided_by": "vlm",
        "disagreement": 0,
    }
    with pytest.raises(ContractViolation, match="expected unique rows"):
        LABELS.to_arrow(pd.DataFrame([row, row]), "labels")


def test_a_nan_score_is_null_or_refused_but_never_a_number() -> None:
    table = JUDGEMENTS.to_arrow(judgement(probability=np.nan), "ledger")
    assert table.column("probability").null_count == 1


def test_a_table_of_another_version_is_refused() -> None:
    table = LABELS.to_arrow(LABELS.empty(), "x").replace_schema_metadata({b"contract": b"labels/99"})
    with pytest.raises(ContractViolation, match="expected labels/1, found labels/99"):
        LABELS.check(table, "labels.parquet")


def test_a_wrong_type_is_refused_on_reading() -> None:
    table = LABELS.to_arrow(LABELS.empty(), "x")
    position = table.column_names.index("probability")
    wrong = table.set_column(position, "probability", pa.array([], pa.string()))
    with pytest.raises(ContractViolation, match="'probability': expected double, found string"):
        LABELS.check(wrong, "labels.parquet")


def test_extra_columns_pass_through() -> None:
    table = JUDGEMENTS.to_arrow(judgement(note="x"), "ledger")
    assert table.column("note").to_pylist() == ["x"]


def test_nullable_booleans_stay_nullable() -> None:
    frame = pd.DataFrame(
        {
            "image_id": ["a", "b", "c"],
            "concept_id": ["x"] * 3,
            "present": pd.array([True, None, False], dtype="boolean"),
            "probability": [0.9, 0.5, 0.1],
            "decided_by": ["vlm"] * 3,
            "disagreement": [0.0] * 3,
        }
    )
    back = to_pandas(LABELS.to_arrow(frame, "labels"))
    assert back["present"].dtype == pd.BooleanDtype()
    assert back["present"].isna().tolist() == [False, True, False]


def test_the_dataset_contract_fixes_the_number_of_concepts() -> None:
    columns = {
        "image_id": pa.array(["a"]),
        "path": pa.array(["p"]),
        "label": pa.array(["l"]),
        "split": pa.array(["train"]),
        "concepts": pa.array([[0.1, 0.2]], pa.list_(pa.float32(), 2)),
        "mask": pa.array([[True, False]], pa.list_(pa.bool_(), 2)),
    }
    dataset_contract(2).to_arrow(pa.table(columns), "dataset")
    with pytest.raises(ContractViolation, match="concepts"):
        dataset_contract(3).to_arrow(pa.table(columns), "dataset")


def test_vocabulary_follows_position_and_leaves_dropped_concepts_out() -> None:
    frame = pd.DataFrame(
        {
            "concept_id": ["a", "b", "c"],
            "name": ["A", "B", "C"],
            "definition": [""] * 3,
            "group": [None, "g", None],
            "proposed_for": [[], [], []],
            "origin": ["vlm"] * 3,
            "status": ["kept", "kept", "dropped"],
            "position": [1, 0, None],
        }
    )
    vocabulary = vocabulary_of(to_pandas(CONCEPTS.to_arrow(frame, "concepts")))
    assert vocabulary.ids == ("b", "a")
    assert [c.group for c in vocabulary] == ["g", None]


states = st.sampled_from([str(state) for state in State])
rows = st.tuples(st.text(min_size=1, max_size=8), states, st.one_of(st.none(), st.floats(0, 1)))


@given(st.lists(rows, max_size=10))
def test_judgements_survive_the_trip_through_arrow(values: list[tuple[str, str, float | None]]) -> None:
    frames = [judgement(image_id=i, state=s, probability=p) for i, s, p in values]
    frame = pd.concat(frames, ignore_index=True) if frames else JUDGEMENTS.empty()
    back = to_pandas(JUDGEMENTS.to_arrow(frame, "ledger"))
    assert back["state"].tolist() == [s for _, s, _ in values]
    assert [None if pd.isna(p) else p for p in back["probability"]] == [p for _, _, p in values]
