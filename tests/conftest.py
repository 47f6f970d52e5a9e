"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples every time: a red run can be repeated. `HYPOTHESIS_PROFILE=search` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Started in the background (`make test &`) this process ignores interrupts, and so would every command it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images with expert answers. In CI they are there, so a missing folder is a failure, not a skip."""
    folder = Path(os.environ.get("MEDMICN_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        message = f"real data: expected the folder {folder}; set MEDMICN_DATA to it"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder
