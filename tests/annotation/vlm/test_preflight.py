from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from annotation.vlm.client import VlmClient
from annotation.vlm.estimate import Work, estimate
from annotation.vlm.preflight import (
    is_listed,
    price_of,
    require_key,
    require_model,
    require_price,
    require_room_in_cap,
)
from annotation.vlm.prices import Price
from annotation.vlm.schema import VlmRequest
from annotation.vlm.settings import VlmSettings
from data_contracts.errors import ConfigurationError, EndpointError, ExitCode

Make = Callable[..., VlmClient]
OPENAI = VlmSettings(base_url="https://api.openai.com/v1", model="gpt-4o", max_cost_usd=5)
PRIVATE = VlmSettings(base_url="http://10.0.0.5:8000/v1", model="gpt-4o", max_cost_usd=5)


@pytest.mark.parametrize(
    "address",
    [
        "https://api.openai.com/v1",
        "https://me.openai.azure.com/openai/deployments/x",
        "https://openrouter.ai/api/v1",
        "https://generativelanguage.googleapis.com/v1beta/openai",
    ],
)
def test_an_address_that_is_known_to_want_a_key_is_refused_without_one(address: str) -> None:
    settings = VlmSettings(base_url=address, model="m")
    with pytest.raises(ConfigurationError, match=r"wants a key.*MY_KEY is not set; nothing was sent.*export MY_KEY"):
        require_key(settings, has_key=False, key_variable="MY_KEY")
    require_key(settings, has_key=True, key_variable="MY_KEY")


@pytest.mark.parametrize("address", ["http://localhost:11434/v1", "http://10.0.0.5/v1", "https://notopenai.com/v1"])
def test_other_addresses_may_do_without(address: str) -> None:
    require_key(VlmSettings(base_url=address, model="m"), has_key=False, key_variable="MY_KEY")
    require_key(VlmSettings(), has_key=False, key_variable="MY_KEY")


def test_prices_come_from_the_configuration_or_the_list_or_nowhere() -> None:
    own = PRIVATE.model_copy(update={"input_usd_per_million_tokens": 2.0, "output_usd_per_million_tokens": 8.0})
    assert price_of(own) == Price(2e-6, 8e-6, "configuration")
    listed = price_of(OPENAI)
    assert listed is not None
    assert "genai-prices" in listed.source
    overridden = OPENAI.model_copy(update={"input_usd_per_million_tokens": 0.0, "output_usd_per_million_tokens": 0.0})
    assert price_of(overridden) == Price(0.0, 0.0, "configuration")
    assert price_of(PRIVATE) is None
    for here in (VlmSettings(), VlmSettings(base_url="transformers", model="gpt-4o")):
        assert price_of(here) == Price(0.0, 0.0, "this machine")


def test_a_cap_of_money_without_a_price_cannot_be_kept() -> None:
    with pytest.raises(ConfigurationError, match=r"max_cost_usd = 5 cannot be kept.*'gpt-4o'.*usd_per_million") as e:
        require_price(PRIVATE, price_of(PRIVATE))
    assert e.value.exit_code == ExitCode.CONFIGURATION
    require_price(PRIVATE.model_copy(update={"max_cost_usd": None}), None)
    require_price(OPENAI, price_of(OPENAI))


def test_a_cap_below_one_request_is_refused() -> None:
    request = VlmRequest("s", ("t", b"i"), "n", None, 1000)
    most_usd = estimate([Work(request, 1)], OPENAI, Price(1e-3, 1e-2, "test")).most_usd_per_request
    assert most_usd is not None
    assert most_usd > 5
    with pytest.raises(ConfigurationError, match=r"max_cost_usd = 5 is below the price of one request.*1\d\.\d+ USD"):
        require_room_in_cap(OPENAI, most_usd)
    require_room_in_cap(OPENAI, 5.0)
    require_room_in_cap(OPENAI, None)
    require_room_in_cap(OPENAI.model_copy(update={"max_cost_usd": None}), most_usd)


def listing(*names: str) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}


async def test_an_unknown_model_is_refused_with_names_that_are_near(make_client: Make, scripted: Any) -> None:
    endpoint = scripted(listing("text-embedding-3", "gpt-4o-mini", "gpt-4o", "whisper-1", "dall-e-3"))
    async with make_client(endpoint, model="gpt4o") as client:
        with pytest.raises(
            ConfigurationError, match=r"no model 'gpt4o'; nothing was sent.*It has 5, such as gpt-4o,"
        ) as caught:
            await require_model(client)
    assert "whisper" not in str(caught.value)
    assert [r.url.path for r in endpoint.sent] == ["/v1/models"]


async def test_a_model_that_resembles_none_is_refused_with_some_names(make_client: Make, scripted: Any) -> None:
    async with make_client(scripted(listing("aaaa", "bbbb", "cccc", "dddd")), model="zz") as client:
        with pytest.raises(ConfigurationError, match="such as aaaa, bbbb, cccc"):
            await require_model(client)


@pytest.mark.parametrize(
    ("model", "names", "there"),
    [
        ("llava", ["llava:latest"], True),
        ("llava:latest", ["llava:latest"], True),
        ("llava", ["llava:13b"], False),
        ("llava:13b", ["llava:latest"], False),
        ("gemini-2.5-pro", ["models/gemini-2.5-pro"], True),
        ("gpt-4o", ["gpt-4o-mini"], False),
    ],
)
async def test_a_model_is_found_under_the_names_that_servers_give_it(
    make_client: Make, scripted: Any, model: str, names: list[str], there: bool
) -> None:
    assert is_listed(model, names) is there
    async with make_client(scripted(listing(*names)), model=model) as client:
        if there:
            await require_model(client)
        else:
            with pytest.raises(ConfigurationError):
                await require_model(client)


@pytest.mark.parametrize("response", [httpx2.Response(404, json={}), httpx2.Response(200, json={"data": []})])
async def test_an_endpoint_that_lists_nothing_is_tried(
    make_client: Make, scripted: Any, response: httpx2.Response
) -> None:
    async with make_client(scripted(response)) as client:
        await require_model(client)


async def test_a_deployment_of_azure_is_not_asked_for_a_list(make_client: Make, scripted: Any) -> None:
    endpoint = scripted(listing("another"))
    async with make_client(endpoint, azure_api_version="2024-10-21") as client:
        await require_model(client)
    assert endpoint.sent == []


async def test_a_refused_key_is_noticed_before_anything_is_asked(make_client: Make, scripted: Any) -> None:
    async with make_client(scripted(httpx2.Response(401, json={}))) as client:
        with pytest.raises(EndpointError, match="refused the key"):
            await require_model(client)
