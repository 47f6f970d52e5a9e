"""`kill -9` during corrections, on a real server process over a real socket."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx2
import pytest

from data_contracts.store import RunFolder
from tests.pipeline.review.samples import IDS, expert_rows

N_KILLS = 10
STATES = ("present", "absent", "uncertain")

# Imports once and forks a server for every line: ten starts would be ten imports.
LAUNCHER = """
import os, signal, sys
import numpy, uvicorn
from data_contracts.store import RunFolder
from pipeline.review.app import create_app

def read(image_id):
    return numpy.zeros((30, 40, 3), numpy.uint8)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        app = create_app(RunFolder(sys.argv[1]), read, "t", reviewer="Dr A")
        uvicorn.run(app, host="127.0.0.1", port=int(line), log_level="critical", access_log=False)
        os._exit(0)
    print(pid, flush=True)
"""


@pytest.fixture
def launcher(run: RunFolder) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(run.path)],
        cwd=Path(__file__).parents[3],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def start(launcher: subprocess.Popen[str]) -> tuple[int, httpx2.Client]:
    """A server's process id, and a browser that it let in."""
    assert launcher.stdin is not None
    assert launcher.stdout is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launcher.stdin.write(f"{port}\n")
    launcher.stdin.flush()
    pid = int(launcher.stdout.readline())
    browser = httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False)
    deadline = time.monotonic() + 30
    while True:
        try:
            if browser.get("/?token=t").status_code == 303:
                return pid, browser
        except httpx2.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_ten_kills_lose_no_acknowledged_correction(launcher: subprocess.Popen[str], run: RunFolder) -> None:
    dice = random.Random(0)
    acknowledged: list[tuple[str, str]] = []
    for _ in range(N_KILLS):
        pid, browser = start(launcher)
        if acknowledged:
            image_id, state = acknowledged[-1]
            html = browser.get(f"/image/{image_id}").text
            assert f'value="{state}" aria-pressed="true" aria-label="red: {state}"' in html
        killer = threading.Timer(dice.uniform(0.05, 0.5), os.kill, (pid, signal.SIGKILL))
        killer.start()
        with closing(browser):
            while True:
                said = (dice.choice(IDS[:-1]), dice.choice(STATES))
                form = {"image_id": said[0], "concept_id": "red", "state": said[1], "back": "/static/icon.svg"}
                try:
                    answer = browser.post("/judge", data=form, headers={"origin": str(browser.base_url).rstrip("/")})
                except httpx2.TransportError:
                    break
                assert answer.status_code == 303
                acknowledged.append(said)
        killer.join()
    assert len(acknowledged) > N_KILLS
    rows = expert_rows(run)
    written = list(zip(rows["image_id"], rows["state"], strict=True))
    remaining = iter(written)
    # Every acknowledged one is there, in the order in which it was said.
    assert all(said in remaining for said in acknowledged)
    # Of the last one before each kill nobody knows whether it was taken.
    assert len(written) <= len(acknowledged) + N_KILLS
