"""The question whether drifted images may be trained on, and a person's answer. The files are the truth.

drift/pending.json         the question: raised_at, sentence, tests, n_images
drift/pending.parquet      the images it is about
drift/decision.json        the answer, written by `medmicn approve` or the review page: decision, by, at
drift/decided.parquet      every image that was decided on, with the last decision
drift/history/             questions with their answers
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.errors import ConfigurationError, ContractViolation
from data_contracts.files import write_text, write_with
from data_contracts.store import RunFolder
from pipeline.review.drift import Decision, Pending, decide, pending

PENDING_FILE, DECISION_FILE = "pending.json", "decision.json"
PENDING_IMAGES_FILE, DECIDED_FILE = "pending.parquet", "decided.parquet"

_TEST_FIELDS = ["kind", "quantity", "test", "n_baseline", "n_new", "baseline", "new", "effect", "p_holm", "sentence"]


@dataclass(frozen=True)
class Answer:
    """What a person decided."""

    approved: bool
    by: str
    n_images: int

    @property
    def sentence(self) -> str:
        """The answer in words."""
        said = "may be trained on" if self.approved else "are left out of training"
        return f"{self.by} decided: {self.n_images} drifted images {said}."


def waiting(run: RunFolder) -> Pending | None:
    """The question that nobody has answered yet, or None."""
    return pending(run)


def raise_question(run: RunFolder, sentence: str, tests: pd.DataFrame, image_ids: Sequence[str]) -> None:
    """Ask whether these images may be trained on; an open question stays as it is."""
    if (run.drift_dir / PENDING_FILE).is_file():
        return
    # A kill may have left the answer to an earlier question; it must not answer this one.
    (run.drift_dir / DECISION_FILE).unlink(missing_ok=True)
    # The images first: a question without them could not be acted upon.
    _write(run.drift_dir / PENDING_IMAGES_FILE, pd.DataFrame({"image_id": list(image_ids)}))
    content = {
        "raised_at": datetime.now(UTC).isoformat(),
        "sentence": sentence,
        "tests": [_plain(row) for row in tests[_TEST_FIELDS].to_dict("records")],
        "n_images": len(image_ids),
    }
    write_text(run.drift_dir / PENDING_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def answer(run: RunFolder, *, approve: bool, by: str) -> Pending:
    """Answer the open question and return it; raises `ConfigurationError` where there is none."""
    asked = pending(run)
    if asked is None:
        raise ConfigurationError(f"{run.path}: expected an open question about drifted images, found none.")
    decision: Decision = "approve" if approve else "reject"
    decide(run, decision, by, asked.raised_at)
    return asked


def take_answer(run: RunFolder) -> Answer | None:
    """Act upon an answer, if one was given: its images are decided, and question and answer become history.

    Killed in between, the same is done again. Raises `ContractViolation` for an answer that is neither yes nor no.
    """
    folder = run.drift_dir
    if not (folder / PENDING_FILE).is_file() or not (folder / DECISION_FILE).is_file():
        return None
    question, given = _read(folder / PENDING_FILE), _read(folder / DECISION_FILE)
    if given.get("decision") not in {"approve", "reject"}:
        raise ContractViolation(
            str(folder / DECISION_FILE),
            [f"decision: expected approve or reject, got {given.get('decision')!r}"],
            remedy="Remove the file and decide again with `medmicn approve` or `medmicn reject`.",
        )
    images = pq.read_table(folder / PENDING_IMAGES_FILE).to_pandas()
    _decide_on(run, images["image_id"].tolist(), given["decision"])
    name = "".join(c if c.isalnum() else "-" for c in str(question.get("raised_at")))
    write_text(folder / "history" / f"{name}.json", json.dumps({**question, **given}, indent=2) + "\n")
    for file in (PENDING_FILE, DECISION_FILE, PENDING_IMAGES_FILE):
        (folder / file).unlink(missing_ok=True)
    return Answer(given["decision"] == "approve", str(given.get("by") or "somebody"), len(images))


def decided(run: RunFolder) -> pd.DataFrame:
    """image_id, decision (approve or reject): every image that a person decided on."""
    path = run.drift_dir / DECIDED_FILE
    return pq.read_table(path).to_pandas() if path.is_file() else pd.DataFrame({"image_id": [], "decision": []})


def left_out(run: RunFolder) -> frozenset[str]:
    """Images that may not be trained on: those a person refused, and those that a person is asked about."""
    table = decided(run)
    refused = set(table.loc[table["decision"] == "reject", "image_id"])
    path = run.drift_dir / PENDING_IMAGES_FILE
    asked = set(pq.read_table(path).to_pandas()["image_id"]) if (run.drift_dir / PENDING_FILE).is_file() else set()
    return frozenset(refused | asked)


def take_back(run: RunFolder) -> int:
    """Allow every image that was ever refused; returns their number."""
    table = decided(run)
    refused = table.loc[table["decision"] == "reject", "image_id"].tolist()
    if refused:
        _decide_on(run, refused, "approve")
    return len(refused)


def _decide_on(run: RunFolder, image_ids: list[str], decision: str) -> None:
    fresh = pd.DataFrame({"image_id": image_ids, "decision": decision})
    table = pd.concat([decided(run), fresh], ignore_index=True).astype("str")
    _write(run.drift_dir / DECIDED_FILE, table.drop_duplicates("image_id", keep="last"))


def _write(path: Path, table: pd.DataFrame) -> None:
    write_with(path, lambda file: pq.write_table(pa.Table.from_pandas(table, preserve_index=False), file))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ContractViolation(str(path), [f"expected JSON, got: {error}"], remedy="Remove the file.") from error
    if not isinstance(content, dict):
        raise ContractViolation(str(path), [f"expected an object, got {content!r}"], remedy="Remove the file.")
    return content


def _plain(row: Any) -> dict[str, Any]:
    """JSON knows neither NaN nor numpy's numbers."""
    return {
        key: None if pd.isna(value) else value.item() if hasattr(value, "item") else value for key, value in row.items()
    }
