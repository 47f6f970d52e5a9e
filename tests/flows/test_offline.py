"""Offline: nothing reaches another machine, whoever asks; this machine stays open, and people read what happened.

The guard of a process cannot be taken off again, so what it refuses is tried in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from data_contracts.errors import ConfigurationError, ExitCode, MedMicnError, SourceRefused
from data_contracts.manifest import RunManifest
from data_contracts.store import RunFolder
from flows import offline
from flows.cli import main
from flows.commands.common import settings_for
from flows.settings import resolve

ELSEWHERE = "192.0.2.1"
"""An address that is reserved for documentation: nobody answers there."""

_PROGRAM = """
import asyncio, json, os, socket, subprocess, sys, threading, time, urllib.request, _socket
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx2
import huggingface_hub.constants
from flows.offline import GUARD, forbid_other_machines

forbid_other_machines()
forbid_other_machines()
NAME, ELSEWHERE = "example.org", "192.0.2.1"


class Here(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"here")

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), Here)
threading.Thread(target=server.serve_forever, daemon=True).start()
port = server.server_port
tcp, udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
pair = socket.socketpair()


async def fetched(url):
    async with httpx2.AsyncClient(timeout=5) as client:
        return (await client.get(url)).text


def unix_socket():
    path = sys.argv[1]
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as caller:
        listener.bind(path)
        listener.listen()
        caller.connect(path)


attempts = {
    "connect to an address": lambda: tcp.connect((ELSEWHERE, 80)),
    "connect to a name": lambda: tcp.connect((NAME, 80)),
    "connect_ex": lambda: tcp.connect_ex((NAME, 80)),
    "connect below the class": lambda: _socket.socket().connect((ELSEWHERE, 80)),
    "connect by IPv6 to IPv4": lambda: socket.socket(socket.AF_INET6).connect((f"::ffff:{ELSEWHERE}", 80)),
    "sendto": lambda: udp.sendto(b"x", (ELSEWHERE, 53)),
    "sendto with flags": lambda: udp.sendto(b"x", 0, (NAME, 53)),
    "sendmsg": lambda: udp.sendmsg([b"x"], [], 0, (ELSEWHERE, 53)),
    "bind to a name": lambda: udp.bind((NAME, 0)),
    "getaddrinfo": lambda: socket.getaddrinfo(NAME, 80),
    "getaddrinfo of bytes": lambda: socket.getaddrinfo(NAME.encode(), 80),
    "gethostbyname": lambda: socket.gethostbyname(NAME),
    "gethostbyname_ex": lambda: socket.gethostbyname_ex(NAME),
    "gethostbyaddr": lambda: socket.gethostbyaddr(ELSEWHERE),
    "getnameinfo": lambda: socket.getnameinfo((ELSEWHERE, 80), 0),
    "urllib": lambda: urllib.request.urlopen(f"http://{NAME}/", timeout=5),
    "httpx2": lambda: asyncio.run(fetched(f"http://{NAME}/")),
    "here by urllib": lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read().decode(),
    "here by name": lambda: urllib.request.urlopen(f"http://localhost:{port}/", timeout=5).read().decode(),
    "here by httpx2": lambda: asyncio.run(fetched(f"http://127.0.0.1:{port}/")),
    "here by datagram": lambda: udp.sendto(b"x", ("127.0.0.1", port)),
    "here by Unix socket": unix_socket,
    "a pair of sockets": lambda: pair[0].sendmsg([b"x"]),
    "any address of its own": lambda: socket.getaddrinfo(None, 0, flags=socket.AI_PASSIVE) and None,
}


def tried(attempt):
    started = time.monotonic()
    try:
        result = attempt()
        said = None
    except Exception as error:
        result, said = type(error).__name__, str(error)
    return {"result": result, "said": said, "seconds": time.monotonic() - started}


found = {name: tried(attempt) for name, attempt in attempts.items()}
child = "import json, os; print(json.dumps(dict(os.environ)))"
environment = json.loads(subprocess.run([sys.executable, "-c", child], capture_output=True, check=True).stdout)
print(json.dumps({
    "attempts": found,
    "refused": GUARD.refused,
    "environment": environment,
    "hub": huggingface_hub.constants.HF_HUB_OFFLINE,
}))
os._exit(0)
"""


class Ended(NamedTuple):
    found: dict[str, Any]
    said: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Ended:
    """A process that is offline and tries everything, begun with a proxy on this machine."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    variables = clean | {"HTTP_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "COLUMNS": "200"}
    socket_path = tmp_path_factory.mktemp("unix") / "s"
    ran = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(socket_path)],
        cwd=repository,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return Ended(json.loads(ran.stdout), ran.stderr)


@pytest.mark.parametrize(
    "attempt",
    [
        "connect to an address",
        "connect to a name",
        "connect_ex",
        "connect below the class",
        "connect by IPv6 to IPv4",
        "sendto",
        "sendto with flags",
        "sendmsg",
        "bind to a name",
        "getaddrinfo",
        "getaddrinfo of bytes",
        "gethostbyname",
        "gethostbyname_ex",
        "gethostbyaddr",
        "getnameinfo",
    ],
)
def test_whoever_asks_for_another_machine_is_refused_before_anything_is_sent(ended: Ended, attempt: str) -> None:
    tried = ended.found["attempts"][attempt]
    # The error itself shows that nothing was asked: a name server would have answered with `gaierror`.
    assert tried["result"] == "OtherMachineRefused"
    assert "nothing was sent" in tried["said"]
    assert "--offline" in tried["said"]
    assert tried["seconds"] < 2


@pytest.mark.parametrize(("attempt", "expected"), [("urllib", "URLError"), ("httpx2", "ConnectError")])
def test_libraries_take_it_for_a_connection_that_failed(ended: Ended, attempt: str, expected: str) -> None:
    tried = ended.found["attempts"][attempt]
    assert tried["result"] == expected
    assert "privacy.offline" in tried["said"]


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        ("here by urllib", "here"),
        ("here by name", "here"),
        ("here by httpx2", "here"),
        ("here by datagram", 1),
        ("here by Unix socket", None),
        ("a pair of sockets", 1),
        ("any address of its own", None),
    ],
)
def test_this_machine_stays_open(ended: Ended, attempt: str, expected: object) -> None:
    tried = ended.found["attempts"][attempt]
    assert (tried["result"], tried["said"]) == (expected, None)


def test_each_refusal_is_said_once_even_where_a_library_keeps_quiet(ended: Ended) -> None:
    assert ended.said.count("a look-up of example.org was refused") == 1
    assert ended.said.count("a connection to 192.0.2.1, port 80 was refused") == 1
    assert len(ended.found["refused"]) == len(set(ended.found["refused"]))


def test_children_are_told_and_know_no_proxy(ended: Ended) -> None:
    environment = ended.found["environment"]
    assert environment["HF_HUB_OFFLINE"] == environment["TRANSFORMERS_OFFLINE"] == "1"
    assert environment["HF_DATASETS_OFFLINE"] == environment["DO_NOT_TRACK"] == "1"
    assert not {name for name in environment if name.lower() in {"http_proxy", "https_proxy", "all_proxy"}}
    assert environment["NO_PROXY"] == "*"


def test_a_library_that_was_imported_before_is_told_too(ended: Ended) -> None:
    assert ended.found["hub"] is True


def test_the_refusal_is_an_error_for_people_and_for_libraries() -> None:
    error = offline.OtherMachineRefused("a connection to example.org, port 443")
    assert isinstance(error, OSError)
    assert isinstance(error, MedMicnError)
    assert error.exit_code == ExitCode.CONFIGURATION
    assert error.errno is not None


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bool]:
    """Filled once other machines are forbidden, without doing so to this process."""
    monkeypatch.chdir(tmp_path)
    calls: list[bool] = []
    monkeypatch.setattr(offline, "forbid_other_machines", lambda: calls.append(True))
    return calls


def test_every_verb_obeys_as_soon_as_its_settings_are_known(forbidden: list[bool], tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    settings_for(run, None, {})
    assert forbidden == []
    settings_for(run, None, {"privacy.offline": True})
    assert forbidden == [True]
    # A run that was begun offline stays so.
    run.write_manifest(
        RunManifest.new("run", str(tmp_path)).model_copy(update={"config": {"privacy": {"offline": True}}})
    )
    settings_for(run, None, {})
    assert forbidden == [True, True]


def test_the_flow_and_its_tasks_obey_in_their_own_processes(forbidden: list[bool], tmp_path: Path) -> None:
    from flows.annotate_then_train import annotate_then_train, run_shard

    config = resolve(None, {"privacy.offline": True}).model_dump(mode="json")
    with pytest.raises(SourceRefused):
        annotate_then_train.fn(str(tmp_path / "nowhere"), str(tmp_path / "run"), config)
    assert forbidden == [True]
    run_shard.fn("title", 0, "operator:is_", {}, str(tmp_path / "run"), config)
    assert forbidden == [True, True]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], forbidden: list[bool]) -> Callable[..., tuple[int, str]]:
    """The command line in this process: exit code, and what is said."""

    def call_it(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        assert isinstance(ended.value.code, int)
        return ended.value.code, capsys.readouterr().err

    return call_it


@pytest.mark.parametrize("verb", ["run", "annotate", "estimate"])
def test_the_flag_and_an_address_elsewhere_contradict_each_other(
    call: Callable[..., tuple[int, str]], tmp_path: Path, verb: str
) -> None:
    endpoint = ("--base-url", f"http://{ELSEWHERE}/v1", "--model", "m")
    exit_code, said = call(verb, tmp_path, "--run", tmp_path / "run", *endpoint, "--offline")
    assert exit_code == 2
    assert "privacy.offline" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["ingest SOURCE", "judge", "train", "doctor", "predict SOURCE", "audit score"])
@pytest.mark.parametrize("address", ["https://api.openai.com/v1", "http://localhost.example.org/v1"])
def test_other_verbs_refuse_it_by_their_settings(
    call: Callable[..., tuple[int, str]], tmp_path: Path, verb: str, address: str
) -> None:
    run = RunFolder(tmp_path / "run")
    run.write_manifest(RunManifest.new("run", str(tmp_path.resolve())))
    settings = {"privacy.offline": "true", "vlm.base_url": address, "vlm.model": "m"}
    flags = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    exit_code, said = call(*verb.replace("SOURCE", str(tmp_path)).split(), "--run", run.path, *flags)
    assert exit_code == 2
    assert address in said


@pytest.mark.parametrize("address", ["http://127.0.0.1:11434/v1", "http://[::1]:8000/v1", "http://LOCALHOST:1234/v1"])
def test_a_server_on_this_machine_is_no_other_machine(address: str) -> None:
    settings = resolve(None, {"privacy.offline": True, "vlm.base_url": address, "vlm.model": "m"})
    assert settings.vlm.is_loopback


def test_a_further_witness_elsewhere_is_refused_too(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f'[privacy]\noffline = true\n[[vlm.also]]\nbase_url = "http://{ELSEWHERE}/v1"\nmodel = "m"\n')
    with pytest.raises(ConfigurationError, match=ELSEWHERE):
        resolve(file)
