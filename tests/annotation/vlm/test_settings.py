from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from annotation.vlm.settings import EMBEDDED_MODEL, VlmSettings, is_loopback

REMOTE: dict[str, Any] = {"base_url": "http://host/v1", "model": "m"}


def test_nothing_configured_is_the_embedded_endpoint() -> None:
    settings = VlmSettings()
    assert settings.is_embedded
    assert not settings.is_remote
    assert (settings.model, settings.side_px, settings.host) == (EMBEDDED_MODEL, 256, "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "ftp://host/v1", "model": "m"}, "http"),
        ({"base_url": "host:8000", "model": "m"}, "http"),
        ({"base_url": "http://user:secret@host/v1", "model": "m"}, "environment"),
        ({"base_url": "http://host/v1"}, "model name"),
        ({"base_url": "transformers"}, "model name"),
        (REMOTE | {"input_usd_per_million_tokens": 1}, "expected both"),
        ({"max_cost_usd": -1}, "greater than 0"),
        ({"max_requests": 0}, "greater than or equal to 1"),
        ({"concurrency": 0}, "greater than or equal to 1"),
        ({"concepts_per_request": 0}, "greater than or equal to 1"),
        ({"retries": 3}, "Extra inputs"),
        (REMOTE | {"samples": 5}, "need temperature above 0"),
        (REMOTE | {"samples": 5, "temperature": None}, "need temperature above 0"),
        (REMOTE | {"samples": 5, "temperature": 1, "probability": "logprobs"}, "not both"),
        (REMOTE | {"probability": "guessed"}, "'stated' or 'logprobs'"),
        ({"probability": "logprobs"}, "no log-probabilities"),
        ({"batch": True}, "Batch API"),
        ({"base_url": "transformers", "model": "m", "batch": True}, "Batch API"),
    ],
)
def test_bad_configuration_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VlmSettings(**changes)


def test_a_cap_of_money_needs_no_price_here_since_lists_may_know_it() -> None:
    assert VlmSettings(**REMOTE, max_cost_usd=1).max_cost_usd == 1


def test_a_password_in_the_address_is_not_repeated() -> None:
    with pytest.raises(ValidationError) as caught:
        VlmSettings(base_url="http://user:secret@host/v1", model="m")
    assert "secret" not in str(caught.value.errors(include_input=False))


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        VlmSettings().model = "x"  # type: ignore[misc]


def test_the_embedded_endpoint_is_the_installed_one_whatever_was_stored() -> None:
    assert VlmSettings(model="medmicn-embedded-measurements-0").model == EMBEDDED_MODEL


def test_images_are_lossless_in_process_and_small_over_a_network() -> None:
    assert (VlmSettings().encoding, VlmSettings(base_url="transformers", model="m").encoding) == ("PNG", "PNG")
    remote = VlmSettings(**REMOTE)
    assert (remote.encoding, remote.side_px) == ("JPEG", 512)
    assert VlmSettings(**REMOTE, image_format="PNG", image_side_px=1024).encoding == "PNG"
    assert VlmSettings(image_format="JPEG").encoding == "JPEG"


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"temperature": 0.5},
        {"seed": 1},
        {"samples": 3, "temperature": 0.5},
        {"probability": "logprobs"},
        {"image_side_px": 64},
        {"image_format": "PNG"},
    ],
)
def test_what_decides_an_answer_is_among_the_parameters(change: dict[str, Any]) -> None:
    assert VlmSettings(**(REMOTE | change)).parameters != VlmSettings(**REMOTE).parameters


def test_what_does_not_decide_an_answer_is_not() -> None:
    other = {"concurrency": 2, "timeout_s": 5, "max_cost_usd": 1, "concepts_per_request": 3, "base_url": "http://x/v1"}
    assert VlmSettings(**(REMOTE | other)).parameters == VlmSettings(**REMOTE).parameters


@pytest.mark.parametrize(
    ("host", "is_here"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("127.0.0.1.example.com", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_only_this_machine_is_loopback(host: str, is_here: bool) -> None:
    assert is_loopback(host) is is_here


def test_whether_anything_leaves_this_machine_is_known() -> None:
    assert VlmSettings().is_loopback
    assert VlmSettings(base_url="transformers", model="m").is_loopback
    assert VlmSettings(base_url="http://[::1]:8000/v1", model="m").is_loopback
    assert not VlmSettings(base_url="https://api.openai.com/v1", model="m").is_loopback
