"""Labels and images joined into the one data set the trainer reads."""

from __future__ import annotations

import numpy as np
import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.dataset import AlignedDataset
from data_contracts.errors import SourceRefused, VocabularyMismatch

_UNKNOWN = 0.5
"""Target of a cell nobody labelled. It is masked; the value only has to be a probability."""


def assemble(images: pd.DataFrame, labels: pd.DataFrame, vocabulary: Vocabulary) -> AlignedDataset:
    """The data set of all accepted images that have a class and a split, in the order of `images`.

    The soft target of a cell is its fused probability. The mask is False where the label abstains
    (`present` is null) and where there is no label at all, so neither ever counts as absent.

    Raises:
        SourceRefused: fewer than two classes are left.
        VocabularyMismatch: `labels` holds a concept that `vocabulary` does not.
    """
    frame = trainable(images)
    class_names = tuple(sorted(frame["label"].unique()))
    if len(class_names) < 2:
        shown = f"only {class_names[0]!r}" if class_names else "none"
        raise SourceRefused(
            f"data set: training needs images of at least 2 classes with a split, got {shown} "
            f"({len(frame)} of {len(images)} images are accepted, labelled and split); nothing was trained.",
            remedy="Give labels as class sub-folders or in labels.csv. Concept labels work without classes.",
        )
    rows, columns = _cells(frame, labels, vocabulary)
    inside = rows >= 0
    rows, columns, labels = rows[inside], columns[inside], labels[inside]
    shape = (len(frame), len(vocabulary))
    concepts = np.full(shape, _UNKNOWN, np.float32)
    mask = np.zeros(shape, np.bool_)
    concepts[rows, columns] = labels["probability"].to_numpy(np.float32)
    mask[rows, columns] = labels["present"].notna().to_numpy(np.bool_)
    return AlignedDataset(frame, concepts, mask, vocabulary, class_names)


def trainable(images: pd.DataFrame) -> pd.DataFrame:
    """The images that may train or test: accepted, with a class and a split (image_id … group_id only)."""
    usable = images["rejected"].isna() & images["label"].notna() & images["split"].notna()
    return images.loc[usable, ["image_id", "path", "label", "split", "group_id"]].reset_index(drop=True)


def _cells(
    frame: pd.DataFrame, labels: pd.DataFrame, vocabulary: Vocabulary
) -> tuple[np.ndarray[tuple[int], np.dtype[np.intp]], np.ndarray[tuple[int], np.dtype[np.intp]]]:
    """Row (-1: not in `frame`) and column of every label."""
    columns = pd.Index(vocabulary.ids).get_indexer(pd.Index(labels["concept_id"]))
    if (columns < 0).any():
        odd = sorted(set(labels["concept_id"][columns < 0]))
        raise VocabularyMismatch(
            "labels",
            [f"concept {odd[0]!r} ({len(odd)} in all) is not among the {len(vocabulary)} kept concepts"],
            remedy="The concepts changed after the labels were fused: run `medmicn fuse` again.",
        )
    return pd.Index(frame["image_id"]).get_indexer(pd.Index(labels["image_id"])), columns
