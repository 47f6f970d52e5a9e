"""Time and memory of `medmicn run` on a folder, cold and again, as a person would start it.

    python benchmarks/end_to_end.py SOURCE --modality "blood smear microscopy" [--run DIR] [more flags of `run`]

Prints one line for each step, the metrics, wall time, peak resident memory, and the time of the same command once
everything is done (which starts no Prefect).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any, NamedTuple


class Measured(NamedTuple):
    """One command as a whole process."""

    seconds: float
    peak_mb: float
    outcome: dict[str, Any]


def measure(command: list[str]) -> Measured:
    """Run a command that prints one JSON object; its peak memory is the kernel's own count of that process."""
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{text}")
    return Measured(time.monotonic() - started, usage.ru_maxrss / 1024, json.loads(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    known, flags = parser.parse_known_args()
    command = [sys.executable, "-m", "flows.cli", "run", known.source, "--json", *flags]
    first, again = measure(command), measure(command)
    print("| step | seconds | counts |")
    print("|---|---|---|")
    for name, step in first.outcome["steps"].items():
        counts = ", ".join(f"{key} {value:g}" for key, value in step["counts"].items())
        print(f"| {name} | {step['seconds']:.1f} | {counts} |")
    print()
    print("| metric on the test split | mean | sd over seeds |")
    print("|---|---|---|")
    for name, value in first.outcome["metrics"].get("test", {}).get("over_seeds", {}).items():
        if value["mean"] is not None:
            print(f"| {name} | {value['mean']:.4f} | {value['sd'] or 0:.4f} |")
    print()
    print(f"whole command: {first.seconds:.1f} s, peak resident memory {first.peak_mb:.0f} MB")
    print(f"the same command again: {again.seconds:.1f} s, peak resident memory {again.peak_mb:.0f} MB")
    reused = all(step["reused"] for step in again.outcome["steps"].values())
    print(f"nothing done again: {'yes' if reused else 'no'}")


if __name__ == "__main__":
    main()
