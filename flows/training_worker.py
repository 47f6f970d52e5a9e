"""One of several processes that train together, as `torchrun` starts it: `python -m flows.training_worker RUN`.

It trains what the run folder's settings say and leaves the states of its seeds there; the command that started it
reads them, measures and writes the checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

from data_contracts.store import RunFolder
from flows.chain import Context
from flows.console import Console
from flows.settings import restored
from flows.steps.training import train_here


def work(folder: Path, *, quiet: bool) -> None:
    """Take part in the training of this run folder; only the first process speaks."""
    from model.parallel import joined

    run = RunFolder(folder)
    with joined() as processes:
        console = Console(quiet=quiet or not processes.is_first)
        train_here(Context(run, restored(run.read_manifest().config), console))


if __name__ == "__main__":
    work(Path(sys.argv[1]), quiet="--quiet" in sys.argv)
