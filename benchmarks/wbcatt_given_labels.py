"""Med-MICN on wbcatt with the experts' attributes as given labels, both logics, frozen embedded features.

    python benchmarks/wbcatt_given_labels.py [--data DIR] [--seeds 5] [--t-norm godel] [--cache FOLDER]

One concept for each attribute value (31), the official split, epochs chosen on validation images, test images
measured once. Prints mean ± sd over seeds, and the time of one epoch on cached features.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.dataset import AlignedDataset
from data_contracts.tables import vocabulary_of
from model.config import TrainConfig
from model.evaluate import evaluate
from model.fit import train
from pipeline.decode import read_pixels
from pipeline.import_labels import given_concepts

DEFAULT_DATA = Path(os.environ.get("MEDMICN_DATA", "../shared/data"))
SHOWN = ("accuracy", "macro_f1", "auroc", "concept_auroc", "concept_f1", "rule_accuracy", "rule_macro_f1", "ece")


def expert_dataset(root: Path) -> AlignedDataset:
    """wbcatt with its experts' answers as hard targets."""
    sheet = root / "expert_attributes.csv"
    vocabulary: Vocabulary = vocabulary_of(given_concepts(sheet))
    table = pd.read_csv(root / "labels.csv").merge(pd.read_csv(sheet), on="path")
    values = [(str(c.group).replace(" ", "_"), c.name.removeprefix(str(c.group)).strip()) for c in vocabulary]
    targets = np.stack([(table[column] == value).to_numpy(np.float32) for column, value in values], axis=1)
    frame = table.assign(image_id=table["path"], group_id=None)[["image_id", "path", "label", "split", "group_id"]]
    names = tuple(sorted(frame["label"].unique()))
    return AlignedDataset(frame, targets, np.ones_like(targets, bool), vocabulary, names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--t-norm", choices=("godel", "product"), default="godel")
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    root = arguments.data / "wbcatt"
    dataset = expert_dataset(root)
    print(f"{len(dataset)} images, {len(dataset.vocabulary)} concepts, {arguments.seeds} seeds, {arguments.t_norm}")
    print("| logic | " + " | ".join(SHOWN) + " | seconds an epoch |")
    print("|---" * (len(SHOWN) + 2) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for logic in ("paper", "dcr"):
            config = TrainConfig(logic=logic, t_norm=arguments.t_norm, seeds=tuple(range(arguments.seeds)))
            run = train(dataset, lambda p: read_pixels(root / p), config, cache_dir=arguments.cache or Path(folder))
            summary = evaluate(run).summary.set_index("metric")
            cells = [f"{summary.at[name, 'mean']:.3f} ± {summary.at[name, 'sd']:.3f}" for name in SHOWN]
            print(f"| {logic} | " + " | ".join(cells) + f" | {run.history['seconds'].median():.2f} |", flush=True)


if __name__ == "__main__":
    main()
