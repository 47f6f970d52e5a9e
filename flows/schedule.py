"""The served schedule: annotate, then train, again and again, on new images only."""

from __future__ import annotations

import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path

from flows import prefect_defaults

prefect_defaults.apply()

from data_contracts.errors import ConfigurationError  # noqa: E402
from flows.annotate_then_train import flow_for  # noqa: E402
from flows.settings import Settings, prefect_api_url  # noqa: E402

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_interval(text: str) -> timedelta:
    """`15m`, `2h`, `1d`, `90s` as a time span; raises `ConfigurationError` otherwise."""
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS_S or not number.isdigit() or int(number) == 0:
        raise ConfigurationError(f"--every: expected a number and s, m, h or d, such as 15m, got {text!r}.")
    return timedelta(seconds=int(number) * _UNITS_S[unit])


def require_server() -> str:
    """The address of a Prefect server that answers; raises `ConfigurationError` where none does.

    Serving on Prefect's ephemeral server starts without complaint and never runs anything, so it is refused.
    """
    remedy = (
        "In another terminal: `prefect server start`; then here: "
        "`export PREFECT_API_URL=http://127.0.0.1:4200/api` and the same command again."
    )
    url = prefect_api_url()
    if not url:
        raise ConfigurationError(
            "A schedule needs a running Prefect server: expected PREFECT_API_URL, it is not set.", remedy=remedy
        )
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10):
            return url
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise ConfigurationError(
            f"PREFECT_API_URL: expected a running Prefect server at {url}, got: {error}", remedy=remedy
        ) from error


def serve(source: Path, run: Path, settings: Settings, *, cron: str | None, every: timedelta | None) -> None:
    """Serve the deployment until interrupted; one run at a time, so that none overtakes another."""
    require_server()
    flow_for(settings).serve(
        name=run.name,
        cron=cron,
        interval=every,
        parameters={
            "source": str(source.resolve()),
            "run": str(run.resolve()),
            "config": settings.model_dump(mode="json"),
        },
        tags=["medmicn"],
        limit=1,
        # A supervised service is stopped and started; its schedule must outlive that.
        pause_on_shutdown=False,
        print_starting_message=False,
    )
