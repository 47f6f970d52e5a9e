"""Images a second of a whole alignment beside those of the bare tower on the same pixels, already decoded.

    python benchmarks/alignment_throughput.py [--images FOLDER] [--n 512] [--model embedded] [--device cpu]

Alignment decodes, resizes, runs the tower, applies heads, makes heatmaps of 31 concepts and Arrow tables. Its time
includes everything but loading the model and, for the embedded model, the closed-form fit of its heads, which is
done once and does not grow with the number of images beyond `max_fit_images`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image

from annotation.alignment.align import AlignOptions, align
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


def bare_seconds(aligner: Aligner, paths: list[str], batch_size: int) -> Seconds:
    """Of the tower's own `encode_image` over all images, decoded and normalised beforehand."""
    slices = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    batches = [aligner.normalised(np.stack([aligner.preprocess(read(p)) for p in part])) for part in slices]

    @torch.inference_mode()
    def encode() -> None:
        for batch in batches:
            aligner.model.encode_image(batch)
        if aligner.device != "cpu":
            torch.cuda.synchronize()

    encode() if aligner.device != "cpu" else aligner.model.encode_image(batches[0])  # warm up
    return timed(encode)


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


def align_seconds(paths: list[str], options: AlignOptions) -> Seconds:
    """Of `align` with nothing cached, less the fit of heads to the random judgements of 64 images."""
    vocabulary = Vocabulary.of(Concept(f"c{k}", f"concept number {k}") for k in range(N_CONCEPTS))
    ledger = judgements(vocabulary, paths[:64])

    def run(some_paths: list[str], cache: str) -> Seconds:
        tables = align(some_paths, read, vocabulary, ledger, options, cache_dir=Path(cache))
        return timed(lambda: deque(tables, maxlen=0))

    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as other:
        whole = run(paths, cache)
        if not options.adapts:
            return whole
        run(paths[:64], other)
        # From the second time on all features are there: what is left is the fit. The better of two, against noise.
        fit = min(run(paths[:64], other), run(paths[:64], other))
        return Seconds(whole.wall - fit.wall, whole.cpu - fit.cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("MEDMICN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--images", type=Path, default=Path(default) / "wbcatt" / "images")
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    paths = sorted(str(p) for p in chosen.images.rglob("*") if p.is_file())[: chosen.n]
    options = AlignOptions(model=chosen.model, device=chosen.device, batch_size=chosen.batch_size)
    aligner = load_aligner(chosen.model, device=chosen.device)
    print(f"{len(paths)} images, {N_CONCEPTS} concepts, {chosen.model} on {chosen.device}, ", end="")
    print(f"{torch.get_num_threads()} threads; images a second:")
    print("bare tower  alignment  ratio  ratio of processor time")
    # Interleaved, so that a machine that slows down slows both.
    for _ in range(chosen.repeats):
        bare = bare_seconds(aligner, paths, chosen.batch_size)
        whole = align_seconds(paths, options)
        print(f"{len(paths) / bare.wall:10.1f} {len(paths) / whole.wall:10.1f}", end="")
        print(f" {bare.wall / whole.wall:6.2f} {bare.cpu / whole.cpu:10.2f}")


if __name__ == "__main__":
    main()
