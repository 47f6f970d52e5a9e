"""The command line of the simulator."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import signal
import sys
import threading
from pathlib import Path

from .completion import Manner
from .endpoint import Endpoint
from .faults import fault_of
from .names import MAX_HEAD_BYTES
from .witness import Noise, Witness


async def serve(endpoint: Endpoint, port: int, stop_after_s: float, *, stop_with_stdin: bool) -> None:
    """Listen until told to stop, until the time is over, or until standard input ends."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    server = await asyncio.start_server(endpoint.connected, "127.0.0.1", port, limit=MAX_HEAD_BYTES, backlog=1024)
    loop.call_later(stop_after_s, stop.set)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if stop_with_stdin:
        threading.Thread(target=_await_end_of_stdin, args=(loop, stop), daemon=True).start()
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await stop.wait()
    server.close()


def _await_end_of_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    while os.read(0, 4096):
        pass
    loop.call_soon_threadsafe(stop.set)


def read_truth(path: Path) -> tuple[dict[str, dict[str, bool]], dict[str, Noise]]:
    """Truth by image and concept, and the noise of single concepts, from a JSON file; raises `ValueError`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    noise = {concept_id: Noise(**values) for concept_id, values in content.pop("noise", {}).items()}
    for image_sha256, row in content.items():
        if not re.fullmatch("[0-9a-f]{64}", image_sha256) or not all(isinstance(v, bool) for v in row.values()):
            raise ValueError(
                f"{path}: expected {{sha256: {{concept_id: true or false}}}}, got {image_sha256!r}: {row!r}"
            )
    return content, noise


def _share(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value


def _seconds(text: str) -> float:
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, got {text}")
    return value


def _named_fault(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    try:
        parsed = json.loads(value) if equals else 1
        fault_of(name, parsed)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name, parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=sys.modules[__package__].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--port", type=int, default=0, help="0: any free one")
    add("--seed", type=int, default=0, help="of errors, latencies and faults")
    add("--latency-s", type=_seconds, default=0.0)
    add("--latency-jitter-s", type=_seconds, default=0.0, help="latency varies by so much to either side")
    add("--truth", type=Path, help="JSON file of what is true")
    add("--prevalence", type=_share, default=0.4, help="share of present concepts in a pseudo-truth")
    add("--sensitivity", type=_share, default=0.9, help="chance that a present concept is called present")
    add("--specificity", type=_share, default=0.9, help="chance that an absent concept is called absent")
    add("--uncertain-share", type=_share, default=0.0, help="share of questions answered uncertain")
    add("--wavering-share", type=_share, default=0.0, help="share of answers that a sampling seed changes")
    add("--model", action="append", default=[], help="a name it knows (several times); none: every name")
    add("--api-key", help="the only key it accepts; none: every key")
    add("--blind", action="store_true", help="answers whatever the pixels")
    add("--no-schema", action="store_true", help="ignores response_format: prose around fenced JSON")
    add("--no-usage", action="store_true", help="does not tell tokens")
    add("--no-logprobs", action="store_true", help="does not tell log-probabilities")
    add("--batch-seconds", type=_seconds, default=2.0, help="time from creating a batch to its end")
    add("--batch-failure-share", type=_share, default=0.0, help="share of a batch's lines that fail")
    add("--fault", type=_named_fault, action="append", default=[], metavar="NAME=VALUE")
    add("--stop-after-s", type=_seconds, default=900.0)
    add("--stop-with-stdin", action="store_true", help="ends when standard input does")
    return parser


def main() -> None:
    given = _parser().parse_args()
    try:
        truth, noise_of = read_truth(given.truth) if given.truth else ({}, {})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        sys.exit(f"--truth: {error}")
    witness = Witness(
        seed=given.seed,
        noise=Noise(given.sensitivity, given.specificity),
        noise_of=noise_of,
        truth=truth,
        prevalence=given.prevalence,
        uncertain_share=given.uncertain_share,
        wavering_share=given.wavering_share,
        is_blind=given.blind,
    )
    manner = Manner(
        seed=given.seed,
        latency_s=given.latency_s,
        latency_jitter_s=given.latency_jitter_s,
        models=tuple(given.model),
        api_key=given.api_key,
        keeps_schema=not given.no_schema,
        reports_usage=not given.no_usage,
        reports_logprobs=not given.no_logprobs,
        batch_seconds=given.batch_seconds,
        batch_failure_share=given.batch_failure_share,
    )
    endpoint = Endpoint(witness, manner, dict(given.fault))
    try:
        asyncio.run(serve(endpoint, given.port, given.stop_after_s, stop_with_stdin=given.stop_with_stdin))
    except OSError as error:
        sys.exit(f"port {given.port} of 127.0.0.1: {error}; give another --port, or 0 for any free one")
