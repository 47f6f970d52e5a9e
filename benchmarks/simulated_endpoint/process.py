"""The simulator in a process of its own, for tests and benchmarks."""

from __future__ import annotations

import http.client
import json
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from .names import JsonObject


class Simulator:
    """A simulator in a process of its own, for tests and benchmarks; it ends with the `with` block."""

    def __init__(self, *arguments: object, start_timeout_s: float = 30.0) -> None:
        """A simulator with these command-line arguments, not yet started."""
        self._command = [sys.executable, str(Path(__file__).parent), "--stop-with-stdin", *map(str, arguments)]
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[str] | None = None
        self.base_url = ""
        """Address for an OpenAI client, once started."""

    def __enter__(self) -> Self:
        """Start it; raises `RuntimeError` when no address comes in time."""
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process = process
        assert process.stdout is not None
        nothing: list[int] = []
        is_ready, _, _ = select.select([process.stdout], nothing, nothing, self._start_timeout_s)
        self.base_url = process.stdout.readline().strip() if is_ready else ""
        if not self.base_url:
            self.stop()
            raise RuntimeError(f"The simulator printed no address in {self._start_timeout_s} s: {self._command}")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._started().pid

    @property
    def is_running(self) -> bool:
        """Whether its process still lives."""
        return self._started().poll() is None

    def wait(self, timeout_s: float) -> int:
        """Its exit code, once it has ended by itself; raises `subprocess.TimeoutExpired`."""
        return self._started().wait(timeout_s)

    def close_stdin(self) -> None:
        """What happens to it when its parent dies."""
        stdin = self._started().stdin
        assert stdin is not None
        stdin.close()

    def stop(self) -> None:
        """End it, whatever it is doing."""
        process = self._started()
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()

    def state(self) -> JsonObject:
        """What it has seen and done so far: the fields of `Tally`."""
        return self._call("GET", "/simulator/state")

    def set_faults(self, plan: Mapping[str, object]) -> None:
        """Replace the plan of faults; raises `ValueError` with the simulator's words for a plan it cannot read."""
        self._call("POST", "/simulator/faults", json.dumps(plan))

    def _call(self, method: str, path: str, body: str | None = None) -> JsonObject:
        # Not urllib: a proxy from the environment has no business here.
        connection = http.client.HTTPConnection(self.base_url.split("/")[2], timeout=30)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            content: JsonObject = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(content["error"]["message"])
        return content

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise RuntimeError("The simulator is not started; use it in a with block.")
        return self._process
