"""How often the drift watch cries wolf, and what it sees: halves of one data set, and the same images changed.

    medmicn run DATA/wbcatt --run runs/wbcatt
    python benchmarks/drift_false_alarms.py --run runs/wbcatt --other DATA/covid-ct/images

False alarms: baseline and new images are drawn from one run without overlap, so every alarm is a false one. Shifts:
the drawn new images are changed before they are measured (darker, blurred, compressed, more yellow), are of one class
only, or come from another data set; every run without an alarm is a miss. The rates come with Wilson's 95 % interval.
"""

from __future__ import annotations

import argparse
import io
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageFilter

from data_contracts.errors import ImageRejected
from data_contracts.store import RunFolder
from flows.chain import Context
from flows.console import Console
from flows.settings import restored
from flows.steps.drift import measurements
from flows.steps.images import accepted, image_reader
from model.intervals import proportion
from pipeline.decode import read_pixels
from pipeline.drift import IMAGE_STATISTICS, DriftOptions, compare, image_statistics

N_NEW = (30, 100, 300)


def halves(table: pd.DataFrame, n_new: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Baseline and new images without overlap: one half of the data, and `n_new` of the other."""
    order = np.random.default_rng(seed).permutation(len(table))
    cut = len(table) // 2
    return table.iloc[order[:cut]], table.iloc[order[cut : cut + n_new]]


def rate(alarms: list[bool]) -> str:
    """A share with its interval, as text."""
    found = proportion(sum(alarms), len(alarms))
    return f"{found.value:.3f} ({found.low:.3f}–{found.high:.3f})"


def changed(image: Image.Image, how: str) -> Image.Image:
    if how == "10 % darker":
        return image.point(lambda v: int(v * 0.9))
    if how == "25 % darker":
        return image.point(lambda v: int(v * 0.75))
    if how == "blurred, sigma 1 px":
        return image.filter(ImageFilter.GaussianBlur(1))
    if how == "JPEG quality 20":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=20)
        return Image.open(buffer).convert("RGB")
    if how == "10 % less blue":
        red, green, blue = image.split()
        return Image.merge("RGB", (red, green, blue.point(lambda v: int(v * 0.9))))
    raise ValueError(how)


def with_statistics(table: pd.DataFrame, statistics: Callable[[str], dict[str, float]]) -> pd.DataFrame:
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(statistics, table["image_id"]))
    return table.assign(**{name: [row[name] for row in rows] for name in IMAGE_STATISTICS})


def other_data(folder: Path, n: int) -> pd.DataFrame:
    rows = []
    for path in sorted(folder.rglob("*")):
        try:
            rows.append({"image_id": path.name, **image_statistics(read_pixels(path))})
        except (ImageRejected, OSError):
            continue
        if len(rows) == n:
            break
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--repeats-of-shifts", type=int, default=20)
    arguments = parser.parse_args()
    logging.disable()
    run = RunFolder(arguments.run)
    context = Context(run, restored(run.read_manifest().config), Console(quiet=True))
    table = measurements(context, accepted(run.read_images())["image_id"].tolist())
    n_tests = len(compare(*halves(table, N_NEW[-1], 0)))
    print(f"{len(table)} images, {n_tests} tests, alpha {DriftOptions().alpha}")
    if arguments.repeats:
        false_alarms(table, arguments.repeats)
    if arguments.repeats_of_shifts:
        shifts(table, context, arguments)


def false_alarms(table: pd.DataFrame, n_repeats: int) -> None:
    """Print how often images of one data set differ from each other."""
    print(f"\n| new images | false alarms of {n_repeats} | without least effects |\n|---|---|---|")
    for n_new in N_NEW:
        found = [compare(*halves(table, n_new, seed)) for seed in range(n_repeats)]
        bare = [bool((one["p_holm"] < DriftOptions().alpha).any()) for one in found]
        print(f"| {n_new} | {rate([bool(one['fires'].any()) for one in found])} | {rate(bare)} |", flush=True)


def shifts(table: pd.DataFrame, context: Context, arguments: argparse.Namespace) -> None:
    """Print how often images that were changed, or are of another kind, are seen to differ."""
    n = arguments.repeats_of_shifts
    print(f"\n| shift of 100 new images | seen, of {n} | tests that fired, median |\n|---|---|---|")
    read = image_reader(context)
    for how in ("10 % darker", "25 % darker", "blurred, sigma 1 px", "JPEG quality 20", "10 % less blue"):

        def statistics(image_id: str, how: str = how) -> dict[str, float]:
            return image_statistics(np.asarray(changed(Image.fromarray(read(image_id)), how)))

        show(how, [compare(old, with_statistics(new, statistics)) for old, new in draws(table, n)])
    one_class = table["label"].value_counts().index[0]
    only = [(old, new[new["label"] == one_class].drop(columns="label")) for old, new in draws(table, n, 500)]
    show(f"one class only ({one_class}), classes not looked at", [compare(old, new.head(100)) for old, new in only])
    if arguments.other:
        other = other_data(arguments.other, 100)
        show(f"images of {arguments.other.parent.name}", [compare(old, other) for old, _ in draws(table, n)])


def draws(table: pd.DataFrame, n: int, n_new: int = 100) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """`n` pairs of baseline and new images."""
    return [halves(table, n_new, 10_000 + seed) for seed in range(n)]


def show(name: str, found: list[pd.DataFrame]) -> None:
    fired = [int(table["fires"].sum()) for table in found]
    print(f"| {name} | {rate([n > 0 for n in fired])} | {np.median(fired):g} of {len(found[0])} |", flush=True)


if __name__ == "__main__":
    main()
