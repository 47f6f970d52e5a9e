"""What a large judging run holds in memory, and how long a journal of a million cells takes to open and go on.

    python benchmarks/vlm_memory.py judge --images 1000 10000 100000
    python benchmarks/vlm_memory.py resume --images 25000 --concepts 40

`judge`: simulated small images through the real judge step, ledger and journal, against an endpoint
in this process that answers at once. `resume`: the same step on a finished run: with its ledger, and with the ledger
lost and only the journal left. Each figure is of a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import httpx2
import numpy as np
import pandas as pd

from annotation.vlm.journal import Journal
from data_contracts.concepts import slug
from data_contracts.store import RunFolder
from data_contracts.tables import CONCEPTS, IMAGES
from flows.chain import Context, execute
from flows.console import Console
from flows.settings import resolve
from flows.steps import STEPS, begin

SIDE_PX = 48
_ANSWER_TOKENS = {"prompt_tokens": 900, "completion_tokens": 300}


def image_id(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def begun(folder: Path, n_images: int, n_concepts: int) -> Context:
    """A run folder with tables of simulated images and concepts."""
    (folder / "images").mkdir(exist_ok=True)
    flags = {"vlm.base_url": "http://127.0.0.1:9/v1", "vlm.model": "m", "vlm.probe": False, "vlm.concurrency": 32}
    settings = resolve(None, flags)
    run = begin(folder / "images", RunFolder(folder / "run"), settings)
    if not run.table_path(IMAGES).is_file():
        ids = [image_id(n) for n in range(n_images)]
        images = pd.DataFrame({"image_id": ids, "path": [f"{i}.png" for i in ids], "modality": "simulated"})
        run.write_images(images.reindex(columns=IMAGES.column_names))
        names = [f"visual concept {k}" for k in range(n_concepts)]
        concepts = pd.DataFrame({"concept_id": map(slug, names), "name": names, "position": range(n_concepts)})
        concepts = concepts.assign(definition="", origin="user", status="kept", proposed_for=[[]] * n_concepts)
        run.write_concepts(concepts.reindex(columns=CONCEPTS.column_names))
    return Context(run, settings, Console(quiet=True))


def read(image: str) -> np.ndarray:
    """Pixels that differ from image to image."""
    noise = np.frombuffer(bytes.fromhex(image) * (SIDE_PX * SIDE_PX * 3 // 32), np.uint8)
    return noise.reshape(SIDE_PX, SIDE_PX, 3)


def endpoint(request: httpx2.Request) -> httpx2.Response:
    """An answer that keeps the schema of the question."""
    if request.method == "GET":
        return httpx2.Response(200, json={"object": "list", "data": []})
    asked = json.loads(request.content)["response_format"]["json_schema"]["schema"]["properties"]
    verdict = {"state": "present", "probability": 0.75, "evidence": "a phrase as long as most of them are"}
    message = {"role": "assistant", "content": json.dumps(dict.fromkeys(asked, verdict))}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return httpx2.Response(200, json={"id": "x", "choices": [choice], "usage": _ANSWER_TOKENS})


def judge_once(folder: Path, n_images: int, n_concepts: int) -> None:
    """Run the judge step and print seconds, requests and peak memory as JSON."""
    context = begun(folder, n_images, n_concepts)
    with (
        patch("flows.steps.judge.image_reader", lambda _context: read),
        patch("flows.vlm.transport_for", lambda *_args, **_kw: httpx2.MockTransport(endpoint)),
    ):
        started = time.monotonic()
        report = execute(STEPS["judge"], context)
        seconds = time.monotonic() - started
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"seconds": seconds, "requests": report.counts["requests"], "peak_mb": peak_mb}))


def open_once(folder: Path) -> None:
    """Open the journal and print seconds, cells and peak memory as JSON."""
    started = time.monotonic()
    journal = Journal(folder / "run" / "journal")
    seconds = time.monotonic() - started
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"seconds": seconds, "cells": journal.n_cells, "peak_mb": peak_mb}))


def in_process(*arguments: object) -> dict[str, float]:
    """What one of the functions above prints in a process of its own."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["judge", "resume", "judge-once", "open-once"])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--concepts", type=int, default=12)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "judge-once":
        judge_once(arguments.folder, arguments.images[0], arguments.concepts)
    elif arguments.what == "open-once":
        open_once(arguments.folder)
    elif arguments.what == "judge":
        print("| images | cells | seconds | images/s | peak memory MB |\n|---|---|---|---|---|")
        for n in arguments.images:
            with tempfile.TemporaryDirectory() as name:
                flags = ("--images", n, "--concepts", arguments.concepts, "--folder", name)
                found = in_process("judge-once", *flags)
            rate = n / found["seconds"]
            print(f"| {n} | {n * arguments.concepts} | {found['seconds']:.0f} | {rate:.0f} | {found['peak_mb']:.0f} |")
    else:
        resume(arguments.images[0], arguments.concepts)


def resume(n_images: int, n_concepts: int) -> None:
    """Print what a finished run of this size takes to be found finished."""
    print("| what | cells | seconds | requests | peak memory MB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        flags = ("--images", n_images, "--concepts", n_concepts, "--folder", name)
        in_process("judge-once", *flags)
        opened = in_process("open-once", "--folder", name)
        print(f"| journal opened | {opened['cells']} | {opened['seconds']:.1f} | – | {opened['peak_mb']:.0f} |")
        manifest = RunFolder(Path(name) / "run").read_manifest()
        manifest.steps.clear()
        for what in ("with its ledger", "with the ledger lost"):
            if "lost" in what:
                shutil.rmtree(Path(name) / "run" / "judgements")
            # Without its receipt, so that the step looks at every cell.
            RunFolder(Path(name) / "run").write_manifest(manifest)
            found = in_process("judge-once", *flags)
            cells = n_images * n_concepts
            shown = f"{found['seconds']:.1f} | {found['requests']:.0f} | {found['peak_mb']:.0f}"
            print(f"| judge step {what} | {cells} | {shown} |")


if __name__ == "__main__":
    main()
