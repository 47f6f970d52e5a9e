from __future__ import annotations

import pandas as pd

from data_contracts.concepts import Concept, Vocabulary
from data_contracts.tables import IMAGES, LABELS, State, to_pandas
from pipeline.export import CELLS, states_of, wide_labels

VOCABULARY = Vocabulary.of([Concept("round", "round"), Concept("red", "red")])


def table(rows: list[tuple[str, str, bool | None]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["image_id", "concept_id", "present"])
    frame = frame.assign(
        present=frame["present"].astype("boolean"), probability=0.5, decided_by="vlm", disagreement=0.0
    )
    return to_pandas(LABELS.to_arrow(frame, "labels"))


def images(**columns: object) -> pd.DataFrame:
    frame = pd.DataFrame({"image_id": ["a", "b"], "path": ["a.png", "b.png"], "modality": "m", **columns})
    return to_pandas(IMAGES.to_arrow(frame, "images"))


def test_four_states_have_four_spellings() -> None:
    assert set(CELLS) == set(State)
    assert len(set(CELLS.values())) == 4


def test_wide_sheet_has_vocabulary_order_and_keeps_unlabelled_cells_empty() -> None:
    wide = wide_labels(
        images(label=["x", "y"]), table([("b", "red", False), ("a", "red", None), ("b", "round", True)]), VOCABULARY
    )
    assert wide.columns.tolist() == ["image_id", "path", "label", "split", "round", "red"]
    assert wide[["round", "red"]].to_numpy().tolist() == [["", "uncertain"], ["1", "0"]]


def test_rejected_images_are_not_in_the_sheet() -> None:
    wide = wide_labels(images(rejected=["truncated", None]), table([("a", "red", True)]), VOCABULARY)
    assert wide["image_id"].tolist() == ["b"]


def test_abstained_label_is_uncertain_not_absent() -> None:
    assert states_of(table([("a", "red", None), ("a", "round", False)]))["state"].tolist() == ["uncertain", "absent"]
