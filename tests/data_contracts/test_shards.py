from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from data_contracts.errors import ContractViolation
from data_contracts.manifest import RunManifest
from data_contracts.shards import EvidenceShards
from data_contracts.store import RunFolder
from data_contracts.tables import ALIGNMENT, JUDGEMENTS

IDS = [f"i{n}" for n in range(10)]


def answers(ids: list[str], concept: str, minute: int) -> pd.DataFrame:
    frame = pd.DataFrame({"image_id": ids, "concept_id": concept, "witness": "vlm", "witness_model": "m"})
    frame = frame.assign(
        state="present", created_at=pd.Timestamp("2026-01-01", tz="UTC") + pd.Timedelta(minutes=minute)
    )
    return frame.reindex(columns=JUDGEMENTS.column_names)


def aligned(ids: list[str]) -> pa.Table:
    n = len(ids)
    cells = {"image_id": ids, "concept_id": ["a"] * n, "similarity": np.arange(n, dtype=float)}
    cells |= {"null_similarity": np.zeros(n), "grid_h": [1] * n, "grid_w": [1] * n}
    return ALIGNMENT.to_arrow(pa.table(cells | {"heatmap": pa.array([[0.5]] * n, pa.list_(pa.float16()))}), "x")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The ledger's parts cross the shards, and its later part was written first."""
    run = RunFolder(tmp_path)
    run.write_manifest(RunManifest.new("run", "source"))
    run.append_judgements(answers(IDS[2:7], "a", 5))
    run.append_judgements(answers(IDS, "a", 1))
    run.append_judgements(answers(["gone", *IDS[:1]], "dropped", 2))
    run.write_alignment([aligned(IDS[:6]), aligned(IDS[6:])])
    return run


def test_shards_together_are_the_run_in_the_order_of_answering(run: RunFolder) -> None:
    shards = EvidenceShards(run, IDS, ["a"], shard_size=4)
    assert len(shards) == 3
    for _ in range(2):
        found = list(shards)
        assert [shard.image_ids for shard in found] == [tuple(IDS[:4]), tuple(IDS[4:8]), tuple(IDS[8:])]
        for shard in found:
            assert set(shard.judgements["image_id"]) == set(shard.image_ids) == set(shard.alignment["image_id"])
            assert shard.judgements["created_at"].is_monotonic_increasing
        assert sum(len(shard.judgements) for shard in found) == 15
        assert "heatmap" not in found[0].alignment


def test_one_shard_is_read_once(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = EvidenceShards(run, IDS, ["a"], shard_size=100)
    (first,) = shards
    monkeypatch.setattr(RunFolder, "read_part", None)
    (again,) = shards
    assert again is first


def test_a_shard_reads_only_the_parts_its_images_are_in(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = iter(EvidenceShards(run, IDS, ["a"], shard_size=4))
    next(shards)
    read: list[str] = []
    original = RunFolder.read_part

    def watched(self: RunFolder, path: Path, *more: object) -> pa.Table:
        read.append(path.parent.name)
        return original(self, path, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(RunFolder, "read_part", watched)
    list(shards)
    # Of the ledger the second shard needs two parts and the third one; of the alignment two and one.
    assert (read.count("judgements"), read.count("alignment")) == (3, 3)


def test_a_run_without_anything_is_one_empty_shard(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (shard,) = EvidenceShards(run, [], [], shard_size=4)
    assert shard.judgements.empty
    assert shard.alignment.empty


def labels(ids: list[str], probability: float = 0.9) -> tuple[pd.DataFrame, pd.DataFrame]:
    long = pd.DataFrame({"image_id": ids, "concept_id": "a", "present": True, "probability": probability})
    wide = pd.DataFrame({"image_id": ids, "a": ["=1", *["1"] * (len(ids) - 1)]})
    return long.assign(decided_by="vlm", disagreement=0.0), wide


def test_labels_of_shards_are_read_back_as_one_table(run: RunFolder) -> None:
    assert run.write_label_shards([labels(IDS[:4]), labels(IDS[4:])]) == 10
    assert run.read_labels()["image_id"].tolist() == IDS
    text = run.labels_csv_path.read_bytes()
    assert text.count(b"\xef\xbb\xbf") == text.count(b"image_id") == 1
    assert pd.read_csv(run.labels_csv_path)["a"].tolist() == ["'=1", "1", "1", "1", "'=1", "1", "1", "1", "1", "1"]


def test_a_faulty_shard_leaves_the_labels_that_were_there(run: RunFolder) -> None:
    run.write_label_shards([labels(IDS)])
    before = run.labels_csv_path.read_bytes()

    def broken() -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
        yield labels(IDS[:4])
        yield labels(IDS[4:], probability=1.5)

    with pytest.raises(ContractViolation, match="probability"):
        run.write_label_shards(broken())
    assert run.read_labels()["image_id"].tolist() == IDS
    assert run.labels_csv_path.read_bytes() == before
    assert not list(run.path.glob("*.partial"))
