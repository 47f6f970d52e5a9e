"""`medmicn journal`: what a person and a program read about the answers of a run, and with which exit code."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from annotation.vlm.journal import Journal, Record, utc_now
from data_contracts.manifest import RunManifest
from data_contracts.store import RunFolder
from flows.cli import main

N_RECORDS = 12


def sha256(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def record(n: int) -> Record:
    text = json.dumps({"round": {"state": "present"}})
    cells, prompt = (sha256("cell", n),), sha256("prompt", n % 11)
    return Record(sha256(n), cells, prompt, "a-model", text, None, "stop", f"r-{n}", 1000, 50, utc_now(), 1.5, 0.01)


def judgement(one: Record) -> dict[str, Any]:
    return {
        "image_id": f"image of {one.request_id}",
        "concept_id": "round",
        "witness": "vlm",
        "witness_model": one.model,
        "state": "present",
        "request_id": one.request_id,
        "created_at": pd.Timestamp(one.created),
    }


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with twelve answers in its journal, each with its judgement."""
    folder = RunFolder(tmp_path / "run")
    folder.write_manifest(RunManifest.new("run", str(tmp_path)))
    records = [record(n) for n in range(N_RECORDS)]
    with Journal(folder.journal_dir) as journal:
        for one in records:
            journal.put(one)
    folder.append_judgements(pd.DataFrame([judgement(one) for one in records[:7]]))
    folder.append_judgements(pd.DataFrame([judgement(one) for one in records[7:]]))
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: exit code, standard output and standard error."""

    def call_it(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["journal", *map(str, arguments)])
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.out, printed.err

    return call_it


Call = Callable[..., tuple[int, str, str]]


def test_a_whole_journal_is_verified_and_leads_on(run: RunFolder, call: Call) -> None:
    exit_code, out, said = call("verify", "--run", run.path)
    assert (exit_code, out) == (0, "")
    assert "✗" not in said
    assert "12 records of 12 requests in 1 segment" in said
    assert "12 judgements, all with their record" in said
    assert said.splitlines()[-1].startswith("next:")


def test_what_a_kill_leaves_is_said_and_no_error(run: RunFolder, call: Call) -> None:
    with Journal(run.journal_dir) as journal:
        journal.put(record(99))
    (torn,) = (path for path in run.journal_dir.glob("*.jsonl") if path.stat().st_size < 2000)
    torn.write_bytes(torn.read_bytes()[:-5])
    exit_code, out, said = call("verify", "--run", run.path, "--json")
    assert exit_code == 0
    assert "as a kill leaves" in said
    assert json.loads(out)["journal"]["torn_ends"] == [{"segment": torn.name, "line": 1, "is_torn_end": True}]


def test_a_damaged_line_is_named_and_ends_with_exit_code_3(run: RunFolder, call: Call) -> None:
    (segment,) = run.journal_dir.glob("*.jsonl")
    lines = segment.read_bytes().splitlines(keepends=True)
    lines[4] = lines[4].replace(b"present", b"absent!")
    segment.write_bytes(b"".join(lines))
    exit_code, out, said = call("verify", "--run", run.path, "--json", "--quiet")
    outcome = json.loads(out)
    assert (exit_code, outcome["exit_code"]) == (3, 3)
    assert [(d["segment"], d["line"]) for d in outcome["journal"]["damaged"]] == [(segment.name, 5)]
    # Quiet or not: the error says where, and what can be done.
    assert f"{segment.name}, line 5" in said
    assert "backup" in said
    # The judgement that came of the damaged answer stands without its record now.
    assert outcome["ledger"] == {
        "n_judgements": N_RECORDS,
        "n_without_record": 1,
        "example": {
            "image_id": "image of r-4",
            "concept_id": "round",
            "witness_model": "a-model",
            "request_id": "r-4",
        },
    }


def test_a_judgement_without_its_answer_alone_ends_with_exit_code_3(run: RunFolder, call: Call) -> None:
    run.append_judgements(pd.DataFrame([judgement(replace(record(3), request_id="invented"))]))
    exit_code, _, said = call("verify", "--run", run.path)
    assert exit_code == 3
    assert "1 of 13 judgements without a record" in said
    assert "request invented" in said


def test_what_was_paid_for_twice_is_said_and_no_error(run: RunFolder, call: Call) -> None:
    with Journal(run.journal_dir) as journal:
        journal.put(record(3))
    exit_code, out, said = call("verify", "--run", run.path, "--json")
    assert exit_code == 0
    assert "1 request had an answer already: 1,050 tokens, 0.0100 USD" in said
    assert json.loads(out)["journal"]["asked_again"]["usage"] == {"input_tokens": 1000, "output_tokens": 50}


def test_statistics_are_a_table_for_people_and_exact_for_programs(run: RunFolder, call: Call) -> None:
    with Journal(run.journal_dir) as journal:
        for n in range(20, 25):
            journal.put(replace(record(n), model="another", cost_usd=None, text="prose", batch_id="batch_of_november"))
    exit_code, out, said = call("stats", "--run", run.path, "--json")
    assert exit_code == 0
    one, other = json.loads(out)["models"]
    assert (one["model"], one["n_records"], one["input_tokens"], one["cost_usd"]) == ("a-model", 12, 12_000, 0.12)
    assert (other["faults"], other["batches"], other["median_s"]) == (
        {"invalid_json": 5},
        {"batch_of_november": 5},
        None,
    )
    table = [re.split(r"\s{2,}", line) for line in said.splitlines()]
    assert ["price, USD", "0.1200", "unknown"] in table
    assert ["not JSON", "0", "5"] in table
    # Eleven different questions: ten are shown, shortly.
    assert sha256("prompt", 0)[:12] in said
    assert sha256("prompt", 0) not in said
    assert "and 1 more" in said
    assert said.splitlines()[-1].startswith("next:")


@pytest.mark.parametrize("verb", ["verify", "stats"])
def test_a_run_that_asked_nobody_yet_is_whole_and_leads_on(tmp_path: Path, call: Call, verb: str) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.write_manifest(RunManifest.new("run", str(tmp_path)))
    exit_code, _, said = call(verb, "--run", folder.path)
    assert exit_code == 0
    assert said.splitlines()[-1] == f"next:    medmicn concepts --run {folder.path}"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, call: Call) -> None:
    assert call("verify", "--run", tmp_path)[0] == 3
