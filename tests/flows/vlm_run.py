"""A run whose truth is known to a simulated endpoint: the real steps, and what must hold of its ledger at any time."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from annotation.judge import SentImage
from annotation.vlm.journal import Journal, Record
from annotation.vlm.schema import FaultCode
from benchmarks.simulated_endpoint import DEFAULT_MODEL, Sight, Simulator, chance
from data_contracts.store import RunFolder
from data_contracts.tables import State
from flows.chain import Context, StepReport, execute
from flows.console import Console
from flows.settings import Settings
from flows.steps import INGEST, STEPS, begin, image_reader
from flows.vlm import VlmSessions
from pipeline.phantoms import make_phantoms

N_IMAGES = 24
SINGLES = ("dark-centre", "jagged-outline")
SHAPES = ("round", "oval", "lobed")
CONCEPTS = (*SINGLES, *SHAPES)
N_CELLS = N_IMAGES * len(CONCEPTS)
CHOICE = "choice-shape"
"""What the exclusive group is asked as."""

_SIDE_PX = 48
_VLM = {
    "model": DEFAULT_MODEL,
    "probe": False,
    "max_retries": 0,
    "timeout_s": 20,
    "concurrency": 16,
    "image_side_px": _SIDE_PX,
}


@dataclass(frozen=True)
class World:
    """Images with concepts to judge, and what is true of them."""

    prepared: RunFolder
    """After ingest and concepts; to be copied."""
    concepts_file: Path
    truth_file: Path
    """For the simulator: by the bytes that are sent."""
    truth: Mapping[str, Mapping[str, bool]]
    """Image id → concept id → whether it is there."""
    sights: Mapping[str, Sight]
    """Image id → the image as it is sent."""

    def settings(self, **vlm: Any) -> Settings:
        """The settings of a command; arguments are keys of [vlm]."""
        # Three shards, two of them at once.
        concepts = {"file": str(self.concepts_file)}
        return Settings.model_validate({"vlm": _VLM | vlm, "concepts": concepts, "flow": {"shard_size": 8}})


def make_world(folder: Path) -> World:
    """A world in this folder, whose images went through the real steps before judging."""
    make_phantoms(folder, n_images=N_IMAGES, seed=1, side_px=_SIDE_PX)
    names = [f"{c.replace('-', ' ')},What {c} means.," for c in SINGLES] + [f"{c},It is {c}.,shape" for c in SHAPES]
    concepts_file, truth_file = folder / "concepts.csv", folder / "truth.json"
    concepts_file.write_text("\n".join(["name,definition,group", *names]))
    world = World(RunFolder(folder / "prepared"), concepts_file, truth_file, {}, {})
    settings = world.settings(base_url="http://127.0.0.1:9/v1")
    context = Context(begin(folder / "images", world.prepared, settings), settings, Console(quiet=True))
    for step in (INGEST, STEPS["concepts"]):
        execute(step, context)
    read = image_reader(context)
    ids = sorted(world.prepared.read_images()["image_id"])
    sights = {i: Sight.of(SentImage.of(read(i), settings.vlm).encoded) for i in ids}
    truth = {image_id: _drawn_truth(number) for number, image_id in enumerate(ids)}
    truth_file.write_text(json.dumps({sights[i].sha256: truth[i] for i in ids}))
    return World(world.prepared, concepts_file, truth_file, truth, sights)


def _drawn_truth(number: int) -> dict[str, bool]:
    """Each single concept in about half of the images; one shape in most of them, none in some."""
    shape = int(chance("shape", number) * (len(SHAPES) + 1))
    singles = {concept_id: chance(concept_id, number) < 0.5 for concept_id in SINGLES}
    return singles | {concept_id: n == shape for n, concept_id in enumerate(SHAPES)}


class Run:
    """A run folder of its own, and the commands that are given on it."""

    def __init__(self, world: World, folder: Path, simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
        """A copy of the prepared run, judged by this simulator unless told otherwise."""
        shutil.copytree(world.prepared.path, folder)
        self._monkeypatch = monkeypatch
        self.world = world
        self.folder = RunFolder(folder)
        self.simulator = simulator

    def context(self, **vlm: Any) -> Context:
        """What a command works on; arguments are keys of [vlm]."""
        settings = self.world.settings(**{"base_url": self.simulator.base_url} | vlm)
        return Context(self.folder, settings, Console(quiet=True))

    def judge(self, **vlm: Any) -> StepReport:
        """The judge command, as if in a process of its own."""
        self._monkeypatch.setattr("flows.vlm.SESSIONS", VlmSessions())
        return execute(STEPS["judge"], self.context(**vlm))

    def records(self) -> list[Record]:
        """Everything that was paid for."""
        with Journal(self.folder.journal_dir) as journal:
            return list(journal.lines())

    def ledger(self, model: str = DEFAULT_MODEL) -> pd.DataFrame:
        """The standing answer of every cell."""
        rows = self.folder.read_judgements()
        rows = rows[rows["witness_model"] == model].sort_values("created_at", kind="stable")
        return rows.drop_duplicates(["image_id", "concept_id"], keep="last")

    def open_cells(self) -> dict[str, set[tuple[str, str]]]:
        """Reason → cells without an answer; asserts that every answered one is right and that nothing is invented."""
        rows, truth = self.ledger(), self.world.truth
        found: dict[str, set[tuple[str, str]]] = defaultdict(set)
        missing = {(i, c) for i in truth for c in CONCEPTS}
        for row in rows.itertuples():
            # Whatever was not asked is no member of this set.
            missing.remove((row.image_id, row.concept_id))
            if row.state == State.NOT_ASSESSED:
                assert row.evidence in set(FaultCode)
                assert pd.isna(row.probability)
                found[row.evidence].add((row.image_id, row.concept_id))
            else:
                assert (row.state == State.PRESENT) == truth[row.image_id][row.concept_id], row
                assert row.state in {State.PRESENT, State.ABSENT}
        return dict(found) | ({"no row": missing} if missing else {})

    @property
    def is_all_right(self) -> bool:
        """Whether every cell has its answer, and the right one."""
        return not self.open_cells()
