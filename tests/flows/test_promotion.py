"""Which model is in use: non-inferiority on shared test images, switching that survives a kill, going back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import f1_score

from data_contracts.errors import ConfigurationError
from data_contracts.files import sha256_of_file
from data_contracts.manifest import RunManifest, StepRecord
from data_contracts.store import RunFolder
from data_contracts.tables import IMAGES
from flows import promotion
from flows.candidate import unfinished
from flows.steps.promote import macro_f1, not_worse, paired_difference
from model.intervals import Interval


def images_of(*ids: str) -> pd.DataFrame:
    table = pd.DataFrame({"image_id": ids, "path": [f"{name}.png" for name in ids], "modality": "phantom"})
    return table.reindex(columns=IMAGES.column_names)


def make_model(folder: Path, number: int | None, *, promoted: bool = True) -> str:
    """A folder that looks like a model; returns what its weights hold."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = f"weights of {number}"
    (folder / "weights.safetensors").write_text(weights)
    (folder / "config.json").write_text(json.dumps({"number": number}))
    if number is not None:
        version = promotion.Version(
            number, "2026-01-01T00:00:00", sha256_of_file(folder / "config.json"), "s", 10, 5, 0.9, 0, promoted=promoted
        )
        promotion._write_version(folder, version)
    pq.write_table(
        pa.Table.from_pandas(pd.DataFrame({"image_id": [f"image of {number}"], "split": ["test"]})),
        folder / "trained_on.parquet",
    )
    return weights


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.write_manifest(RunManifest.new("run", "source"))
    return run


def in_use(run: RunFolder) -> str:
    return (run.model_dir / "weights.safetensors").read_text()


def layout(run: RunFolder) -> dict[str, str]:
    folders = [run.model_dir, *sorted(run.models_dir.iterdir())]
    return {f.name: (f / "weights.safetensors").read_text() for f in folders if f.is_dir()}


def receipt_of(run: RunFolder, folder: Path) -> None:
    manifest = run.read_manifest()
    outputs = run.receipts([folder / "weights.safetensors"])
    manifest.steps["train"] = StepRecord(
        inputs_sha256="x", outputs=outputs, finished_at="2026-01-01T00:00:00Z", seconds=1
    )
    run.write_manifest(manifest)


# ---- the verdict ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "promoted", "words"),
    [
        (Interval(0.02, 0.005, 0.04), True, "not worse"),
        (Interval(-0.01, -0.025, 0.01), True, "not worse"),
        (Interval(0.00, -0.08, 0.08), False, "not shown to be as good"),
        (Interval(-0.10, -0.15, -0.05), False, "worse"),
        (Interval(0.0, float("nan"), float("nan")), False, "not shown"),
    ],
)
def test_a_new_model_must_be_shown_not_to_be_worse(difference: Interval, promoted: bool, words: str) -> None:
    verdict = not_worse(0.9, difference, 0.03, 60)
    assert verdict.promoted is promoted
    assert words in verdict.sentence
    assert ("stays in use" in verdict.sentence) is not promoted


def test_macro_f1_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    y, said = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    assert macro_f1(y, said, 4) == pytest.approx(f1_score(y, said, average="macro"))


def test_the_interval_is_paired() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    hard = rng.random(300) < 0.3
    old = np.where(hard, (y + 1) % 3, y)
    same = paired_difference(y, old, old)
    assert (same.value, same.low, same.high) == (0, 0, 0), "the same errors cancel out"
    better = np.where(hard & (rng.random(300) < 0.7), old, y)
    found = paired_difference(y, old, better)
    assert found.low > 0
    assert found.value == pytest.approx(
        f1_score(y, better, average="macro") - f1_score(y, old, average="macro"), abs=1e-9
    )
    # A few patients with many images each say less than as many images of different patients.
    assert found.low > paired_difference(y, old, better, groups=[n % 8 for n in range(300)]).low - 0.2
    wide = paired_difference(y, old, better, groups=[int(n) for n in hard.cumsum() // 20])
    assert wide.high - wide.low > 0


# ---- switching -----------------------------------------------------------------------------------------------


def test_the_first_model_comes_into_use_and_the_next_one_takes_its_place(run: RunFolder) -> None:
    first = make_model(run.models_dir / "candidate", 1)
    promotion.switch_to(run, run.models_dir / "candidate")
    assert layout(run) == {"model": first}
    second = make_model(run.models_dir / "candidate", 2)
    promotion.switch_to(run, run.models_dir / "candidate")
    assert layout(run) == {"model": second, "001": first}
    assert not (run.models_dir / "switch.json").exists()
    assert promotion.trained_on(run)["image_id"].tolist() == ["image of 2"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_at_any_instant_of_the_switch_is_put_right(
    run: RunFolder, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename, and the exchange, in turn is the last thing that happens."""
    if not can_exchange:
        monkeypatch.setattr(promotion, "_exchanged", lambda _one, _other: False)
    rename, exchange, write = Path.rename, promotion._exchanged, promotion.write_text

    class Killed(BaseException):
        pass

    for n_survived in range(8):
        for name in ("model", "models"):
            promotion.shutil.rmtree(run.path / name, ignore_errors=True)
        old, new = make_model(run.model_dir, 1), make_model(run.models_dir / "candidate", 2)
        left = [n_survived]

        def step(do, left=left):
            def one(*arguments):
                if not left[0]:
                    raise Killed
                left[0] -= 1
                return do(*arguments)

            return one

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", step(rename))
            patch.setattr(promotion, "_exchanged", step(exchange))
            patch.setattr(promotion, "write_text", step(write))
            try:
                promotion.switch_to(run, run.models_dir / "candidate")
                finished = True
            except Killed:
                finished = False
        promotion.recover(run)
        # The intention is on the disk or it is not; from then on the change happens, once.
        if n_survived:
            assert layout(run) == {"model": new, "001": old}, n_survived
        else:
            assert in_use(run) == old
        if finished:
            return
    pytest.fail("the switch never finished")


def test_a_model_that_was_refused_is_kept_beside_the_one_in_use(run: RunFolder) -> None:
    old = make_model(run.model_dir, 1)
    refused = make_model(run.models_dir / "candidate", 2, promoted=False)
    promotion.recover(run)
    assert layout(run) == {"model": old, "002": refused}
    assert unfinished(run) is None
    newest = promotion.newest(run)
    assert newest is not None
    assert newest[1].number == 2, "what was trained last is no reason to train again"


def test_a_candidate_that_was_not_compared_stays_one(run: RunFolder) -> None:
    make_model(run.model_dir, 1)
    make_model(run.models_dir / "candidate", None)
    promotion.recover(run)
    assert unfinished(run) == run.models_dir / "candidate"


def test_the_receipt_of_training_follows_its_model(run: RunFolder) -> None:
    candidate = run.models_dir / "candidate"
    make_model(run.model_dir, 1)
    make_model(candidate, 2)
    receipt_of(run, candidate)
    promotion.switch_to(run, candidate)
    assert list(run.read_manifest().steps["train"].outputs) == ["model/weights.safetensors"]
    promotion.switch_to(run, promotion.find(run, None)[0])
    receipt = run.read_manifest().steps["train"]
    assert list(receipt.outputs) == ["models/002/weights.safetensors"]
    assert run.holds(receipt.outputs), "after going back, nothing is trained again"


def test_going_back_takes_the_one_before_and_says_what_there_is(run: RunFolder) -> None:
    make_model(run.model_dir, 4)
    with pytest.raises(ConfigurationError, match="expected an earlier model, kept are: none"):
        promotion.find(run, None)
    for number, promoted in ((1, True), (2, True), (3, False)):
        make_model(run.models_dir / f"{number:03d}", number, promoted=promoted)
    assert promotion.find(run, None)[1].number == 2, "a refused one was never in use"
    assert promotion.find(run, 3)[1].number == 3
    with pytest.raises(ConfigurationError, match="expected model 9, kept are: 1, 2, 3"):
        promotion.find(run, 9)


def test_only_so_many_are_kept_refused_ones_go_first_and_never_the_last_trained(run: RunFolder) -> None:
    make_model(run.model_dir, 3)
    for number, promoted in ((1, True), (2, False), (4, False), (5, False)):
        make_model(run.models_dir / f"{number:03d}", number, promoted=promoted)
    receipt_of(run, run.models_dir / "002")
    assert promotion.prune(run, 2) == [4, 5]
    assert set(layout(run)) == {"model", "001", "002"}
    assert promotion.prune(run, 2) == []


def test_a_model_that_was_trained_in_place_is_not_taken_for_the_recorded_one(run: RunFolder) -> None:
    make_model(run.model_dir, 1)
    assert promotion.current(run) is not None
    (run.model_dir / "config.json").write_text("another one")
    assert promotion.current(run) is None
