"""`medmicn doctor` on endpoints: what stands in the way of a run is found before it, with the remedy."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from annotation.vlm.client import VlmClient
from annotation.vlm.journal import Journal
from annotation.vlm.probe import Capabilities, probe
from annotation.vlm.settings import VlmSettings
from benchmarks.simulated_endpoint import Simulator
from data_contracts.errors import ConfigurationError
from data_contracts.manifest import RunManifest
from data_contracts.store import RunFolder
from flows import doctor
from flows.cli import main
from flows.console import Console
from flows.doctor import Check, examine, examine_endpoints
from flows.settings import Settings, resolve
from tests.flows.conftest import Ended

MODEL = "seeing-model"
KEY = "sk-that-nobody-may-read"


@pytest.fixture(autouse=True)
def nothing_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without configuration or runs, and an environment without a key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def seeing() -> Iterator[Simulator]:
    with Simulator("--model", MODEL, "--model", "other-model") as simulator:
        yield simulator


@pytest.fixture(scope="module")
def blind() -> Iterator[Simulator]:
    with Simulator("--blind", "--model", MODEL) as simulator:
        yield simulator


def examined(*runs: RunFolder, probing: bool = False, **settings: Any) -> dict[str, Check]:
    """The checks of one endpoint by name; settings are keys of `[vlm]`."""
    resolved = resolve(None, {f"vlm.{key}": value for key, value in settings.items()})
    checks = list(examine_endpoints(resolved, list(runs), Console(quiet=True), probing=probing))
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


@pytest.fixture(scope="module")
def probed(seeing: Simulator, tmp_path_factory: pytest.TempPathFactory) -> Capabilities:
    """What a real probe finds at the seeing endpoint."""
    settings = VlmSettings(base_url=seeing.base_url, model=MODEL)

    async def found() -> Capabilities:
        async with VlmClient(settings, None, journal) as client:
            return await probe(client)

    with Journal(tmp_path_factory.mktemp("journal")) as journal:
        return asyncio.run(found())


def stored(folder: Path, found: Capabilities) -> RunFolder:
    """A run that has probed an endpoint and found this."""
    manifest = RunManifest.new(folder.name, "source")
    manifest.endpoints[f"{found.model} at {found.base_url}"] = found.as_dict()
    run = RunFolder(folder)
    run.write_manifest(manifest)
    return run


def test_the_embedded_model_needs_nothing() -> None:
    (check,) = examined(probing=True).values()
    assert check.works
    assert "no network" in check.finding


def test_an_endpoint_that_lists_the_model_works(seeing: Simulator) -> None:
    found = examined(base_url=seeing.base_url, model=MODEL)
    assert not [check for check in found.values() if check.needed and not check.works]
    assert "lists the model" in found["address"].finding
    assert found["address"].endpoint == f"{MODEL} at {seeing.base_url}"
    # Nobody knows the price of a server of one's own, and without a cap nobody needs it.
    assert (found["price"].works, found["price"].needed) == (False, False)
    assert "vlm.input_usd_per_million_tokens" in found["price"].remedy
    assert not found["last probe"].works
    assert "--probe" in found["last probe"].remedy


def test_a_model_that_is_not_listed_is_named_with_near_names(seeing: Simulator) -> None:
    address = examined(base_url=seeing.base_url, model="seing-model")["address"]
    assert (address.works, address.needed) == (False, True)
    assert "'seing-model'" in address.finding
    assert MODEL in address.remedy


def test_an_address_where_nobody_listens_is_said(seeing: Simulator) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found = examined(base_url=f"http://127.0.0.1:{taken.getsockname()[1]}/v1", model=MODEL, probing=True)
    assert not found["address"].works
    assert "did not answer" in found["address"].finding
    assert "vlm.base_url" in found["address"].remedy
    # What could only fail for the same reason is not tried.
    assert "probe now" not in found


def test_silence_is_not_taken_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PATIENCE_S", 0.3)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        found = examined(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1", model=MODEL)
    assert not found["address"].works
    assert "no answer within" in found["address"].finding


def test_a_server_error_is_not_taken_for_an_answer(seeing: Simulator) -> None:
    seeing.set_faults({"burst_5xx": {"on": "/v1/models", "statuses": [503]}})
    try:
        address = examined(base_url=seeing.base_url, model=MODEL)["address"]
    finally:
        seeing.set_faults({})
    assert not address.works
    assert "503" in address.finding


def test_a_key_that_is_missing_is_named_and_nothing_is_sent() -> None:
    found = examined(base_url="https://api.openai.com/v1", model="gpt-5-mini", api_key_env="MY_KEY", probing=True)
    assert (found["key"].works, found["key"].needed) == (False, True)
    assert "export MY_KEY=" in found["key"].remedy
    assert "address" not in found
    assert "probe now" not in found
    # These are known without asking anybody.
    assert "USD in" in found["price"].finding
    assert "genai-prices" in found["price"].finding
    assert "as published for OpenAI" in found["image tokens"].finding


def test_a_key_is_never_shown(seeing: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    found = examined(base_url=seeing.base_url, model=MODEL, probing=True)
    assert "OPENAI_API_KEY is set" in found["key"].finding
    assert KEY not in repr(found)


def test_an_unknown_price_stands_in_the_way_of_a_cap(seeing: Simulator) -> None:
    found = examined(base_url=seeing.base_url, model=MODEL, max_cost_usd=1.0)
    assert (found["price"].works, found["price"].needed) == (False, True)
    assert "address" not in found


@pytest.mark.parametrize(
    ("model", "works", "said"),
    [("qwen2.5-vl-7b-instruct", True, "as published for"), (MODEL, False, "a high guess")],
)
def test_tokens_of_an_image_are_known_or_guessed(model: str, works: bool, said: str) -> None:
    tokens = examined(base_url="https://api.openai.com/v1", model=model)["image tokens"]
    assert tokens.works is works
    assert said in tokens.finding


def test_the_last_probe_is_read_from_the_newest_run_that_has_one(probed: Capabilities, tmp_path: Path) -> None:
    right = replace(probed, probed_at="2026-11-24T20:15:00+00:00", tokens_per_image=321)
    wrong = replace(probed, n_right=3)
    unreadable = RunFolder(tmp_path / "unreadable")
    unreadable.path.mkdir()
    unreadable.manifest_path.write_text('{"contract": "run/0"}')
    runs = [
        unreadable,
        stored(tmp_path / "other", replace(wrong, base_url="http://elsewhere.test/v1")),
        stored(tmp_path / "outdated", replace(wrong, version=probed.version - 1)),
        stored(tmp_path / "newest", right),
        stored(tmp_path / "oldest", wrong),
    ]
    found = examined(*runs, base_url=probed.base_url, model=MODEL)
    assert found["last probe"].works
    assert f"2026-11-24 20:15 UTC, {tmp_path / 'newest'}" in found["last probe"].finding
    assert "4 of 4 colours" in found["last probe"].finding
    assert "321" in found["image tokens"].finding


def test_a_probe_shows_what_it_finds_and_keeps_nothing(
    seeing: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = seeing.state()["chat_requests_received"]
    rates = {"input_usd_per_million_tokens": 1.0, "output_usd_per_million_tokens": 1.0}
    found = examined(base_url=seeing.base_url, model=MODEL, probing=True, **rates)["probe now"]
    assert found.works
    assert "sees images: yes (4 of 4" in found.finding
    n_sent = seeing.state()["chat_requests_received"] - before
    assert f"{n_sent} requests, 0.00" in found.finding
    assert list(tmp_path.iterdir()) == []


def test_a_probe_keeps_the_caps(seeing: Simulator) -> None:
    found = examined(base_url=seeing.base_url, model=MODEL, max_requests=2, probing=True)["probe now"]
    assert not found.works
    assert "cap of 2 requests" in found.finding


def test_all_endpoints_are_shown(seeing: Simulator, blind: Simulator, tmp_path: Path) -> None:
    file = tmp_path / "both.toml"
    also = f'[[vlm.also]]\nbase_url = "{blind.base_url}"\nmodel = "another"\n'
    file.write_text(f'[vlm]\nbase_url = "{seeing.base_url}"\nmodel = "{MODEL}"\n{also}')
    checks = list(examine_endpoints(resolve(file), [], Console(quiet=True)))
    endpoints = list(dict.fromkeys(check.endpoint for check in checks))
    assert endpoints == [f"{MODEL} at {seeing.base_url}", f"another at {blind.base_url}"]


@pytest.mark.parametrize(
    ("model", "offline", "works", "needed", "said"),
    [
        ("here", False, True, True, "config.json"),
        ("empty", False, False, True, "without config.json"),
        ("nobody/no-such-vlm", False, False, False, "downloads"),
        ("nobody/no-such-vlm", True, False, True, "privacy.offline forbids"),
        ("no/such/folder", False, False, True, "no folder"),
    ],
)
def test_a_model_of_this_process_is_looked_for_here(
    tmp_path: Path, model: str, offline: bool, works: bool, needed: bool, said: str
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    settings = resolve(None, {"vlm.base_url": "transformers", "vlm.model": model, "privacy.offline": offline})
    found = {check.name: check for check in examine_endpoints(settings, [], Console(quiet=True))}
    assert (found["model"].works, found["model"].needed) == (works, needed)
    assert said in found["model"].finding
    assert set(found) == {"model", "last probe"}


def test_a_model_of_this_process_is_really_loaded_by_a_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(settings: VlmSettings, *, proxy: str | None, offline: bool) -> httpx2.AsyncBaseTransport:
        raise ConfigurationError(f"{settings.model}: the weights are no weights", remedy="Download them again.")

    monkeypatch.setattr(doctor, "transport_for", load)
    (tmp_path / "config.json").write_text("{}")
    found = examined(base_url="transformers", model=str(tmp_path), probing=True)
    assert found["model"].works
    assert (found["probe now"].works, found["probe now"].remedy) == (False, "Download them again.")


def test_a_scheduler_elsewhere_stands_in_the_way_of_an_offline_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "prefect_api_url", lambda: "http://192.0.2.1:4200/api")
    for offline in (False, True):
        checks = examine(resolve(None, {"privacy.offline": offline}), [], Console(quiet=True))
        server = next(check for check in checks if check.name == "Prefect server")
        assert server.works is not offline
    assert server.needed
    assert "PREFECT_API_URL" in server.remedy


def test_config_lists_every_key_with_a_default_that_toml_can_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["config", "--json"])
    printed = capsys.readouterr()
    keys = {row["key"]: row for row in json.loads(printed.out)["keys"]}
    assert ended.value.code == 0
    assert all(row["meaning"] for row in keys.values())
    defaults = Settings().model_dump(mode="json")
    for name, row in keys.items():
        section, key = name.split(".")
        expected = defaults[section][key]
        written = "" if row["default"] == "none" else f"value = {row['default']}"
        assert tomllib.loads(written).get("value") == expected, name
    # Further endpoints are a list of tables: one line says so.
    assert keys["vlm.also"]["default"] == "[]"
    assert "[[vlm.also]]" in keys["vlm.also"]["meaning"]
    # A sentence that spans lines in the source is one text here, and is folded for people.
    assert "\n" not in keys["vlm.base_url"]["meaning"]
    assert max(map(len, printed.err.splitlines())) <= 100


def test_a_blind_endpoint_makes_the_command_fail_with_the_remedy(
    blind: Simulator, medmicn: Callable[..., Ended]
) -> None:
    flags = ("--set", f"vlm.base_url={blind.base_url}", "--set", f"vlm.model={MODEL}", "--set", "privacy.offline=true")
    ended = medmicn("doctor", "--probe", *flags)
    assert (ended.exit_code, ended.outcome["exit_code"]) == (5, 5)
    by_name = {check["name"]: check for check in ended.outcome["checks"]}
    assert by_name["python"]["works"]
    assert by_name["offline"]["works"]
    assert not by_name["probe now"]["works"]
    assert "does not see images" in by_name["probe now"]["finding"]
    assert "--mmproj" in by_name["probe now"]["remedy"]
    assert "✗ probe now" in ended.messages
    assert "does not work: probe now" in ended.messages
    assert by_name["probe now"]["remedy"] in ended.messages
