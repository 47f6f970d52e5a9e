"""The aligned data set in memory: what the trainer reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.errors import ContractViolation
from data_contracts.tables import Split


@dataclass(frozen=True)
class AlignedDataset:
    """Images with a class, a split and soft concept targets."""

    frame: pd.DataFrame
    """N rows: image_id, path, label, split, group_id."""
    concepts: npt.NDArray[np.float32]
    """(N, K) probability that the concept is present."""
    mask: npt.NDArray[np.bool_]
    """(N, K) True where the target may be used; False where the label abstains."""
    vocabulary: Vocabulary
    """Meaning and order of the K columns."""
    class_names: tuple[str, ...]
    """Class names in order of class index."""

    def __post_init__(self) -> None:
        expected = (len(self.frame), len(self.vocabulary))
        faults = [
            f"{name}: expected shape {expected}, got {array.shape}"
            for name, array in (("concepts", self.concepts), ("mask", self.mask))
            if array.shape != expected
        ]
        unknown = sorted(set(self.frame["label"]) - set(self.class_names))
        if unknown:
            faults.append(f"label: expected one of {list(self.class_names)}, got {unknown[0]!r}")
        if not np.isfinite(self.concepts).all() or ((self.concepts < 0) | (self.concepts > 1)).any():
            faults.append("concepts: expected probabilities in [0, 1], some are not")
        if faults:
            raise ContractViolation("aligned data set", faults)

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def image_ids(self) -> list[str]:
        """Image ids in row order."""
        return self.frame["image_id"].tolist()

    def class_index(self) -> npt.NDArray[np.int64]:
        """(N,) index of each row's class in `class_names`."""
        index = {name: i for i, name in enumerate(self.class_names)}
        return self.frame["label"].map(index).to_numpy(np.int64)

    def rows(self, split: Split | str) -> npt.NDArray[np.int64]:
        """Row numbers of one split."""
        return np.flatnonzero((self.frame["split"] == str(split)).to_numpy()).astype(np.int64)

    def take(self, rows: npt.NDArray[np.int64]) -> AlignedDataset:
        """The data set of these rows only."""
        return AlignedDataset(
            self.frame.iloc[rows].reset_index(drop=True),
            self.concepts[rows],
            self.mask[rows],
            self.vocabulary,
            self.class_names,
        )
