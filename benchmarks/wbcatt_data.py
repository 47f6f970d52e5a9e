"""WBCAtt with the experts' attributes as given concepts, for the benchmarks that train on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from data_contracts.concepts import Concept, Vocabulary, slug
from data_contracts.dataset import AlignedDataset


def read_dataset(folder: Path) -> AlignedDataset:
    """WBCAtt's subset with one concept for each value of each attribute; values of one attribute exclude each other."""
    frame = pd.read_csv(folder / "labels.csv").merge(
        pd.read_csv(folder / "expert_attributes.csv"), on="path", validate="one_to_one"
    )
    concepts, columns = [], []
    for attribute in frame.columns.difference(["path", "label", "split"], sort=False):
        words = attribute.replace("_", " ")
        for value in sorted(frame[attribute].unique()):
            concepts.append(Concept(slug(f"{words} {value}"), f"{words}: {value}", group=words))
            columns.append((frame[attribute] == value).to_numpy(np.float32))
    targets = np.stack(columns, axis=1)
    images = frame[["path", "label", "split"]].assign(image_id=frame["path"], group_id=None)
    classes = tuple(sorted(frame["label"].unique()))
    return AlignedDataset(images, targets, np.ones_like(targets, dtype=bool), Vocabulary.of(concepts), classes)
