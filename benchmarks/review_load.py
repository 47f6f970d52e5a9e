"""How fast the review page is with 1,000,000 images × 40 concepts, and how much memory its server takes.

    python benchmarks/review_load.py [--images 1000000] [--concepts 40] [--repeats 20] [--folder DIR]

Writes a synthetic run (labels; a ledger with one judgement and one evidence phrase a cell, in parts of 256 images as
a run writes them; corrections of two reviewers), starts the page as a process of its own with two threads, and asks
for pages over HTTP. The database is built once, in the background; its time is reported apart. Memory is the resident
size of the server, at its peak while it builds and after the last page.
"""

from __future__ import annotations

import argparse
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.manifest import RunManifest
from data_contracts.store import RunFolder
from data_contracts.tables import IMAGES, JUDGEMENTS, LABELS

SHARD_IMAGES = 25_600
PART_IMAGES = 256
CLASSES = ("basophil", "eosinophil", "erythroblast", "lymphocyte", "monocyte", "neutrophil", "platelet", "other")
WORDS = ("notched", "outline", "pale", "rim", "granules", "dense", "centre", "smooth", "lobed", "vacuole", "faint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--concepts", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = RunFolder(asked.folder or Path(temporary) / "run")
        if not run.exists:
            began = time.perf_counter()
            write_run(run, asked.images, asked.concepts)
            print(f"run written in {time.perf_counter() - began:.0f} s: {run.path}", flush=True)
        measure(run, asked.repeats)


# ---- the run ---------------------------------------------------------------------------------------------


def write_run(run: RunFolder, n_images: int, n_concepts: int) -> None:
    """A run of random labels; every number is drawn with seed 0."""
    random = np.random.default_rng(0)
    run.write_manifest(RunManifest.new("load", "nowhere"))
    names = [f"concept {k}" for k in range(n_concepts)]
    ids = [name.replace(" ", "-") for name in names]
    run.write_concepts(
        pd.DataFrame(
            {
                "concept_id": ids,
                "name": names,
                "definition": "A synthetic concept.",
                "proposed_for": [[c] for c in np.resize(CLASSES, n_concepts)],
                "origin": "vlm",
                "status": "kept",
                "position": range(n_concepts),
            }
        )
    )
    _write_images(run, n_images, random)
    _write_shards(run, n_images, ids, random)
    _write_corrections(run, n_images, ids, random)


def _image_ids(first: int, n: int) -> list[str]:
    # As even as a hash, and quick: an odd multiplier runs through all 64-bit numbers.
    return [f"{(i * 0x9E3779B97F4A7C15) % 2**64:016x}" * 4 for i in range(first, first + n)]


def _write_images(run: RunFolder, n_images: int, random: np.random.Generator) -> None:
    table = pa.table(
        {
            "image_id": _image_ids(0, n_images),
            "path": [f"ward_{i % 97}/series_{i % 1009}/image_{i:07d}.png" for i in range(n_images)],
            "label": pa.array(np.array(CLASSES)[random.integers(0, len(CLASSES), n_images)]),
            "split": pa.array(np.array(["train", "val", "test"])[random.integers(0, 3, n_images)]),
            "modality": ["synthetic"] * n_images,
            "width_px": np.full(n_images, 64),
            "height_px": np.full(n_images, 64),
        }
    )
    pq.write_table(IMAGES.to_arrow(table, "images"), run.table_path(IMAGES), compression="zstd")


def _write_shards(run: RunFolder, n_images: int, concept_ids: list[str], random: np.random.Generator) -> None:
    """Labels as one file and the ledger as parts, both shard by shard: they do not fit in memory."""
    run.judgements_dir.mkdir(parents=True, exist_ok=True)
    schema = LABELS.to_arrow(LABELS.empty(), "labels").schema
    phrases = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]
    with pq.ParquetWriter(run.table_path(LABELS), schema, compression="zstd") as writer:
        for first in range(0, n_images, SHARD_IMAGES):
            n = min(SHARD_IMAGES, n_images - first)
            keys = _keys(_image_ids(first, n), concept_ids)
            probability = random.beta(0.4, 0.6, n * len(concept_ids))
            is_open = (probability > 0.35) & (probability < 0.65)
            labels = keys | {
                "present": pa.array(probability > 0.5, mask=is_open),
                "probability": probability,
                "decided_by": pa.array(["vlm"] * len(probability)),
                "disagreement": random.beta(0.3, 3, len(probability)),
            }
            writer.write_table(pa.table(labels, schema=None).cast(schema))
            _write_parts(run, first, keys, probability, phrases, random)


def _keys(image_ids: list[str], concept_ids: list[str]) -> dict[str, pa.Array]:
    rows = pa.array(np.repeat(np.arange(len(image_ids), dtype=np.int32), len(concept_ids)))
    columns = pa.array(np.tile(np.arange(len(concept_ids), dtype=np.int32), len(image_ids)))
    return {
        "image_id": pa.array(image_ids).take(rows),
        "concept_id": pa.array(concept_ids).take(columns),
    }


def _write_parts(
    run: RunFolder,
    first: int,
    keys: dict[str, pa.Array],
    probability: np.ndarray,
    phrases: list[str],
    random: np.random.Generator,
) -> None:
    n = len(probability)
    rows = keys | {
        "witness": pa.array(["vlm"] * n),
        "witness_model": pa.array(["synthetic-1"] * n),
        "state": pa.array(["absent", "present"]).take(pa.array((probability > 0.5).astype(np.int8))),
        "probability": pa.array(probability),
        "evidence": pa.array(phrases).take(pa.array(random.integers(0, len(phrases), n))),
        "created_at": pa.array(np.full(n, np.datetime64("2026-01-01", "us")), pa.timestamp("us", tz="UTC")),
    }
    schema = JUDGEMENTS.to_arrow(JUDGEMENTS.empty(), "judgements").schema
    columns = [rows[f.name].cast(f.type) if f.name in rows else pa.nulls(n, f.type) for f in schema]
    table = pa.table(columns, schema=schema)
    n_concepts = len(set(keys["concept_id"].slice(0, 1000).to_pylist()))
    for image in range(0, n // n_concepts, PART_IMAGES):
        path = run.judgements_dir / f"part-{(first + image) // PART_IMAGES:06d}-synthetic.parquet"
        part = table.slice(image * n_concepts, PART_IMAGES * n_concepts)
        pq.write_table(part, path, compression="zstd")


def _write_corrections(run: RunFolder, n_images: int, concept_ids: list[str], random: np.random.Generator) -> None:
    """Two reviewers, two thousand words each, half of them about the same cells."""
    chosen = random.integers(0, n_images, 3_000)
    for reviewer, mine in (("Dr A", chosen[:2_000]), ("Dr B", chosen[1_000:])):
        rows = pd.DataFrame(
            {
                "image_id": [_image_ids(int(i), 1)[0] for i in mine],
                "concept_id": [concept_ids[i % len(concept_ids)] for i in mine],
                "witness": "expert",
                "witness_model": reviewer,
                "state": random.choice(["present", "absent", "uncertain"], len(mine)),
                "request_id": [f"review:{reviewer}:{n}" for n in range(len(mine))],
                "created_at": pd.Timestamp("2026-02-01", tz="UTC"),
            }
        )
        run.append_judgements(rows.reindex(columns=JUDGEMENTS.column_names))


# ---- the measurement -------------------------------------------------------------------------------------

_SERVER = """
import sys, numpy as np, uvicorn
from data_contracts.store import RunFolder
from pipeline.review.app import create_app
grey = np.full((64, 64, 3), 90, np.uint8)
app = create_app(RunFolder(sys.argv[1]), lambda image_id: grey, "t")
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False)
"""


def measure(run: RunFolder, repeats: int) -> None:
    """Start the server, wait until everything is read, ask for pages, and print the table."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began = time.perf_counter()
    server = subprocess.Popen([sys.executable, "-c", _SERVER, str(run.path), str(port)])
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as browser:
            _wait(browser, began)
            print(f"memory at its peak while reading: {_memory(server.pid, 'VmHWM'):.2f} GB", flush=True)
            print(f"{'page':<46} {'p50 ms':>8} {'p95 ms':>8} {'max ms':>8}")
            for name, addresses in _pages(browser):
                times = [_timed(browser, addresses[n % len(addresses)]) for n in range(repeats)]
                p50, p95 = np.percentile(times, [50, 95])
                print(f"{name:<46} {p50:8.0f} {p95:8.0f} {max(times):8.0f}", flush=True)
            times = [_correct(browser, n) for n in range(repeats)]
            print(
                f"{'a correction, until it shows':<46} {np.percentile(times, 50):8.0f} "
                f"{np.percentile(times, 95):8.0f} {max(times):8.0f}"
            )
            print(
                f"memory after the pages: {_memory(server.pid, 'VmRSS'):.2f} GB; "
                f"peak {_memory(server.pid, 'VmHWM'):.2f} GB"
            )
    finally:
        server.terminate()
        server.wait(30)


def _wait(browser: httpx2.Client, began: float) -> None:
    while True:
        try:
            if browser.get("/?token=t").status_code == 303:
                break
        except httpx2.TransportError:
            time.sleep(0.2)
    while browser.get("/").status_code == 503:
        time.sleep(0.5)
    print(f"first page after {time.perf_counter() - began:.0f} s", flush=True)
    while "still being read" in browser.get("/").text:
        time.sleep(2)
    print(f"whole ledger read after {time.perf_counter() - began:.0f} s", flush=True)


def _pages(browser: httpx2.Client) -> Iterator[tuple[str, list[str]]]:
    concepts = [f"concept-{k}" for k in (0, 7, 19, 33, 39)]
    yield "first page", ["/"]
    yield "class", [f"/?label={name}" for name in CLASSES]
    yield "concept, state", [f"/?concept={c}&state={s}" for c in concepts for s in ("present", "uncertain")]
    yield "any concept, state", [f"/?state={s}" for s in ("present", "uncertain", "not_assessed")]
    yield "concept, probability range", [f"/?concept={c}&low=30&high=45" for c in concepts]
    yield "witnesses disagree", ["/?dispute=witnesses", *(f"/?dispute=witnesses&concept={c}" for c in concepts)]
    yield "reviewers disagree", ["/?dispute=reviewers"]
    yield "most uncertain first", ["/?sort=uncertain"]
    yield "most uncertain first, by concept", [f"/?sort=uncertain&concept={c}" for c in concepts]
    yield "most disputed first, class, split", [f"/?sort=disputed&label={name}&split=test" for name in CLASSES]
    yield "text: path", ["/?text=series_77", "/?text=image_0123", "/?text=ward_5"]
    yield "text: rare and common evidence", [f"/?text={w}" for w in WORDS] + ["/?text=notched+rim", "/?text=zebra"]
    yield "a page deep inside", ["/?after=700000", "/?sort=uncertain&after=400000"]
    found = re.findall(r'<a href="(/image/[^"]+)"', browser.get("/?sort=uncertain").text)
    yield "one image", found[:20]
    yield "counts and prevalence", ["/overview", *(f"/overview?label={name}" for name in CLASSES)]
    yield "concepts", ["/concepts"]
    yield "disagreements", ["/disagreements"]
    thumbs = re.findall(r'src="(/pixels/[^"]+)"', browser.get("/?sort=disputed").text)
    yield "a thumbnail", thumbs


def _timed(browser: httpx2.Client, address: str) -> float:
    began = time.perf_counter()
    answer = browser.get(address.replace("&amp;", "&"))
    if answer.status_code != 200:
        raise SystemExit(f"{address}: expected 200, got {answer.status_code}: {answer.text[:200]}")
    return 1e3 * (time.perf_counter() - began)


def _correct(browser: httpx2.Client, n: int) -> float:
    form = {"image_id": _image_ids(1000 * n, 1)[0], "concept_id": "concept-3", "state": "present"}
    began = time.perf_counter()
    headers = {"origin": str(browser.base_url).rstrip("/"), "x-requested-with": "fetch"}
    answer = browser.post("/judge", data=form, headers=headers)
    if "by an expert" not in answer.text:
        raise SystemExit(f"a correction did not show: {answer.status_code}")
    return 1e3 * (time.perf_counter() - began)


def _memory(pid: int, field: str) -> float:
    """Gigabytes of a process, from the kernel's own account."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1e6 if found else float("nan")


if __name__ == "__main__":
    main()
