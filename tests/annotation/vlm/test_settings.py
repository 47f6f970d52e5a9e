from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from annotation.vlm.settings import EMBEDDED_MODEL, VlmSettings


def test_nothing_configured_is_the_embedded_endpoint() -> None:
    settings = VlmSettings()
    assert settings.is_embedded
    assert (settings.model, settings.side_px, settings.usd_per_token) == (EMBEDDED_MODEL, 256, (0.0, 0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "ftp://host/v1", "model": "m"}, "http"),
        ({"base_url": "host:8000", "model": "m"}, "http"),
        ({"base_url": "http://user:secret@host/v1", "model": "m"}, "environment"),
        ({"base_url": "http://host/v1"}, "model name"),
        ({"base_url": "http://host/v1", "model": "m", "max_cost_usd": 1}, "max_cost_usd needs"),
        ({"max_cost_usd": -1}, "greater than 0"),
        ({"max_requests": 0}, "greater than or equal to 1"),
        ({"concurrency": 0}, "greater than or equal to 1"),
        ({"retries": 3}, "Extra inputs"),
    ],
)
def test_bad_configuration_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VlmSettings(**changes)


def test_a_password_in_the_address_is_not_repeated() -> None:
    with pytest.raises(ValidationError) as caught:
        VlmSettings(base_url="http://user:secret@host/v1", model="m")
    assert "secret" not in str(caught.value.errors(include_input=False))


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        VlmSettings().model = "x"  # type: ignore[misc]
