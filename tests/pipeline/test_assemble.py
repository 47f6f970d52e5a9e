from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import SourceRefused, VocabularyMismatch
from data_contracts.tables import IMAGES, LABELS, to_pandas
from pipeline.assemble import assemble

VOCABULARY = Vocabulary.of([Concept("red", "red"), Concept("round", "round")])


def images(rows: list[tuple[str, str | None, str | None, str | None]]) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "image_id": [r[0] for r in rows],
            "path": [f"{r[0]}.png" for r in rows],
            "label": pd.Series([r[1] for r in rows], dtype="str"),
            "split": pd.Series([r[2] for r in rows], dtype="str"),
            "rejected": pd.Series([r[3] for r in rows], dtype="str"),
            "modality": "m",
        }
    )
    return to_pandas(IMAGES.to_arrow(frame, "images"))


def labels(rows: list[tuple[str, str, bool | None, float]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["image_id", "concept_id", "present", "probability"])
    frame["present"] = frame["present"].astype("boolean")
    return to_pandas(LABELS.to_arrow(frame.assign(decided_by="vlm", disagreement=0.0), "labels"))


TWO = [("a", "x", "train", None), ("b", "y", "test", None)]


def test_target_is_the_probability_and_only_decided_labels_may_be_used() -> None:
    table = labels([("a", "red", True, 0.9), ("a", "round", None, 0.5), ("b", "round", False, 0.2)])
    dataset = assemble(images(TWO), table, VOCABULARY)
    assert dataset.image_ids == ["a", "b"]
    np.testing.assert_allclose(dataset.concepts[[0, 0, 1], [0, 1, 1]], [0.9, 0.5, 0.2], rtol=1e-6)
    # The abstained cell and the cell nobody labelled are both out, and neither is an absence.
    assert dataset.mask.tolist() == [[True, False], [False, True]]


def test_row_order_of_labels_does_not_matter() -> None:
    table = labels(
        [("a", "red", True, 0.9), ("a", "round", False, 0.1), ("b", "red", False, 0.3), ("b", "round", True, 1)]
    )
    straight = assemble(images(TWO), table, VOCABULARY)
    shuffled = assemble(images(TWO), table.sample(frac=1, random_state=1), VOCABULARY)
    np.testing.assert_array_equal(straight.concepts, shuffled.concepts)
    np.testing.assert_array_equal(straight.mask, shuffled.mask)


@pytest.mark.parametrize("row", [("c", "x", "train", "truncated"), ("c", None, "train", None), ("c", "x", None, None)])
def test_images_that_cannot_train_or_test_stay_out(row: tuple[str, str | None, str | None, str | None]) -> None:
    table = labels([("a", "red", True, 0.9), ("c", "red", True, 0.9)])
    assert assemble(images([*TWO, row]), table, VOCABULARY).image_ids == ["a", "b"]


def test_classes_are_those_of_usable_images_in_alphabetical_order() -> None:
    rows = [("a", "y", "train", None), ("b", "x", "val", None), ("c", "never", "test", "truncated")]
    assert assemble(images(rows), labels([]), VOCABULARY).class_names == ("x", "y")


@pytest.mark.parametrize("rows", [[], TWO[:1], [("a", "x", "train", None), ("b", "x", "test", None)]])
def test_fewer_than_two_classes_cannot_be_trained(rows: list[tuple[str, str | None, str | None, str | None]]) -> None:
    with pytest.raises(SourceRefused, match="at least 2 classes"):
        assemble(images(rows), labels([]), VOCABULARY)


def test_labels_of_other_concepts_are_refused_by_name() -> None:
    with pytest.raises(VocabularyMismatch, match="'warty'.*fuse"):
        assemble(images(TWO), labels([("a", "warty", True, 0.9)]), VOCABULARY)
