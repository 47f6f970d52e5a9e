"""Defaults for Prefect, set before it is imported: a user's own environment and profile always win."""

from __future__ import annotations

import os

_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # A cold ephemeral server needs 41 s on a slow machine; Prefect's own limit is 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # medmicn reports by itself; Prefect's INFO lines would say everything twice.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_CLI_PROMPT": "false",
}


def apply() -> None:
    """Set the defaults in this process's environment."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
