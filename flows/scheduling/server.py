"""The Prefect server that a schedule needs: the configured one, else the project's own, found again or started.

The project's own listens on 127.0.0.1, keeps its database under PREFECT_HOME, and lives in a session of its own: it
outlives the command that started it, so that a schedule survives a restart. PREFECT_HOME/medmicn-server.json says where
it is; the port stays the same from start to start, as far as it is free.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from data_contracts.errors import ConfigurationError, StepFailed
from data_contracts.files import write_text
from flows import prefect_defaults
from flows.scheduling.locks import locked
from flows.settings import prefect_api_url

HOST = "127.0.0.1"
RECORD_FILE, LOG_FILE, LOCK_FILE = "medmicn-server.json", "medmicn-server.log", "medmicn-server.lock"

_START_LIMIT_S = 180.0
_PATIENCE_S = 60.0
_POLL_S = 0.5
_END_LIMIT_S = 20.0
_LOG_TAIL = 3


@dataclass(frozen=True)
class Server:
    """A Prefect server that answers."""

    api_url: str
    pid: int | None = None
    """Of the project's own; None for one that is configured."""
    started_ticks: int = 0
    """When the system started that process: a number that was given to another process since is not this server."""
    is_new: bool = False

    @property
    def lives(self) -> bool:
        """Whether its process is there; False for a configured server, whose process nobody here knows."""
        return self.pid is not None and self.started_ticks > 0 and started_ticks(self.pid) == self.started_ticks

    @property
    def sentence(self) -> str:
        """Where it is, and how to end it."""
        if self.pid is None:
            return f"Prefect server: {self.api_url} (PREFECT_API_URL)"
        made = "started" if self.is_new else "found"
        ui = self.api_url.removesuffix("/api")
        return f"Prefect server: {made} at {ui}; it goes on after this command, `kill {self.pid}` ends it"


def obtain() -> Server:
    """A server that answers: the configured one, the project's own, or a new one, which this process's Prefect uses.

    Raises:
        ConfigurationError: PREFECT_API_URL is set, and nothing answers there.
        StepFailed: a new server did not start.
    """
    server = _configured() or _found_or_started()
    _use(server)
    return server


def reached() -> Server | None:
    """The configured server or the project's own, which this process's Prefect then uses; None is started.

    Raises `ConfigurationError` when PREFECT_API_URL is set, and nothing answers there.
    """
    server = _configured() or found(prefect_home())
    if server is not None:
        _use(server)
    return server


def _configured() -> Server | None:
    prefect_defaults.apply()
    url = prefect_api_url()
    return Server(require_answer(url)) if url and url != os.environ.get(_OWN) else None


_OWN = "MEDMICN_OWN_PREFECT_API_URL"
"""Set by `_use`, so that a second look in the same process does not take the project's own for a configured one."""


def require_answer(url: str) -> str:
    """The address, if a Prefect server answers there; raises `ConfigurationError` with the remedy."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10):
            return url
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ConfigurationError(
            f"PREFECT_API_URL: expected a running Prefect server at {url}, got: {error}",
            remedy="Start it (`prefect server start`), or `unset PREFECT_API_URL`: a schedule then has one of its own.",
        ) from error


def found(home: Path) -> Server | None:
    """The project's own server under this PREFECT_HOME, if its process lives and answers."""
    recorded = _recorded(home)
    return recorded if recorded is not None and recorded.lives and answers(recorded.api_url) else None


def end(home: Path) -> bool:
    """End the project's own server in order; False where none runs."""
    recorded = _recorded(home)
    if recorded is None or not recorded.lives:
        return False
    _end(recorded)
    return True


def prefect_home() -> Path:
    """Where Prefect keeps its database."""
    from prefect.settings import PREFECT_HOME

    return Path(PREFECT_HOME.value())


def started_ticks(pid: int) -> int:
    """When the process was started, in clock ticks since boot; 1 where the system does not tell, 0 where it is gone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return 0
    except PermissionError:
        return 1
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 1
    # A zombie has ended; only its parent has not looked yet.
    return 0 if fields[0] == "Z" else int(fields[19])


def _found_or_started() -> Server:
    home = prefect_home()
    end_s = time.monotonic() + _START_LIMIT_S
    while True:
        if (server := found(home)) is not None:
            return server
        with locked(home / LOCK_FILE) as holder:
            # Another process may have started one between the look and the lock.
            if holder is None:
                return found(home) or _start(home)
        if time.monotonic() > end_s:
            raise StepFailed(f"Prefect server: {holder.words} is starting one, and it does not answer.")
        time.sleep(_POLL_S)


def _start(home: Path) -> Server:
    recorded = _recorded(home)
    if recorded is not None and recorded.lives:
        if (slow := _patiently(recorded)) is not None:
            return slow
        # It lives and does not answer: two servers on one database would lock each other out.
        _end(recorded)
    port = _free_port(recorded)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    variables = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    with (home / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            command, env=variables, cwd=home, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    server = Server(f"http://{HOST}:{port}/api", process.pid, started_ticks(process.pid), is_new=True)
    write_text(home / RECORD_FILE, json.dumps(asdict(server)) + "\n")
    end_s = time.monotonic() + _START_LIMIT_S
    while not answers(server.api_url):
        if process.poll() is not None or time.monotonic() > end_s:
            what = f"it ended with code {process.returncode}" if process.poll() is not None else "it does not answer"
            _end(server)
            raise StepFailed(f"Prefect server: {what}{_last_words(home)}.", remedy=f"See {home / LOG_FILE}.")
        time.sleep(_POLL_S)
    return server


def _patiently(recorded: Server) -> Server | None:
    """The recorded server, once it answers; a machine at work may be slow, and that is no reason to kill its server."""
    end_s = time.monotonic() + _PATIENCE_S
    while recorded.lives:
        if answers(recorded.api_url):
            return recorded
        if time.monotonic() > end_s:
            return None
        time.sleep(_POLL_S)
    return None


def _use(server: Server) -> None:
    """Make it the Prefect API of this process and of those that it starts; a configured one is that already."""
    if server.pid is None:
        return
    from prefect.context import refresh_global_settings_context

    os.environ[_OWN] = os.environ["PREFECT_API_URL"] = server.api_url
    refresh_global_settings_context()


def _recorded(home: Path) -> Server | None:
    try:
        content = json.loads((home / RECORD_FILE).read_text(encoding="utf-8"))
        return Server(str(content["api_url"]), int(content["pid"]), int(content["started_ticks"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _free_port(recorded: Server | None) -> int:
    """The port of the last time, if it is free; else any."""
    last = int(recorded.api_url.rpartition(":")[2].partition("/")[0]) if recorded is not None else 0
    for port in (last, 0):
        with suppress(OSError), socket.create_server((HOST, port)) as listener:
            return int(listener.getsockname()[1])
    raise StepFailed(f"Prefect server: no port of {HOST} is free.")


def answers(api_url: str) -> bool:
    """Whether a Prefect server answers there."""
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _end(server: Server) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not server.lives or server.pid is None:
            return
        os.kill(server.pid, number)
        end_s = time.monotonic() + _END_LIMIT_S
        while server.lives and time.monotonic() < end_s:
            time.sleep(_POLL_S)


def _last_words(home: Path) -> str:
    lines = [line.strip() for line in (home / LOG_FILE).read_text(errors="replace").splitlines() if line.strip()]
    return f" ({' / '.join(lines[-_LOG_TAIL:])})" if lines else ""
