"""A temporary Prefect server for one command, where none is configured: Ctrl-C leaves it alone, no kill orphans it.

Prefect would start one by itself, within the terminal's process group. Ctrl-C reaches the whole group, so that server
is gone before the flow could tell it of its end, and the flow asks it in vain for a minute and more; after `kill -9` it
stays. This one has a session of its own and watches the process that started it.
"""

from __future__ import annotations

import atexit
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from typing import IO

from data_contracts.errors import StepFailed
from flows import prefect_defaults
from flows.settings import prefect_api_url

_HOST = "127.0.0.1"
_GRACE_S = 5.0
"""For the server to end in order; Prefect gives its own as much."""
_WATCH_INTERVAL_S = 0.5
_REMEDY = (
    "Give the same command again; or, in another terminal: `prefect server start`, and here: "
    "`export PREFECT_API_URL=http://127.0.0.1:4200/api` before the command."
)


def begin() -> TemporaryServer | None:
    """The server that now starts for this process and is its Prefect API; None where a Prefect API is configured.

    What is imported of Prefect meanwhile costs no time. It ends with this process, not earlier: Prefect's threads hand
    over their last events and logs after the flow, when the interpreter ends.
    """
    prefect_defaults.apply()
    from prefect.context import refresh_global_settings_context
    from prefect.settings import get_current_settings

    ephemeral = get_current_settings().server.ephemeral
    if prefect_api_url() or not ephemeral.enabled:
        return None
    server = TemporaryServer(limit_s=ephemeral.startup_timeout_seconds)
    atexit.register(server.stop)
    # Prefect's threads do not inherit a settings context, so it is told to the whole process.
    os.environ["PREFECT_API_URL"] = server.api_url
    refresh_global_settings_context()
    return server


class TemporaryServer:
    """A Prefect server on a free loopback port, in a process and a session of its own."""

    def __init__(self, *, limit_s: float) -> None:
        """Begin to start it; `limit_s` is how long that may take."""
        self._limit_s = limit_s
        self._began_s = time.monotonic()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the server)
        # It listens before the server runs: no other program can take the port, and who asks early waits in line.
        with socket.create_server((_HOST, 0)) as listener:
            self._port: int = listener.getsockname()[1]
            self._process = _start(listener, self._said)

    @property
    def api_url(self) -> str:
        """What `PREFECT_API_URL` is to be."""
        return f"http://{_HOST}:{self._port}/api"

    def wait_until_healthy(self) -> None:
        """Return once it answers; raises `StepFailed` when it ends or takes too long."""
        rest_s = max(self._began_s + self._limit_s - time.monotonic(), 0.1)
        # Neither a proxy of the environment nor a retry is wanted: the answer comes when the server is ready.
        connection = http.client.HTTPConnection(_HOST, self._port, timeout=rest_s)
        try:
            connection.request("GET", "/api/health")
            found = f"it answered with status {connection.getresponse().status}"
        except TimeoutError:
            found = f"no answer within {self._limit_s:.0f} s"
        except (OSError, http.client.HTTPException):
            found = "it ended"
        finally:
            connection.close()
        if found != "it answered with status 200":
            message = f"Prefect's temporary server did not start: {found}{self._last_words()}."
            self.stop()
            raise StepFailed(message, remedy=_REMEDY)

    def stop(self) -> None:
        """End it, and return when it has ended."""
        self._process.terminate()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            self._said.close()

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = [line.strip() for line in self._said.read().decode(errors="replace").splitlines()]
        return next((f" ({line})" for line in reversed(lines) if line), "")


def _start(listener: socket.socket, said: IO[bytes]) -> subprocess.Popen[bytes]:
    # The folder a person stands in must not provide modules, unless it does so for this process too.
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PREFECT_UI_ENABLED": "0"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "flows.prefect_server", str(listener.fileno()), str(os.getpid())],
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=said,
        pass_fds=[listener.fileno()],
        start_new_session=True,
    )


def _serve(listener_fd: int, starter_pid: int) -> None:
    """Serve Prefect's API on a socket that listens already, as long as the starter lives."""
    threading.Thread(target=end_with, args=(starter_pid,), daemon=True).start()
    import uvicorn
    from prefect.server.api.server import create_app

    app = partial(create_app, ephemeral=True, final=True)
    config = uvicorn.Config(app, factory=True, lifespan="on", log_level="error", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=listener_fd)])


def end_with(starter_pid: int) -> None:
    """End this process when its parent is no longer the starter: in order, and by force if that takes too long."""
    while os.getppid() == starter_pid:
        time.sleep(_WATCH_INTERVAL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
