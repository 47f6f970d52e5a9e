"""The law of the tree: who may import whom, what is installed, what a commit may hold."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOMS = ("data_contracts", "pipeline", "annotation", "model", "flows")
HEAVY = ("torch", "prefect", "openai", "open_clip", "transformers")


def test_rooms_meet_only_in_data_contracts(repository: Path) -> None:
    found = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-3000:]


def test_every_package_is_listed_for_installation(repository: Path) -> None:
    listed = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {
        path.parent.relative_to(repository).as_posix().replace("/", ".")
        for room in ROOMS
        for path in (repository / room).rglob("__init__.py")
    }
    assert set(listed) == there


def test_the_lock_holds_hashes_and_no_address(repository: Path) -> None:
    lock = (repository / "requirements.lock").read_text()
    assert "://" not in lock
    assert "--index-url" not in lock
    pinned = [line for line in lock.splitlines() if "==" in line and not line.lstrip().startswith("#")]
    assert pinned
    assert lock.count("--hash=sha256:") >= len(pinned)


@pytest.mark.parametrize("module", ["data_contracts.store", "flows.settings", "flows.cli"])
def test_nothing_heavy_is_imported_before_it_is_needed(module: str) -> None:
    program = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    heavy = found.stdout.strip()
    # The command line needs to know nothing but its flags until a verb runs.
    assert heavy == "[]", heavy
