"""What kills cost: a judging run is ended with SIGKILL again and again, and goes on each time.

    python benchmarks/vlm_kills.py [--images 2000] [--kills 20]

The command line runs in a process of its own against a simulated endpoint in another. In the end every cell must be
in the ledger once, and the endpoint may have been asked at most once an image, apart from what was in flight at a kill.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from simulated_endpoint import Simulator
from vlm_throughput import N_CONCEPTS, make_images

from annotation.vlm.journal import Journal
from data_contracts.store import RunFolder

IN_FLIGHT = 32
_LIMIT_S = 240


def command(verb: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "flows.cli", verb, *map(str, arguments), "--quiet"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name, Simulator("--latency-s", "0.3", "--model", "simulated") as simulator:
        folder, run = Path(name), RunFolder(Path(name) / "run")
        (folder / "images").mkdir()
        make_images(folder / "images", arguments.images)
        (folder / "concepts.csv").write_text("name\n" + "\n".join(f"visual concept {k}" for k in range(N_CONCEPTS)))
        settings = {"vlm.base_url": simulator.base_url, "vlm.model": "simulated", "vlm.concurrency": IN_FLIGHT}
        settings |= {"concepts.file": folder / "concepts.csv", "flow.shard_size": 100}
        flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        subprocess.run(command("ingest", folder / "images", "--run", run.path, *flags), check=True, timeout=_LIMIT_S)
        subprocess.run(command("concepts", "--run", run.path), check=True, timeout=_LIMIT_S)
        in_flight_at_kill, n_kills = [], 0
        every = arguments.images // (arguments.kills + 1)
        while n_kills < arguments.kills:
            process = subprocess.Popen(command("judge", "--run", run.path), stderr=subprocess.DEVNULL)
            # At a random moment of this run's part, whatever is going on then.
            goal = every * n_kills + rng.randint(every // 2, every)
            while process.poll() is None and simulator.state()["completed_answers"] < goal:
                time.sleep(0.01)
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            n_kills += 1
            in_flight_at_kill.append(simulator.state()["concurrency"])
        ended = subprocess.run(command("judge", "--run", run.path), check=False, timeout=_LIMIT_S)
        state = simulator.state()
        ledger = run.read_judgements()
        per_cell = ledger.groupby(["image_id", "concept_id"]).size()
        journal = Journal(run.journal_dir)
        n_probing = 6
        lost = state["chat_requests_received"] - n_probing - arguments.images
        print("| images | kills | exit code | cells | cells missing | cells twice | requests | of them again |", end="")
        print(" allowed | torn lines |\n|---|---|---|---|---|---|---|---|---|---|")
        n_cells = arguments.images * N_CONCEPTS
        print(
            f"| {arguments.images} | {n_kills} | {ended.returncode} | {n_cells} | {n_cells - len(per_cell)} | "
            f"{int((per_cell > 1).sum())} | {state['chat_requests_received'] - n_probing} | {lost} | "
            f"{IN_FLIGHT * n_kills} | {journal.n_torn} |"
        )
        sys.exit(0 if lost <= IN_FLIGHT * n_kills and len(per_cell) == n_cells and per_cell.max() == 1 else 1)


if __name__ == "__main__":
    main()
