"""Tables of trust and evidence, and the page that compares two runs."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from data_contracts.concepts import Concept, Vocabulary
from pipeline.report.compare import RunSide, labels, render_comparison, same_test_images, settings
from pipeline.report.content import ReportContent
from pipeline.report.evidence import EVIDENCE, MAX_ROWS, TRUST, paragraphs, table_view, tables
from pipeline.report.render import render
from tests.pipeline.test_report import EVIL, Page

NOW = datetime(2026, 3, 4, tzinfo=UTC)


def test_a_number_stands_with_its_interval_and_a_missing_column_is_left_out() -> None:
    frame = pd.DataFrame({"concept_id": ["a-b"], "n": [1200], "kappa": [0.5], "kappa_low": [0.41], "kappa_high": [0.6]})
    view = table_view(frame, TRUST["audit"])
    assert [c.title for c in view.columns] == ["Concept", "Cells", "Kappa"]
    assert view.rows == (("a-b", "1\u202f200", "0.50 (0.41 to 0.60)"),)


def test_an_unknown_number_is_a_dash_and_never_a_zero() -> None:
    frame = pd.DataFrame(
        {"concept_id": ["a", "b"], "drop": [0.02, np.nan], "low": [0.0, np.nan], "high": [0.1, np.nan]}
    )
    view = table_view(frame, EVIDENCE["knock_out"])
    assert [row[1] for row in view.rows] == ["+0.020 (+0.000 to +0.100)", "–"]


def test_long_tables_are_cut_and_say_where_the_rest_is() -> None:
    frame = pd.DataFrame({"concept_id": [f"c{i}" for i in range(MAX_ROWS + 3)], "drop": 0.1})
    view = table_view(frame, EVIDENCE["knock_out"])
    assert (len(view.rows), view.n_more, view.file) == (MAX_ROWS, 3, "explanations/knock_out.csv")


def test_concepts_are_called_by_name_and_empty_tables_leave_no_trace() -> None:
    found = {"knock_out": pd.DataFrame({"concept_id": ["a"], "drop": [0.1]}), "subgroups": pd.DataFrame()}
    (view,) = tables(found, EVIDENCE, {"a": "Redness"})
    assert view.rows[0][0] == "Redness"


def test_markdown_becomes_headings_items_and_paragraphs() -> None:
    text = "# Title\n\nOne **bold**\nline.\n\n- first\n- second\n\nLast."
    assert paragraphs(text) == [
        ("heading", "Title"),
        ("paragraph", "One bold line."),
        ("item", "first"),
        ("item", "second"),
        ("paragraph", "Last."),
    ]


def test_the_page_holds_trust_and_evidence_and_escapes_both() -> None:
    content = ReportContent(
        "run",
        NOW,
        evidence={
            "concept_use": pd.DataFrame(
                {"measure": ["knock_out"], "value": [0.4], "low": [0.3], "high": [0.5], "meaning": [EVIL]}
            )
        },
        concept_use_text=f"# Use\n\nMost goes {EVIL} through the concepts.",
    )
    page = Page(render(content))
    assert "Most goes <script>" in page.text
    assert not any(tag == "script" for tag, _ in page.tags)
    assert "knock out" in page.text
    assert "0.400 (0.300 to 0.500)" in page.text
    assert "#evidence" in page.references()


# ---- two runs ----------------------------------------------------------------------------------------------


def side(name: str, present: list[bool | None], *, split: str = "test", **config: object) -> RunSide:
    n = len(present)
    images = pd.DataFrame(
        {
            "image_id": [f"i{k}" for k in range(n)],
            "split": split,
            "label": "ill",
            "rejected": pd.Series([None] * n, dtype="str"),
        }
    )
    rows = pd.DataFrame(
        {"image_id": images["image_id"], "concept_id": "red", "present": pd.array(present, dtype="boolean")}
    )
    return RunSide(
        name,
        {"config": {"train": config}, "steps": {"train": {"seconds": 70, "cost_usd": 0.5}}},
        images,
        Vocabulary.of([Concept("red", "red")]),
        rows,
        {"accuracy": {"mean": 0.8, "sd": 0.01}},
    )


def test_labels_of_two_runs_are_compared_where_both_decide() -> None:
    a, b = [True, True, False, None, False], [True, False, False, True, None]
    (row,) = labels(side("a", a), side("b", b)).to_dict("records")
    assert row["n"] == 3
    assert row["kappa"] == pytest.approx(cohen_kappa_score([1, 1, 0], [1, 0, 0]))
    assert (row["a_undecided"], row["b_undecided"]) == (0.2, 0.2)
    assert row["a_present"] == 0.5


def test_kappa_of_one_answer_only_is_unknown() -> None:
    (row,) = labels(side("a", [True, True]), side("b", [True, True])).to_dict("records")
    assert np.isnan(row["kappa"])


def test_only_settings_that_differ_are_listed() -> None:
    found = settings(side("a", [True], epochs=3, seed=0), side("b", [True], epochs=5, seed=0))
    assert found.to_dict("records") == [{"what": "train.epochs", "a": "3", "b": "5"}]


def test_different_test_images_are_said_before_any_number() -> None:
    assert "same 2 images" in same_test_images(side("a", [True] * 2), side("b", [True] * 2))
    assert "differ" in same_test_images(side("a", [True] * 2), side("b", [True] * 3))
    assert "cannot be compared" in same_test_images(side("a", [True], split="train"), side("b", [True]))


def test_the_comparison_is_one_safe_page() -> None:
    page = Page(render_comparison(side(EVIL, [True, False], epochs=1), side("b", [True, True], epochs=2), NOW))
    assert not any(tag == "script" for tag, _ in page.tags)
    assert "train.epochs" in page.text
    assert "$0.50" in page.text
    assert all(reference.startswith("#") for reference in page.references())
