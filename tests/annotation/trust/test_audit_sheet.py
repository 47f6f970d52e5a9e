"""What people and spreadsheets do to an audit sheet."""

from __future__ import annotations

from datetime import UTC, datetime

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annotation.trust.audit_sheet import ANSWERS, answer_of, check_sheet
from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import ContractViolation
from data_contracts.tables import JUDGEMENTS

VOCABULARY = Vocabulary.of([Concept("round", "round", "The border is round."), Concept("red", "red", "It is “red”.")])
IDS = [f"{i:x}" * 64 for i in range(1, 9)]
IMAGES = pd.DataFrame({"image_id": IDS, "path": [f"a/{i}.png" for i in range(8)]})
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def sheet(n: int = 4, **changes: list[str]) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "image_id": IDS[:n],
            "path": IMAGES["path"][:n],
            "concept_id": "round",
            "concept": "round",
            "definition": "The border is round.",
            "answer": "present",
        },
        dtype="str",
    )
    return frame.assign(**{name: pd.Series(values, dtype="str") for name, values in changes.items()})


@pytest.mark.parametrize("text", ["TRUE", "WAHR", "VRAI", "VERDADERO", "1,0", "1.0", " Present ", "X", "1\xa0"])
def test_what_spreadsheets_make_of_one_is_present(text: str) -> None:
    assert answer_of(text) == "present"


@pytest.mark.parametrize("text", ["FALSE", "FALSCH", "FAUX", "FALSO", "0,0", "0", "No"])
def test_what_spreadsheets_make_of_zero_is_absent(text: str) -> None:
    assert answer_of(text) == "absent"


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("answer", "1-Jan", "date"),
        ("answer", "01.01.2026", "date"),
        ("answer", "Jan-01", "date"),
        ("answer", "maybe", "expected present"),
        ("image_id", "3.2E+45", "shortened"),
        ("image_id", "3,2E+45", "shortened"),
        ("image_id", "nobody", "not in this run"),
        ("path", "a/5.png", "another image"),
        ("concept_id", "rond", "did you mean 'round'"),
        ("concept_id", "2-Jan", "date"),
        ("concept", "oval", "was asked as 'oval'"),
        ("definition", "The border is jagged.", "was asked as"),
    ],
)
def test_a_fault_names_row_and_column_and_what_happened(column: str, value: str, told: str) -> None:
    good = sheet()
    cells = good.assign(**{column: [*good[column][:2], value, good[column][3]]})
    reading = check_sheet(cells, IMAGES, VOCABULARY)
    assert [(fault.row, fault.column) for fault in reading.faults] == [(4, column)]
    assert told in str(reading.faults[0])
    assert reading.answers["row"].tolist() == [2, 3, 5]
    assert reading.rejected["row"].tolist() == [4]
    assert reading.rejected[column].tolist() == [value]
    with pytest.raises(ContractViolation, match=f"row 4, column '{column}'"):
        reading.require()


def test_what_an_encoding_does_to_quotes_is_no_change_of_the_concept() -> None:
    cells = sheet(2, concept_id=["red", "red"], concept=["red", "Red"], definition=["It is ?red?.", 'It is "red".'])
    assert check_sheet(cells, IMAGES, VOCABULARY).faults == ()


def test_conflicting_rows_are_both_at_fault_and_repeated_ones_count_once() -> None:
    cells = pd.concat([sheet(3), sheet(1), sheet(2, answer=["", "0"])], ignore_index=True)
    reading = check_sheet(cells, IMAGES, VOCABULARY)
    assert [fault.row for fault in reading.faults] == [3, 7]
    assert "rows 3, 7" in str(reading.faults[0])
    assert reading.answers["row"].tolist() == [2, 4]
    assert reading.n_empty == 1


def test_cells_that_were_not_drawn_are_refused() -> None:
    drawn = pd.DataFrame({"image_id": IDS[:1], "concept_id": ["round"]})
    reading = check_sheet(sheet(2), IMAGES, VOCABULARY, drawn=drawn)
    assert [(fault.row, fault.column) for fault in reading.faults] == [(3, "concept_id")]
    assert "not drawn" in str(reading.faults[0])


def test_extra_columns_are_ignored_and_missing_ones_named_together() -> None:
    assert check_sheet(sheet().assign(comment="?"), IMAGES, VOCABULARY).faults == ()
    with pytest.raises(ContractViolation) as caught:
        check_sheet(sheet().drop(columns=["answer", "concept_id"]), IMAGES, VOCABULARY)
    assert len(caught.value.faults) == 2


def test_row_numbers_of_the_file_are_told() -> None:
    reading = check_sheet(sheet(2, answer=["1", "maybe"]), IMAGES, VOCABULARY, row_numbers=[3, 9])
    assert reading.faults[0].row == 9


_TEXT = st.sampled_from(["present", "0", "1,0", "", "maybe", "1-Jan", "?", " WAHR", "skip"]) | st.text(max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*IDS[:3], "nobody", ""]), st.sampled_from(["round", "red", ""]), _TEXT)))
def test_every_answered_row_is_taken_or_told_of(rows: list[tuple[str, str, str]]) -> None:
    cells = pd.DataFrame(rows, columns=["image_id", "concept_id", "answer"], dtype="str")
    reading = check_sheet(cells, IMAGES, VOCABULARY)
    told = {fault.row for fault in reading.faults}
    taken = {(a.image_id, a.concept_id): a.state for a in reading.answers.itertuples()}
    assert len(taken) == len(reading.answers)
    assert set(reading.rejected["row"]) == told
    for number, (image_id, concept_id, text) in enumerate(rows, 2):
        is_known = image_id in IDS and concept_id in VOCABULARY
        assert number in told or is_known
        if answer_of(text) and number not in told:
            assert taken[image_id, concept_id] == answer_of(text)
        if text.strip() and answer_of(text) is None and text.replace("\xa0", " ").strip():
            assert number in told
    if taken:
        JUDGEMENTS.to_arrow(reading.judgements("dr", NOW), "judgements")


@given(st.sampled_from(sorted(ANSWERS)), st.sampled_from([str.upper, str.title, str.lower]))
def test_answers_are_read_in_any_case(text: str, change: object) -> None:
    assert answer_of(change(text)) == ANSWERS[text]  # type: ignore[operator]
