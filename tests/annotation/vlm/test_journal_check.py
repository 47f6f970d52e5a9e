"""A journal is looked at record by record: what is damaged, what was paid for twice, what the ledger lacks."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from annotation.vlm.journal import Journal, Record
from annotation.vlm.journal_check import (
    LEDGER_COLUMNS,
    check_journal,
    check_ledger,
    fault_of,
    statistics,
)
from annotation.vlm.schema import FaultCode, Usage
from data_contracts.tables import JUDGEMENTS

ANSWER = json.dumps({"concept": {"state": "present"}})


def sha256(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def record(n: int = 0, **changes: Any) -> Record:
    """The `n`-th record: an answer to two cells."""
    usual: dict[str, Any] = {
        "key": sha256("key", n),
        "cells": (sha256(n, "a"), sha256(n, "b")),
        "prompt_sha256": sha256("prompt"),
        "model": "model",
        "text": ANSWER,
        "refusal": None,
        "finish_reason": "stop",
        "request_id": f"answer-{n}",
        "input_tokens": 100,
        "output_tokens": 10,
        "created_at": f"2026-11-24T10:{n // 60:02d}:{n % 60:02d}.000007+00:00",
        "seconds": 1.0,
        "cost_usd": 0.25,
    }
    return Record(**(usual | changes))


@pytest.fixture
def journal_of(tmp_path: Path) -> Callable[..., Journal]:
    """A journal on the disk with these records, in one segment."""

    def make(*records: Record) -> Journal:
        with Journal(tmp_path / "journal") as journal:
            for one in records:
                journal.put(one)
        return Journal(tmp_path / "journal")

    return make


def ledger_part(*rows: dict[str, Any]) -> pa.Table:
    usual = {
        "image_id": "image",
        "concept_id": "concept",
        "witness": "vlm",
        "witness_model": "model",
        "state": "present",
        "request_id": "answer-0",
        "created_at": pd.Timestamp("2026-11-24T10:00:00.000007+00:00"),
    }
    frame = pd.DataFrame([usual | row for row in rows])
    return JUDGEMENTS.to_arrow(frame, "test").select(list(LEDGER_COLUMNS))


def test_a_whole_journal_has_nothing_to_tell_but_its_size(journal_of: Callable[..., Journal]) -> None:
    found = check_journal(journal_of(record(0), record(1), record(2, cells=())))
    assert (found.n_segments, found.n_records, found.n_requests, found.n_cells) == (1, 3, 3, 4)
    assert (found.damaged, found.torn_ends, found.n_cells_again) == ((), (), 0)
    assert (found.asked_again.n_requests, found.asked_again.cost_usd) == (0, None)


def test_an_empty_journal_is_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "nowhere")
    found = check_journal(journal)
    assert (found.n_segments, found.n_records, found.asked_again.n_requests) == (0, 0, 0)
    assert statistics(journal) == []
    assert check_ledger(iter([ledger_part({})]), found.answers).n_without_record == 1


def test_a_torn_end_and_a_damaged_line_are_told_apart_and_placed(journal_of: Callable[..., Journal]) -> None:
    journal = journal_of(record(0), record(1), record(2))
    (segment,) = journal.folder.glob("*.jsonl")
    lines = segment.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"present", b"absent!")
    segment.write_bytes(b"".join(lines)[:-20])
    found = check_journal(Journal(journal.folder))
    assert [(d.segment, d.line) for d in found.damaged] == [(segment.name, 2)]
    assert [(d.segment, d.line) for d in found.torn_ends] == [(segment.name, 3)]
    assert found.n_records == 1


def test_what_was_asked_again_is_counted_with_its_tokens_and_its_price(journal_of: Callable[..., Journal]) -> None:
    first, probing = record(0), record(1, cells=())
    again = record(0, input_tokens=7, output_tokens=3, cost_usd=0.5, cells=(first.cells[0],))
    unpriced = record(0, input_tokens=1, output_tokens=1, cost_usd=None, cells=())
    found = check_journal(journal_of(first, probing, again, record(2), unpriced, probing))
    assert found.asked_again.n_requests == 2
    assert (found.asked_again.n_records, found.asked_again.n_without_cells) == (3, 2)
    assert found.asked_again.usage == Usage(108, 14)
    assert found.asked_again.cost_usd == 0.75
    assert found.n_cells_again == 1


def test_every_judgement_has_its_record(journal_of: Callable[..., Journal]) -> None:
    answers = check_journal(journal_of(record(0), record(1))).answers
    parts = [ledger_part({}, {"concept_id": "other"}), ledger_part({"request_id": "answer-1"})]
    found = check_ledger(iter(parts), answers)
    assert (found.n_judgements, found.n_without_record, found.example) == (3, 0, None)


@pytest.mark.parametrize("other", [{"request_id": "answer-9"}, {"witness_model": "another"}])
def test_a_judgement_without_its_record_is_counted_with_an_example(
    journal_of: Callable[..., Journal], other: dict[str, Any]
) -> None:
    answers = check_journal(journal_of(record(0))).answers
    found = check_ledger(iter([ledger_part({}, {"image_id": "lost"} | other, {"image_id": "too"} | other)]), answers)
    assert (found.n_judgements, found.n_without_record) == (3, 2)
    assert found.example is not None
    assert found.example["image_id"] == "lost"
    assert found.example | other == found.example


def test_only_answers_of_vision_language_models_need_a_record(journal_of: Callable[..., Journal]) -> None:
    answers = check_journal(journal_of(record(0))).answers
    rows = [
        {"state": "not_assessed", "request_id": None},
        {"witness": "expert", "request_id": None},
        {"witness": "alignment", "request_id": None},
    ]
    assert check_ledger(iter([ledger_part(*rows)]), answers).n_judgements == 0


def test_answers_without_an_id_are_matched_by_their_time(journal_of: Callable[..., Journal]) -> None:
    answers = check_journal(journal_of(record(0, request_id=None))).answers
    late = pd.Timestamp("2026-11-24T10:00:00.000008+00:00")
    found = check_ledger(iter([ledger_part({"request_id": None}, {"request_id": None, "created_at": late})]), answers)
    assert (found.n_judgements, found.n_without_record) == (2, 1)


def test_statistics_count_each_model_for_itself(journal_of: Callable[..., Journal]) -> None:
    slow = [record(n, seconds=float(n), is_counted=n > 2) for n in range(1, 5)]
    batched = record(5, batch_id="batch-1", seconds=0.0, cost_usd=None, prompt_sha256=sha256("other"))
    many, few = statistics(journal_of(*slow, batched, record(6, model="small", cost_usd=None)))
    assert (many.model, few.model) == ("model", "small")
    assert (many.n_records, many.n_cells, many.input_tokens, many.output_tokens) == (5, 10, 500, 50)
    assert (many.n_counted, many.cost_usd, many.n_unpriced) == (3, 1.0, 1)
    assert (few.cost_usd, few.n_unpriced) == (None, 1)
    # What came in a batch has no time of its own.
    assert (many.median_s, many.p95_s) == (2.5, pytest.approx(3.85))
    assert (many.first_at, many.last_at) == (slow[0].created_at, batched.created_at)
    assert list(many.prompts.values()) == [4, 1]
    assert many.batches == {"batch-1": 1}


def test_a_model_that_only_answered_in_batches_has_no_time(journal_of: Callable[..., Journal]) -> None:
    (found,) = statistics(journal_of(record(0, batch_id="b"), record(1, batch_id="b"), record(2, batch_id="c")))
    assert (found.median_s, found.p95_s, found.batches) == (None, None, {"b": 2, "c": 1})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"text": f"```json\n{ANSWER}\n```"}, None),
        ({"text": json.dumps(["a list"])}, None),
        ({"text": "Yes", "top_logprobs": (("Yes", -0.1),), "finish_reason": "length"}, None),
        ({"text": None, "refusal": "I cannot"}, FaultCode.REFUSED),
        ({"finish_reason": "content_filter"}, FaultCode.REFUSED),
        ({"text": ANSWER[:-3], "finish_reason": "length"}, FaultCode.CUT_OFF),
        ({"text": ""}, FaultCode.EMPTY_ANSWER),
        ({"text": "It is present."}, FaultCode.INVALID_JSON),
    ],
)
def test_faults_are_those_that_show_without_the_question(changes: dict[str, Any], expected: FaultCode | None) -> None:
    assert fault_of(record(**changes)) == expected


def test_statistics_name_the_faults_that_occur(journal_of: Callable[..., Journal]) -> None:
    (found,) = statistics(journal_of(record(0), record(1, text="no"), record(2, text="no"), record(3, text=None)))
    assert found.faults == {"empty_answer": 1, "invalid_json": 2}


def test_memory_does_not_grow_with_what_was_answered(journal_of: Callable[..., Journal]) -> None:
    long = json.dumps({"concept": {"state": "present", "evidence": "x" * 50_000}})
    journal = journal_of(*(record(n, text=long) for n in range(200)))
    tracemalloc.start()
    try:
        check_journal(journal)
        statistics(journal)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 200 * len(long) / 5
