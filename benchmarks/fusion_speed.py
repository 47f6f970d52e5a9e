"""How fast, and in how much memory, are labels fused when a run streams by in shards?

    python benchmarks/fusion_speed.py [--images 1000000] [--concepts 40] [--shard 20000]

Synthetic tables with everything that a run has: one vision-language model, alignment with a probability, experts on
0.1 % of the cells. Reliabilities are learned on a sample of the stream, then every shard is fused in turn. Making the
tables is not counted.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator

import numpy as np
import pandas as pd

from annotation.trust.fuse import FuseOptions, learn_fusion
from annotation.trust.sample import sample_shards
from data_contracts.concepts import Concept, Vocabulary

EXPERT_SHARE = 0.001


def shard(number: int, n_images: int, vocabulary: Vocabulary) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Ledger and alignment rows of one shard."""
    rng = np.random.default_rng(number)
    shape = (n_images, len(vocabulary))
    truth = rng.random(shape) < 0.3
    ids = pd.array([f"{number:08x}{i:056x}" for i in range(n_images)], dtype="str")
    image_id = ids.repeat(shape[1])
    concept_id = pd.array(np.tile(np.asarray(vocabulary.ids, object), n_images), dtype="str")
    probability = 1 / (1 + np.exp(-(3.0 * truth - 1.5 + rng.standard_normal(shape))))
    said = np.where(truth, rng.random(shape) < 0.85, rng.random(shape) > 0.7).ravel()
    judged = answers(image_id, concept_id, "vlm", "simulated", said)
    audited = rng.random(truth.size) < EXPERT_SHARE
    expert = answers(image_id[audited], concept_id[audited], "expert", "dr", truth.ravel()[audited])
    cells = {"image_id": image_id, "concept_id": concept_id, "similarity": np.nan, "probability": probability.ravel()}
    return pd.concat([judged, expert], ignore_index=True), pd.DataFrame(cells)


def answers(image_id: object, concept_id: object, witness: str, model: str, present: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image_id": image_id,
            "concept_id": concept_id,
            "witness": pd.array([witness] * len(present), dtype="str"),
            "witness_model": pd.array([model] * len(present), dtype="str"),
            "state": pd.array(np.where(present, "present", "absent").astype(object), dtype="str"),
            "probability": np.nan,
        }
    )


def shards(n_images: int, size: int, vocabulary: Vocabulary) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    for number, start in enumerate(range(0, n_images, size)):
        yield shard(number, min(size, n_images - start), vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--concepts", type=int, default=40)
    parser.add_argument("--shard", type=int, default=20_000)
    arguments = parser.parse_args()
    vocabulary = Vocabulary.of(Concept(f"c{k}", f"concept {k}") for k in range(arguments.concepts))
    options = FuseOptions()
    spent = {"sample": 0.0, "learn": 0.0, "apply": 0.0}
    first = shards(min(arguments.images, 2 * options.max_fit_images), arguments.shard, vocabulary)
    made = list(first)
    began, processor = time.perf_counter(), time.process_time()
    sample = sample_shards(made, options.max_fit_images)
    spent["sample"] = time.perf_counter() - began
    learned = learn_fusion(*sample, vocabulary, options)
    spent["learn"] = time.perf_counter() - began - spent["sample"]
    processor = time.process_time() - processor
    n_labels = 0
    for judgements, scores in shards(arguments.images, arguments.shard, vocabulary):
        began, before = time.perf_counter(), time.process_time()
        n_labels += len(learned.labels(judgements, scores))
        spent["apply"] += time.perf_counter() - began
        processor += time.process_time() - before
    memory_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    total = sum(spent.values())
    print(f"{arguments.images} images x {arguments.concepts} concepts, shards of {arguments.shard}: {n_labels} labels")
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in spent.items()))
    print(f"total {total:.1f} s ({processor:.1f} s of processor time), peak resident memory {memory_gb:.2f} GB")


if __name__ == "__main__":
    main()
