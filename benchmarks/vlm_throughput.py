"""How fast images are judged at a remote endpoint: the client's own work, and what latency leaves of it.

    python benchmarks/vlm_throughput.py [--images 1500] [--latency-s 1.0] [--in-flight 64]

The simulated endpoint is a process of its own behind real HTTP. Images are JPEG files of 512 px on the disk: they are
decoded, encoded anew, asked about in shards as the judge step does it, journalled and written to the ledger.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))

from simulated_endpoint import Simulator

from data_contracts.store import RunFolder
from flows.chain import Context, StepReport, execute
from flows.console import Console
from flows.settings import Settings, resolve
from flows.steps import INGEST, STEPS, begin

N_CONCEPTS = 12
SIDE_PX = 512


def make_images(folder: Path, n_images: int, seed: int = 0) -> None:
    """Smooth random pictures, each a file of its own content."""
    rng = np.random.default_rng(seed)
    for n in range(n_images):
        small = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
        image.save(folder / f"{n:06d}.jpg", quality=92)


def judged(run: Path, source: Path, base_url: str, changes: dict[str, object]) -> StepReport:
    """The report of the judge step on a fresh run folder."""
    settings: Settings = resolve(None, {"vlm.base_url": base_url, "vlm.model": "simulated", **changes})
    context = Context(begin(source, RunFolder(run), settings), settings, Console(quiet=True))
    execute(INGEST, context)
    execute(STEPS["concepts"], context)
    return execute(STEPS["judge"], context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--latency-s", type=float, default=1.0)
    parser.add_argument("--in-flight", type=int, default=64)
    arguments = parser.parse_args()
    print("| endpoint | images | judge step s | images/s | of the ideal | CPU ms an image | peak memory MB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "images"
        source.mkdir()
        make_images(source, arguments.images)
        words = Path(folder) / "concepts.csv"
        words.write_text("name\n" + "\n".join(f"visual concept {k}" for k in range(N_CONCEPTS)))
        for latency_s in (0.0, arguments.latency_s):
            with Simulator("--latency-s", str(latency_s), "--model", "simulated") as simulator:
                before = resource.getrusage(resource.RUSAGE_SELF)
                changes = {"vlm.concurrency": arguments.in_flight, "concepts.file": str(words)}
                report = judged(Path(folder) / f"run-{latency_s}", source, simulator.base_url, changes)
                after = resource.getrusage(resource.RUSAGE_SELF)
            cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            per_s = arguments.images / report.seconds
            ideal = "–" if not latency_s else f"{per_s / (arguments.in_flight / latency_s):.3f}"
            print(
                f"| latency {latency_s:g} s, {arguments.in_flight} in flight | {arguments.images} | "
                f"{report.seconds:.1f} | {per_s:.1f} | {ideal} | {1e3 * cpu_s / arguments.images:.1f} | "
                f"{after.ru_maxrss / 1e3:.0f} |"
            )


if __name__ == "__main__":
    main()
