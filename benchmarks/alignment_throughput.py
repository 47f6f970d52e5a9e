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
from pathlib import Path

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


def bare_seconds(aligner: Aligner, paths: list[str], batch_size: int) -> float:
    """Seconds of the tower's own `encode_image` over all images, decoded and normalised beforehand."""
    pixels = [
        np.stack([aligner.preprocess(read(p)) for p in paths[i : i + batch_size]])
        for i in range(0, len(paths), batch_size)
    ]
    with torch.inference_mode():
        batches = [aligner.normalised(batch) for batch in pixels]
        aligner.model.encode_image(batches[0])
        started = time.perf_counter()
        for batch in batches:
            aligner.model.encode_image(batch)
        if aligner.device != "cpu":
            torch.cuda.synchronize()
    return time.perf_counter() - started


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


def align_seconds(paths: list[str], options: AlignOptions) -> float:
    """Seconds of `align` with nothing cached; heads are fitted to the first shard's worth of random judgements."""
    vocabulary = Vocabulary.of(Concept(f"c{k}", f"concept number {k}") for k in range(N_CONCEPTS))
    ledger = judgements(vocabulary, paths[:64])
    with tempfile.TemporaryDirectory() as cache:
        run = align(paths, read, vocabulary, ledger, options, cache_dir=Path(cache))
        fit = align_fit_seconds(paths[:64], ledger, vocabulary, options) if options.adapts else 0.0
        started = time.perf_counter()
        for _ in run:
            pass
        return time.perf_counter() - started - fit


def align_fit_seconds(paths: list[str], ledger: pd.DataFrame, vocabulary: Vocabulary, options: AlignOptions) -> float:
    """Seconds that fitting alone takes: a run of the judged images whose features are already there."""
    with tempfile.TemporaryDirectory() as cache:
        for _ in align(paths, read, vocabulary, ledger, options, cache_dir=Path(cache)):
            pass
        run = align(paths, read, vocabulary, ledger, options, cache_dir=Path(cache))
        started = time.perf_counter()
        for _ in run:
            pass
        return time.perf_counter() - started


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
    print("bare tower  alignment  ratio")
    # Interleaved, so that a machine that slows down slows both.
    for _ in range(chosen.repeats):
        bare = len(paths) / bare_seconds(aligner, paths, chosen.batch_size)
        whole = len(paths) / align_seconds(paths, options)
        print(f"{bare:10.1f} {whole:10.1f} {whole / bare:6.2f}")


if __name__ == "__main__":
    main()
