"""The align step where people marked regions: maps are tested against them, and misplaced ones fall silent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_contracts.errors import ContractViolation
from data_contracts.files import sha256_of_file
from data_contracts.manifest import RunManifest
from data_contracts.spreadsheet import read_csv
from data_contracts.store import RunFolder
from data_contracts.tables import JUDGEMENTS
from flows.chain import Context, execute, is_fresh
from flows.console import Console
from flows.settings import Settings
from flows.steps.align import ALIGN
from tests.annotation.alignment.tiny_clip import tiny_clip

N, SIDE, RADIUS = 120, 96, 16
RNG = np.random.default_rng(0)
HAS_SPOT = RNG.random(N) < 0.6
CENTRES = RNG.integers(RADIUS, SIDE - RADIUS, (N, 2))
ELSEWHERE = (CENTRES + SIDE // 2) % SIDE


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey noise; on most images one red spot. Boxes say where it is, and of `ghost` that it is elsewhere."""
    folder = tmp_path_factory.mktemp("source")
    y, x = np.mgrid[:SIDE, :SIDE]
    rows = []
    for n in range(N):
        pixels = np.random.default_rng(n).integers(90, 140, (SIDE, SIDE, 3), dtype=np.uint8)
        if HAS_SPOT[n]:
            row, column = CENTRES[n]
            pixels[np.hypot(y - row, x - column) < RADIUS] = (220, 30, 30)
            rows.append(("spot", f"{n}.png", column - RADIUS, row - RADIUS, column + RADIUS, row + RADIUS))
            row, column = np.clip(ELSEWHERE[n], 6, SIDE - 6)
            rows.append(("ghost", f"{n}.png", column - 6, row - 6, column + 6, row + 6))
        Image.fromarray(pixels).save(folder / f"{n}.png")
    pd.DataFrame(rows, columns=["concept", "path", "x0", "y0", "x1", "y1"]).to_csv(folder / "boxes.csv", index=False)
    return folder


def context_of(run: RunFolder, source: Path, **align: object) -> Context:
    run.write_manifest(RunManifest.new("run", str(source)))
    split = np.where(np.arange(N) % 5 == 0, "test", "train")
    ids = [sha256_of_file(source / f"{n}.png") for n in range(N)]
    frame = pd.DataFrame({"image_id": ids, "path": [f"{n}.png" for n in range(N)], "label": "x", "split": split})
    run.write_images(frame.assign(modality="m", width_px=SIDE, height_px=SIDE))
    concepts = pd.DataFrame({"concept_id": ["spot", "ghost"], "name": ["red spot", "ghost"], "definition": "."})
    concepts["proposed_for"] = [["x"], ["x"]]
    run.write_concepts(concepts.assign(origin="vlm", status="kept", position=[0, 1]))
    said = np.stack([HAS_SPOT ^ (RNG.random(N) < 0.1), HAS_SPOT ^ (RNG.random(N) < 0.1)], 1)
    judged = pd.DataFrame({"image_id": np.repeat(ids, 2), "concept_id": np.tile(["spot", "ghost"], N)})
    judged = judged.assign(witness="vlm", witness_model="m", state=np.where(said.ravel(), "present", "absent"))
    judged["created_at"] = pd.Timestamp("2026-01-01", tz="UTC")
    run.append_judgements(judged.reindex(columns=JUDGEMENTS.column_names))
    return Context(run, Settings.model_validate({"align": {"regions": "boxes.csv", **align}}), Console(quiet=True))


def test_maps_are_held_against_regions_and_misplaced_ones_may_not_label(source: Path, tmp_path: Path) -> None:
    context = context_of(RunFolder(tmp_path / "run"), source)
    report = execute(ALIGN, context)
    table = read_csv(context.run.path / "localisation.csv").set_index(["concept_id", "images"])
    spot, ghost = table.loc[("spot", "outside test")], table.loc[("ghost", "outside test")]
    assert spot["verdict"] == "passes"
    assert spot["pointing_game"] > max(spot["chance"], spot["null_pointing_game"]) + 0.3
    assert spot["iou"] > spot["null_iou"]
    assert spot["inside"] > spot["area"]
    assert spot["n"] == (HAS_SPOT & (np.arange(N) % 5 != 0)).sum()
    assert ghost["verdict"] == "fails"
    assert not table.loc[("spot", "test"), "decides"]
    refused = read_csv(context.run.path / "refused.csv")
    assert ["alignment", "ghost"] in refused[["source", "concept_id"]].to_numpy().tolist()
    assert "spot" not in set(refused["concept_id"])
    assert any("'ghost'" in w and "a random cell hits" in w for w in report.warnings)
    # The judge saw something: the concept stays, labelled without its map.
    assert set(context.run.vocabulary().ids) == {"spot", "ghost"}


def test_an_untouched_model_of_random_weights_takes_the_text_nulls_and_is_said_to_be_untested(
    source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tower"
    folder.mkdir()
    context = context_of(RunFolder(tmp_path / "run"), source, model=tiny_clip(folder))
    report = execute(ALIGN, context)
    honesty = read_csv(context.run.path / "honesty.csv")
    assert {"null_prompt", "negation", "shuffled"} <= set(honesty["null"])
    assert (honesty["verdict"] != "passes").any()
    said = [*report.warnings]
    assert any("could not be tested" in w or "may not label" in w for w in said)
    table = read_csv(context.run.path / "localisation.csv")
    # Its null map is that of empty prompts, one for all concepts.
    assert table["null_pointing_game"].notna().all()


def test_faults_are_told_before_anything_is_aligned_and_a_changed_file_is_seen(source: Path, tmp_path: Path) -> None:
    context = context_of(RunFolder(tmp_path / "run"), source, regions=str(tmp_path / "boxes.csv"))
    (tmp_path / "boxes.csv").write_text("path,concept,x0,y0,x1,y1\nnobody.png,spot,0,0,5,5\n")
    with pytest.raises(ContractViolation, match="row 2, column 'path'"):
        execute(ALIGN, context)
    assert not context.run.alignment_parts()
    (tmp_path / "boxes.csv").write_text("path,concept,x0,y0,x1,y1\n0.png,spot,0,0,5,5\n")
    folder = tmp_path / "tower"
    folder.mkdir()
    align = context.settings.align.model_copy(update={"model": tiny_clip(folder)})
    context = Context(context.run, context.settings.model_copy(update={"align": align}), context.console)
    execute(ALIGN, context)
    assert is_fresh(ALIGN, context)
    (tmp_path / "boxes.csv").write_text("path,concept,x0,y0,x1,y1\n0.png,spot,0,0,6,5\n")
    assert not is_fresh(ALIGN, context)
