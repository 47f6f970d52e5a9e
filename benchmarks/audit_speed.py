"""How fast, and in how much memory, is an audit drawn and scored on a run of a million images?

    python benchmarks/audit_speed.py [--images 1000000] [--concepts 40] [--shard 20000] [--cells 1000]

A run folder is written with synthetic labels, judgements of one vision-language model and alignment scores, in Parquet
and in shards; writing is not counted. Then the steps behind `medmicn audit draw` and `medmicn audit score` are run on
it as they are, the sheet being filled at random between them, and again with `--more`.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.manifest import RunManifest
from data_contracts.store import RunFolder
from data_contracts.tables import ALIGNMENT, JUDGEMENTS, LABELS
from flows.chain import Context
from flows.console import Console
from flows.settings import Settings
from flows.steps.corrections import draw_audit, score_audit

CLASSES = ("a", "b", "c", "d")


class Cells:
    """All columns of one shard: a truth, a probability near it, a model's answer."""

    def __init__(self, number: int, n_images: int, concept_ids: list[str]) -> None:
        rng = np.random.default_rng(number)
        truth = rng.random((n_images, len(concept_ids))) < 0.3
        self.image_ids = [f"{number:08x}{i:056x}" for i in range(n_images)]
        images = pa.array(np.repeat(np.arange(n_images), len(concept_ids)), pa.int32())
        concepts = pa.array(np.tile(np.arange(len(concept_ids)), n_images), pa.int32())
        self.keys = {
            "image_id": pa.array(self.image_ids, pa.string()).take(images),
            "concept_id": pa.array(concept_ids, pa.string()).take(concepts),
        }
        self.n = truth.size
        self.probability = (1 / (1 + np.exp(-(4.0 * truth - 2 + rng.standard_normal(truth.shape))))).ravel()
        self.said = np.where(truth, rng.random(truth.shape) < 0.85, rng.random(truth.shape) > 0.7).ravel()
        self.disagreement = np.abs(self.probability - self.said)

    def same(self, text: str) -> pa.Array:
        """One text in every row."""
        return pa.array([text], pa.string()).take(pa.array(np.zeros(self.n, np.int32)))

    def labels(self) -> pa.Table:
        """LABELS columns: fused as it were, some abstaining."""
        present = pa.array(self.probability > 0.5, mask=np.abs(self.probability - 0.5) < 0.15)
        columns = {"present": present, "probability": self.probability, "decided_by": self.same("vlm+alignment")}
        return pa.table({**self.keys, **columns, "disagreement": self.disagreement})

    def judgements(self) -> pa.Table:
        """JUDGEMENTS columns of a model with many false alarms."""
        state = pa.array(["absent", "present"], pa.string()).take(pa.array(self.said.astype(np.int32)))
        created = pa.array([pd.Timestamp("2026-01-01", tz="UTC")] * 1).take(pa.array(np.zeros(self.n, np.int32)))
        fixed = {"witness": self.same("vlm"), "witness_model": self.same("simulated"), "evidence": self.same("seen")}
        return pa.table({**self.keys, **fixed, "state": state, "created_at": created})

    def alignment(self) -> pa.Table:
        """ALIGNMENT columns, maps of one cell."""
        heatmap = pa.ListArray.from_arrays(
            pa.array(np.arange(self.n + 1, dtype=np.int32)), pa.array(self.probability.astype(np.float16))
        )
        one = np.ones(self.n, np.int64)
        scores = {"similarity": self.probability, "null_similarity": one * 0.0, "probability": self.probability}
        return pa.table({**self.keys, **scores, "grid_h": one, "grid_w": one, "heatmap": heatmap})


def written(folder: Path, n_images: int, shard: int, concept_ids: list[str]) -> RunFolder:
    run = RunFolder(folder / "run")
    run.write_manifest(RunManifest.new("run", str(folder)))
    run.write_concepts(
        pd.DataFrame({"concept_id": concept_ids, "name": concept_ids, "definition": "Synthetic."}).assign(
            proposed_for=[["a"]] * len(concept_ids), origin="vlm", status="kept", position=range(len(concept_ids))
        )
    )
    image_ids: list[str] = []

    def alignment() -> Iterator[pa.Table]:
        """Alignment shard by shard; the other tables of the shard are written on the way."""
        writer: pq.ParquetWriter | None = None
        for number, start in enumerate(range(0, n_images, shard)):
            cells = Cells(number, min(shard, n_images - start), concept_ids)
            image_ids.extend(cells.image_ids)
            run.append_judgements(JUDGEMENTS.to_arrow(cells.judgements(), "benchmark"))
            table = LABELS.to_arrow(cells.labels(), "benchmark")
            writer = writer or pq.ParquetWriter(run.table_path(LABELS), table.schema, compression="zstd")
            writer.write_table(table)
            yield ALIGNMENT.to_arrow(cells.alignment(), "benchmark")
        if writer is not None:
            writer.close()

    run.write_alignment(alignment())
    images = pd.DataFrame({"image_id": image_ids, "modality": "m", "width_px": 1, "height_px": 1})
    images["path"] = [f"{n}.png" for n in range(n_images)]
    images["label"] = np.tile(CLASSES, n_images // len(CLASSES) + 1)[:n_images]
    images["split"] = np.where(np.arange(n_images) % 5 == 0, "test", "train")
    run.write_images(images)
    return run


def fill(run: RunFolder) -> None:
    """Answer every empty cell of the sheet: mostly what half of the models would say."""
    sheet = run.read_audit()
    rng = np.random.default_rng(len(sheet))
    empty = sheet["answer"] == ""
    sheet.loc[empty, "answer"] = rng.choice(["present", "absent"], int(empty.sum()), p=[0.3, 0.7])
    run.write_audit(sheet)


def timed(name: str, work: Callable[[], object]) -> float:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    seconds = time.perf_counter() - wall
    print(f"{name:12} {seconds:7.1f} s ({time.process_time() - processor:.1f} s of processor time), ", end="")
    print(f"peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--concepts", type=int, default=40)
    parser.add_argument("--shard", type=int, default=20_000)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where the run is written; default: a temporary folder")
    options = parser.parse_args()
    concept_ids = [f"c{k}" for k in range(options.concepts)]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run = written(Path(folder), options.images, options.shard, concept_ids)
        context = Context(run, Settings(), Console(quiet=True))
        print(f"{options.images} images x {options.concepts} concepts, {options.cells} cells audited")
        print(f"after writing: peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB", flush=True)
        timed("draw", lambda: draw_audit(context, options.cells, 0, again=False))
        fill(run)
        timed("score", lambda: score_audit(context, "expert"))
        timed("draw --more", lambda: draw_audit(context, options.cells, 0, again=False, more=True))


if __name__ == "__main__":
    main()
