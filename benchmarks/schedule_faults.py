"""Runs that repeat, under faults: is anything lost, is anything done twice?

    python benchmarks/schedule_faults.py [--kills 10] [--only rounds|served]

`rounds`: images arrive in batches, some of them while a round works; rounds are ended by `kill -9` at random instants.
`served`: a real scheduler with a Prefect server of its own. The scheduler and its flow run are killed in the middle of
a run, a second scheduler is started beside the first, the server is killed and so restarted; meanwhile images arrive.

At the end every image must be there once, with one label a concept; every question must have been asked and answered
once but for those under way at a kill; the models must be numbered without gaps, one of them in use, and whole.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from annotation.vlm.journal import Journal
from data_contracts.store import RunFolder
from flows import promotion
from flows.candidate import unfinished
from flows.scheduling import server as servers
from model.checkpoint import load
from pipeline.phantoms import make_phantoms

SETTINGS = {
    "schedule.settle_s": "0.2",
    "schedule.retrain_after_new_images": "10",
    "schedule.max_loss": "1.0",
    "explain.n_maps_per_class": "0",
    "explain.n_map_evidence_images": "0",
    "flow.shard_size": "16",
    "train.seeds": "[0]",
}

ROUND = """
import sys
from pathlib import Path
from data_contracts.store import RunFolder
from flows.chain import Context, execute
from flows.console import Console
from flows.scheduling.rounds import scheduled
from flows.settings import parse_assignment, resolve
from flows.steps import begin
source, run = Path(sys.argv[1]), RunFolder(sys.argv[2])
settings = resolve(None, dict(parse_assignment(text) for text in sys.argv[3:]))
with run.lock():
    done = scheduled(Context(begin(source, run, settings), settings, Console(quiet=True)), execute)
print(done.state, *done.sentences, sep="\\n  ")
"""


class Arrivals:
    """Images that are copied into the source in batches."""

    def __init__(self, folder: Path, n_images: int) -> None:
        make_phantoms(folder / "all", n_images=n_images, seed=5, side_px=96)
        self.source = folder / "source"
        self._waiting = sorted((folder / "all" / "images").rglob("*.png"))
        random.Random(0).shuffle(self._waiting)
        self.n_arrived = 0

    def arrive(self, n: int) -> None:
        """Copy the next `n` images."""
        for path in self._waiting[:n]:
            to = self.source / path.parent.name / path.name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
        del self._waiting[:n]
        self.n_arrived += n


def check(run: RunFolder, arrivals: Arrivals, n_kills: int) -> None:
    images, labels = run.read_images(), run.read_labels()
    accepted = images[images["rejected"].isna()]
    assert len(images) == arrivals.n_arrived, (len(images), arrivals.n_arrived)
    assert accepted["image_id"].is_unique
    n_concepts = len(run.vocabulary())
    assert not labels.duplicated(["image_id", "concept_id"]).any()
    assert len(labels) == len(accepted) * n_concepts, (len(labels), len(accepted), n_concepts)
    ledger = run.read_judgements()
    key = ["image_id", "concept_id", "witness", "witness_model", "prompt_sha256"]
    n_twice = int(ledger.duplicated(key).sum())
    assert n_twice == 0, f"{n_twice} judgements twice"
    with Journal(run.journal_dir) as journal:
        n_lines, n_answers = journal.n_lines, len(journal)
        assert not journal.damage
    assert n_lines == n_answers, "no answer was bought twice"
    in_use = promotion.current(run)
    assert in_use is not None
    numbers = sorted([in_use.number, *(version.number for _, version in promotion.kept(run))])
    assert len(numbers) == len(set(numbers))
    load(run.model_dir)
    for folder, _ in promotion.kept(run):
        load(folder)
    assert not (run.models_dir / "switch.json").exists()
    assert unfinished(run) is None
    left = [path.name for path in run.path.rglob("*.partial")]
    print(f"| images | {len(images)} of {arrivals.n_arrived} |")
    print(f"| labels | {len(labels)} of {len(accepted) * n_concepts}, none twice |")
    print(f"| answers of the model | {n_answers}, none bought twice |")
    print(f"| models | {numbers}, in use {in_use.number}, all whole |")
    print(f"| kills | {n_kills}; temporary files left: {len(left)} |")


def rounds(folder: Path, n_kills: int) -> None:
    arrivals, run = Arrivals(folder, 150), RunFolder(folder / "run")
    command = [sys.executable, "-c", ROUND, str(arrivals.source), str(run.path)]
    command += [f"{key}={value}" for key, value in SETTINGS.items()]
    draw = random.Random(1)
    arrivals.arrive(60)
    began_s = time.monotonic()
    print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    whole_s = time.monotonic() - began_s
    for number in range(n_kills):
        arrivals.arrive(5)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
            instant_s = draw.uniform(2, whole_s)
            time.sleep(instant_s / 2)
            arrivals.arrive(2)
            try:
                process.wait(instant_s / 2)
                how = "had ended"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                how = "killed"
        print(f"round {number + 1}: {how} after {instant_s:.1f} s", flush=True)
    for _ in range(2):
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    check(run, arrivals, n_kills)


def served(folder: Path) -> None:
    arrivals, run, home = Arrivals(folder, 120), RunFolder(folder / "run"), folder / "home"
    home.mkdir()
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "3",
        "PREFECT_RUNNER_POLL_FREQUENCY": "2",
    }
    command = [sys.executable, "-m", "flows.cli", "schedule", str(arrivals.source), "--every", "10s"]
    command += ["--run", str(run.path)]
    command += [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    said = (folder / "said.log").open("ab")

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=variables, stdout=said, stderr=said, start_new_session=True)

    arrivals.arrive(60)
    scheduler = start()
    try:
        wait(run.journal_dir.is_dir, scheduler, "the first run asks the model")
        os.killpg(scheduler.pid, signal.SIGKILL)
        scheduler.wait()
        print("scheduler killed in the middle of its run", flush=True)
        scheduler = start()
        second = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert second.returncode == 2, second.stderr
        print(f"second scheduler: {second.stderr.strip().splitlines()[-1]}", flush=True)
        wait(lambda: promotion.current(run) is not None, scheduler, "a model is in use")
        arrivals.arrive(30)
        server = servers.found(home)
        assert server is not None
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        print("server killed", flush=True)
        wait(lambda: n_labelled(run) == 90, scheduler, "what arrived meanwhile is labelled")
        arrivals.arrive(30)
        wait(lambda: n_labelled(run) == 120, scheduler, "and what arrived then")
        wait(lambda: unfinished(run) is None and is_idle(run), scheduler, "everything is done")
        again = servers.found(home)
        assert again is not None
        print(f"server: process {server.pid}, then {again.pid}, the same address: {server.api_url == again.api_url}")
        runs = subprocess.run(
            [sys.executable, "-m", "prefect", "deployment", "ls"],
            env=variables | {"PREFECT_API_URL": again.api_url, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        print(f"deployments: {runs.count('annotate-then-train/')}")
        check(run, arrivals, 2)
    finally:
        if scheduler.poll() is None:
            os.killpg(scheduler.pid, signal.SIGKILL)
            scheduler.wait()
        servers.end(home)
        said.close()
        print(json.dumps((folder / "said.log").read_text(errors="replace")[-1500:]))


def n_labelled(run: RunFolder) -> int:
    return run.read_labels()["image_id"].nunique() if (run.path / "labels.parquet").is_file() else 0


def is_idle(run: RunFolder) -> bool:
    """Whether the report is newer than everything else that steps have done."""
    steps = run.read_manifest().steps
    return "report" in steps and steps["report"].finished_at == max(s.finished_at for s in steps.values())


def wait(done: Callable[[], bool], process: subprocess.Popen[bytes], what: str, limit_s: float = 300) -> None:
    began_s = time.monotonic()
    while not done():
        assert process.poll() is None, f"the scheduler ended before: {what}"
        assert time.monotonic() < began_s + limit_s, f"waited too long for: {what}"
        time.sleep(0.5)
    print(f"{what}: after {time.monotonic() - began_s:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--only", choices=["rounds", "served"])
    arguments = parser.parse_args()
    for name, proof in (("rounds", lambda folder: rounds(folder, arguments.kills)), ("served", served)):
        if arguments.only in {None, name}:
            with tempfile.TemporaryDirectory() as folder:
                print(f"\n## {name}\n", flush=True)
                proof(Path(folder))


if __name__ == "__main__":
    main()
