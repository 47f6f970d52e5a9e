"""A small run with awkward content, and how tests talk to its page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pandas as pd
import pyarrow as pa
from starlette.testclient import TestClient

from data_contracts.errors import ImageRejected, RejectReason
from data_contracts.manifest import RunManifest
from data_contracts.ports import Pixels
from data_contracts.store import RunFolder
from data_contracts.tables import JUDGEMENTS, Witness
from pipeline.review import queries
from pipeline.review.cells import row_of
from pipeline.review.ledger import Reviewer
from pipeline.review.ports import Ports
from pipeline.review.security import Tokens
from pipeline.review.site import Site

HOST = "http://127.0.0.1:8000"
EVIL = "<script>alert(1)</script>"
N_IMAGES = 70
IDS = [f"{k:064x}" for k in range(N_IMAGES - 1)] + ["dicom#7"]


def read(image_id: str) -> Pixels:
    if image_id == IDS[5]:
        raise ImageRejected(RejectReason.TRUNCATED, "image 5: the file ends too early")
    return np.full((30, 40, 3), IDS.index(image_id), np.uint8)


def images() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image_id": [*IDS, "f" * 64],
            "path": [f"folder/{k}.png" for k in range(N_IMAGES)] + ["folder/out.png"],
            "label": ["x", EVIL] * (N_IMAGES // 2) + ["x"],
            "split": ["train"] * 40 + ["test"] * (N_IMAGES - 39),
            "modality": "m",
            "width_px": 40,
            "height_px": 30,
            "rejected": [None] * N_IMAGES + ["truncated"],
        }
    )


def judgements(rows: list[tuple[str, str, str, str, str]], evidence: str = "it says <b>this</b>") -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["image_id", "concept_id", "witness", "witness_model", "state"])
    frame["created_at"] = pd.Timestamp("2026-01-01", tz="UTC")
    frame["evidence"] = evidence
    return frame.reindex(columns=JUDGEMENTS.column_names)


def concepts() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "concept_id": ["red", "round", "shiny"],
            "name": ["red", f"round {EVIL}", "shiny"],
            "definition": ["It is red.", "", ""],
            "group": pd.array([None, None, None], dtype="str"),
            "proposed_for": [["x"], ["x"], ["x"]],
            "origin": "vlm",
            "status": ["kept", "kept", "dropped"],
            "reason": [None, None, "not_visual"],
            "position": pd.array([0, 1, None], dtype="Int64"),
        }
    )


def make_run(path: Path) -> RunFolder:
    """Image 3 abstains, image 8 is disputed; even images are present, with the last digit as probability."""
    run = RunFolder(path)
    run.write_manifest(RunManifest.new("my run", "source"))
    run.write_images(images())
    run.write_concepts(concepts())
    labels = pd.DataFrame(
        [
            (i, c, None if k == 3 else k % 2 == 0, (k % 10) / 10, 0.9 if k == 8 else 0.0)
            for k, i in enumerate(IDS)
            for c in ("red", "round")
        ],
        columns=["image_id", "concept_id", "present", "probability", "disagreement"],
    )
    labels["present"] = labels["present"].astype("boolean")
    run.write_labels(labels.assign(decided_by="vlm"), pd.DataFrame())
    run.append_judgements(judgements([(i, "red", "vlm", "some-vlm", "present") for i in IDS]))
    run.append_judgements(judgements([(IDS[9], "round", "vlm", "some-vlm", "absent")], "Jagged notches, left"))
    run.write_alignment([_alignment(IDS[:30]), _alignment(IDS[30:])])
    return run


def _alignment(image_ids: list[str]) -> pa.Table:
    n = len(image_ids)
    heatmap = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    return pa.table(
        {
            "image_id": image_ids,
            "concept_id": ["red"] * n,
            "similarity": [0.5] * n,
            "null_similarity": [0.1] * n,
            "probability": [0.53] * n,
            "grid_h": [2] * n,
            "grid_w": [3] * n,
            "heatmap": pa.array([np.array(heatmap, np.float16)] * n, pa.list_(pa.float16())),
        }
    )


def post(client: TestClient, path: str, *, origin: str | None = HOST, **form: Any) -> httpx2.Response:
    headers = {} if origin is None else {"origin": origin}
    return client.post(path, data=form, headers=headers)


def say(client: TestClient, state: str, image_id: str = IDS[0], concept_id: str = "red") -> httpx2.Response:
    return post(client, "/judge", image_id=image_id, concept_id=concept_id, state=state, back=f"/image/{image_id}")


def expert_rows(run: RunFolder) -> pd.DataFrame:
    ledger = run.read_judgements()
    return ledger[ledger["witness"] == Witness.EXPERT].reset_index(drop=True)


def state_now(run: RunFolder, image_id: str = IDS[0], concept_id: str = "red") -> dict[str, Any]:
    """A cell as a page that is opened now would show it."""
    site = Site(run, read, Tokens("t"), Ports(), "nobody")
    try:
        index = site.index()
        return row_of(site, index, index.position(image_id), image_id, concept_id, Reviewer("nobody"))
    finally:
        site.keeper.stop()


def cards(html: str) -> list[int]:
    """Numbers of the images in a page of the grid."""
    return [IDS.index(i.replace("%23", "#")) for i in re.findall(r'<a href="/image/([^"?]+)[^"]*">\s*<img', html)]


PAGE_SIZE = queries.PAGE_SIZE
