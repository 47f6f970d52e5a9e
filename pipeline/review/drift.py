"""A pause that waits for a person: new images drifted, and nothing is trained on them without a yes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from data_contracts.errors import ContractViolation
from data_contracts.files import write_text
from data_contracts.store import RunFolder

Decision = Literal["approve", "reject"]


@dataclass(frozen=True)
class Pending:
    """What waits for a decision."""

    raised_at: str
    sentence: str
    tests: tuple[str, ...]
    n_images: int


def pending(run: RunFolder) -> Pending | None:
    """The open question of a run, or None; a file that cannot be read is no question."""
    path = _folder(run) / "pending.json"
    if not path.is_file() or (_folder(run) / "decision.json").is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tests = tuple(_sentence(test) for test in content.get("tests", []))
        return Pending(str(content["raised_at"]), str(content["sentence"]), tests, int(content["n_images"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def decide(run: RunFolder, decision: str, reviewer: str, raised_at: str) -> None:
    """Write the answer beside the question, atomically; raises `ContractViolation` when the question changed."""
    asked = pending(run)
    if decision not in ("approve", "reject") or asked is None or asked.raised_at != raised_at:
        raise ContractViolation(
            "drift", ["expected approve or reject of the question that is shown; nothing was written"], remedy="Reload."
        )
    answer = {"decision": decision, "by": reviewer, "at": datetime.now(UTC).isoformat()}
    write_text(_folder(run) / "decision.json", json.dumps(answer, ensure_ascii=False) + "\n")


def _folder(run: RunFolder) -> Path:
    return run.path / "drift"


def _sentence(test: Any) -> str:
    if isinstance(test, dict):
        return str(test.get("sentence") or ", ".join(f"{key} {value}" for key, value in test.items()))
    return str(test)
