"""Images a second of a whole alignment beside those of the bare tower on the same pixels, already decoded.

    python benchmarks/alignment_throughput.py [--images FOLDER] [--n 1024] [--model embedded] [--device cpu]

Alignment decodes, resizes, runs the tower, applies heads, makes heatmaps of 31 concepts and Arrow tables. Its time
includes everything but loading the model and, for the embedded model, the closed-form fit of its heads, which is
done once and does not grow with the number of images beyond `max_fit_images`.

The two take turns, shard by shard: each shard of an alignment is held against the mean of the bare tower's time on the
same images just before and just after it. So a machine that slows down slows both, and what is left of the noise shows
in the spread over shards. Processor time (all threads) is steadier still on a busy machine, most of all with
`--threads 1`: threads that wait for one that was interrupted count as busy.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image

from annotation.alignment.align import align
from annotation.alignment.inputs import AlignmentInputs
from annotation.alignment.options import AlignOptions
from annotation.alignment.towers import Aligner, load_aligner
from data_contracts.concepts import Concept, Vocabulary

N_CONCEPTS = 31


def read(path: str) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


class Seconds(NamedTuple):
    """Time by the clock, and by the processor (all threads); the second is steady on a busy machine."""

    wall: float
    cpu: float


def timed(work: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


class Bare:
    """The tower's own `encode_image` on images that were decoded and normalised beforehand."""

    def __init__(self, aligner: Aligner, paths: list[str], batch_size: int) -> None:
        self.aligner = aligner
        slices = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
        self.batches = [aligner.normalised(np.stack([aligner.preprocess(read(p)) for p in part])) for part in slices]

    @torch.inference_mode()
    def __call__(self) -> None:
        """Encode them all."""
        for batch in self.batches:
            with torch.autocast("cuda", torch.bfloat16, enabled=self.aligner.device != "cpu"):
                self.aligner.model.encode_image(batch)
        if self.aligner.device != "cpu":
            torch.cuda.synchronize()


def judgements(vocabulary: Vocabulary, image_ids: list[str]) -> pd.DataFrame:
    said = np.random.default_rng(0).choice(["present", "absent"], len(image_ids) * len(vocabulary))
    return pd.DataFrame(
        {
            "image_id": np.repeat(image_ids, len(vocabulary)),
            "concept_id": np.tile(vocabulary.ids, len(image_ids)),
            "witness": "vlm",
            "witness_model": "random",
            "state": said,
            "probability": np.nan,
        }
    )


def pairs(paths: list[str], aligner: Aligner, options: AlignOptions) -> Iterator[tuple[Seconds, Seconds]]:
    """(bare, aligned) seconds of one shard after the other."""
    vocabulary = Vocabulary.of(Concept(f"c{k}", f"concept number {k}") for k in range(N_CONCEPTS))
    shards = [paths[i : i + options.shard_size] for i in range(0, len(paths), options.shard_size)]
    ledger = judgements(vocabulary, shards[0])
    with tempfile.TemporaryDirectory() as cache:
        tables = align(AlignmentInputs(paths, read, vocabulary, ledger, options, Path(cache)))
        next(tables)  # the first shard holds the fit of the heads, and warms up
        for shard in shards[1:]:
            bare = Bare(aligner, shard, options.batch_size)
            before, whole, after = timed(bare), timed(lambda: next(tables)), timed(bare)
            yield Seconds((before.wall + after.wall) / 2, (before.cpu + after.cpu) / 2), whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("MEDMICN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--images", type=Path, default=Path(default) / "wbcatt" / "images")
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--shard-size", type=int, default=128, help="images of one pair; a run's own default is 256")
    parser.add_argument("--threads", type=int, default=0, help="threads of the tower; 0: as many as torch takes")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    paths = sorted(str(p) for p in chosen.images.rglob("*") if p.is_file())[: chosen.n]
    options = AlignOptions(
        model=chosen.model, device=chosen.device, batch_size=chosen.batch_size, shard_size=chosen.shard_size
    )
    aligner = load_aligner(chosen.model, device=chosen.device)
    found = list(pairs(paths, aligner, options))
    n = len(paths) - options.shard_size
    print(f"{n} images in {len(found)} shards, {N_CONCEPTS} concepts, {chosen.model} on {chosen.device}, ", end="")
    print(f"{torch.get_num_threads()} threads")
    for kind in Seconds._fields:
        bare, whole = (np.array([getattr(seconds, kind) for seconds in side]) for side in zip(*found, strict=True))
        low, middle, high = np.quantile(bare / whole, (0.25, 0.5, 0.75))
        print(
            f"{kind:4}: bare tower {n / bare.sum():6.1f}, alignment {n / whole.sum():6.1f} images a second; "
            f"ratio {bare.sum() / whole.sum():.3f}, by shard {middle:.3f} (quartiles {low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    main()
