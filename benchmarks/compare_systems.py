"""Every system, five seeds, both protocols, on WBCAtt with expert concepts and on COVID-CT: the README's table.

    python benchmarks/compare_systems.py wbcatt [--protocol clean|paper|both] [--systems black-box,cem,…]
    python benchmarks/compare_systems.py covid-ct [--run DIR]

wbcatt: 31 attribute values that experts labelled, as given concepts; 1,500/300/600 images. covid-ct: the official split
by patient; concepts of a finished run folder, which is made first where none is named. Frozen embedded backbone; every
setting is the default or given by --set, and was chosen on validation images. A run that is stopped goes on where it
was when --cache names a folder.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from wbcatt_data import read_dataset

from data_contracts.dataset import AlignedDataset
from data_contracts.ports import PixelReader, Pixels
from data_contracts.store import RunFolder
from flows.comparison import as_markdown, chosen_protocols, write_comparison
from flows.settings import parse_assignment
from model.compare import CompareWatch, Design, compare
from model.config import TrainConfig
from model.presets import PRESETS
from model.systems.registry import SYSTEMS, System


def dataset_of(name: str, folder: Path, run: Path | None, scratch: Path) -> AlignedDataset:
    if name == "wbcatt" and run is None:
        return read_dataset(folder)
    if run is None:
        run = scratch / "run"
        command = ["run", str(folder), "--run", str(run), "--yes", "--quiet", "--modality", "chest CT"]
        subprocess.run(
            [sys.executable, "-m", "flows.cli", *command, "--set", "train.epochs=1", "--set", "train.seeds=[0]"],
            check=True,
        )
    return RunFolder(run).read_dataset()


def reader_of(dataset: AlignedDataset, folder: Path) -> PixelReader:
    paths = dict(zip(dataset.image_ids, dataset.frame["path"], strict=True))

    def read(image_id: str) -> Pixels:
        return np.asarray(Image.open(folder / paths[image_id]).convert("RGB"))

    return read


def systems_of(options: argparse.Namespace) -> list[System]:
    if options.preset:
        return list(PRESETS[options.preset].systems)
    names = list(SYSTEMS) if options.systems == "all" else options.systems.split(",")
    return [SYSTEMS[name] for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("MEDMICN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("data_set", choices=["wbcatt", "covid-ct"])
    parser.add_argument("--data", type=Path, default=default, help="folder that holds wbcatt/ and covid-ct/")
    parser.add_argument("--run", type=Path, help="finished run folder whose data set is used")
    parser.add_argument("--cache", type=Path, help="where features and results are kept; default: a temporary folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--systems", default="all")
    parser.add_argument("--preset", choices=[name for name in PRESETS if name != "filter-ablation"])
    parser.add_argument("--protocol", default="both", choices=["clean", "paper", "both"])
    parser.add_argument("--reference", default=None)
    parser.add_argument("--split", default="test", choices=["test", "val"], help="val: to choose settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of [train]")
    parser.add_argument("--out", type=Path, help="folder for comparison.csv, comparison_pairs.csv and comparison.md")
    options = parser.parse_args()
    changes = dict(parse_assignment(f"train.{one}") for one in options.set)
    common = TrainConfig.model_validate(
        {"seeds": tuple(options.seeds), **{key.removeprefix("train."): value for key, value in changes.items()}}
    )
    folder, started_s = options.data / options.data_set, time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        dataset = dataset_of(options.data_set, folder, options.run, Path(scratch))

        def heard(name: str, seed: int, reused: bool) -> None:
            print(f"{time.perf_counter() - started_s:6.0f} s  {name}, seed {seed}{' (kept)' if reused else ''}",
                  file=sys.stderr)  # fmt: skip

        found = compare(
            dataset,
            reader_of(dataset, folder),
            common,
            Design(systems_of(options), chosen_protocols(options.protocol), options.reference, options.split),
            cache_dir=options.cache or Path(scratch) / "cache",
            watch=CompareWatch(on_trial=heard),
        )
    n_concepts = len(dataset.vocabulary)
    title = f"{options.data_set}: {n_concepts} concepts, {len(options.seeds)} seeds, {options.split} images"
    print(as_markdown(found, title=title))
    print(f"{time.perf_counter() - started_s:.0f} s in all")
    if options.out:
        write_comparison(options.out, found, title=title)


if __name__ == "__main__":
    main()
