"""What is read of a run part by part is what would be read at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from data_contracts.concepts import Concept, Vocabulary
from data_contracts.store import RunFolder
from data_contracts.tables import ALIGNMENT, JUDGEMENTS
from flows.parts import evidence_of, judgements_with, label_shards, some_images

IDS = [f"{i:064x}" for i in range(30)]
RED = Vocabulary.of([Concept("red", "red")])
_COLUMNS = ["image_id", "concept_id", "witness", "witness_model", "state", "evidence", "created_at"]


def part(image_ids: list[str], model: str, day: int, evidence: str | None = None) -> pd.DataFrame:
    frame = pd.DataFrame({"image_id": image_ids, "concept_id": "red", "witness": "vlm", "witness_model": model})
    frame["state"], frame["evidence"] = "present", evidence
    frame["created_at"] = pd.Timestamp(2026, 1, day, tz="UTC")
    return frame.reindex(columns=JUDGEMENTS.column_names)


def test_the_ledger_of_some_images_is_that_part_of_the_ledger(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert evidence_of(run, IDS, RED).judgements.empty
    assert judgements_with(run, "audit").empty
    for model, day in (("late", 3), ("early", 1)):
        run.append_judgements(part(IDS[:20], model, day))
        run.append_judgements(part(IDS[20:], model, day))
    run.append_judgements(part(IDS[:2], "audited", 2, "audit"))
    wanted = set(IDS[::7])
    whole = run.read_judgements()
    expected = whole[whole["image_id"].isin(wanted)].reset_index(drop=True)
    found = evidence_of(run, wanted, RED).judgements
    pd.testing.assert_frame_equal(found[_COLUMNS], expected[_COLUMNS], check_dtype=False)
    assert judgements_with(run, "audit")["image_id"].tolist() == IDS[:2]


def test_alignment_of_some_images_has_no_heatmaps(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert evidence_of(run, IDS, RED).alignment.empty
    columns = {"image_id": IDS, "concept_id": ["red"] * 30, "similarity": np.linspace(0, 1, 30)}
    columns |= {"null_similarity": [0.0] * 30, "grid_h": [1] * 30, "grid_w": [1] * 30}
    heatmaps = pa.ListArray.from_arrays(pa.array(range(31), pa.int32()), pa.array(np.zeros(30, np.float16)))
    table = ALIGNMENT.to_arrow(pa.table(columns).append_column("heatmap", heatmaps), "test")
    run.write_alignment([table.slice(0, 11), table.slice(11)])
    found = evidence_of(run, IDS[9:13], RED).alignment
    assert found["image_id"].tolist() == IDS[9:13]
    assert "heatmap" not in found


def test_labels_come_in_shards_as_often_as_they_are_asked_for(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    labels = pd.DataFrame({"image_id": IDS, "concept_id": "red", "present": True, "probability": 0.9})
    run.write_labels(labels.assign(decided_by="vlm", disagreement=0.0), pd.DataFrame())
    shards = label_shards(run, ["image_id", "probability"])
    for _ in range(2):
        assert pd.concat(list(shards()))["image_id"].tolist() == IDS


def test_the_choice_of_images_hardly_changes_when_others_are_added() -> None:
    first, more = some_images(IDS[:20], 10), some_images(IDS, 10)
    assert len(first) == len(more) == 10
    assert len(set(more) & set(IDS[:20]) - set(first)) == 0
    assert some_images(IDS, 40) == IDS
