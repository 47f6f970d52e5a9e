from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_contracts.errors import ContractViolation, InputRefused
from model.config import TrainConfig
from model.fit import prepare_for
from model.protocols import as_published, optimism, paper_trial, require_marks, require_separate_patients
from model.systems.registry import SYSTEMS

SHORT = TrainConfig(epochs=6, seeds=(3,), image_size_px=64)


@pytest.mark.parametrize("name", ["med-micn-paper", "sequential-cbm"])
def test_the_published_protocol_reports_the_best_look_at_the_test_images(squares, cache_dir: Path, name: str) -> None:
    config = SYSTEMS[name].config(SHORT)
    prepared, backbone = prepare_for([config], squares.dataset(), squares, cache_dir=cache_dir)
    trial = paper_trial(prepared, backbone, config)
    y = prepared.dataset.class_index()[prepared.dataset.rows("test")]
    accuracies = (trial.candidates == y).mean(1)
    assert len(trial.candidates) == (6 if name == "med-micn-paper" else 30)
    assert (trial.outputs.predicted == y).mean() == accuracies.max()
    np.testing.assert_array_equal(trial.outputs.predicted, trial.candidates[accuracies.argmax()])
    if name == "med-micn-paper":
        assert trial.facts["epoch"] == accuracies.argmax() + 1
    assert np.isnan(trial.facts["val_macro_f1"])  # there is nothing left to validate on


def test_the_published_protocol_trains_on_validation_images_too(squares) -> None:
    dataset = squares.dataset()
    published = as_published(dataset)
    assert len(published.rows("val")) == 0
    assert len(published.rows("train")) == len(dataset.rows("train")) + len(dataset.rows("val"))
    np.testing.assert_array_equal(published.rows("test"), dataset.rows("test"))


def test_many_worthless_networks_are_all_optimism() -> None:
    """The best of fifty coins seems better than one half; chosen on other images it is not."""
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2
    candidates = rng.integers(0, 2, (50, 200))
    best = (candidates == y).mean(1).max()
    assert best > 0.55
    found = optimism(candidates, y, np.arange(200), 2)
    assert best - found["optimism_accuracy"] == pytest.approx(0.5, abs=0.03)


def test_one_network_cannot_be_chosen_too_well() -> None:
    y = np.arange(60) % 3
    said = np.where(np.arange(60) < 45, y, (y + 1) % 3)
    found = optimism(np.stack([said, said]), y, np.arange(60), 3)
    assert found == pytest.approx({"optimism_accuracy": 0, "optimism_macro_f1": 0}, abs=1e-12)


def test_halves_are_made_of_whole_patients() -> None:
    """Each candidate knows one patient's images by heart: on another patient's images that is worth nothing."""
    y = np.arange(40) % 2
    patients = np.arange(40) // 4
    rng = np.random.default_rng(0)
    candidates = np.stack([np.where(patients == p, y, rng.integers(0, 2, 40)) for p in range(10)])
    by_patient, by_image = (optimism(candidates, y, clusters, 2) for clusters in (patients, np.arange(40)))
    assert by_patient["optimism_accuracy"] > by_image["optimism_accuracy"]


def test_a_patient_on_two_sides_is_no_clean_protocol(squares) -> None:
    dataset = squares.dataset()
    require_separate_patients(dataset)
    grouped = replace(dataset, frame=dataset.frame.assign(group_id="one patient"))
    with pytest.raises(InputRefused, match="1 of 1 patients"):
        require_separate_patients(grouped)


def test_numbers_chosen_on_test_images_are_not_written_without_their_optimism() -> None:
    table = pd.DataFrame(
        {
            "system": ["a", "b"],
            "protocol": ["clean", "paper"],
            "optimism_accuracy": [np.nan, 0.02],
            "optimism_macro_f1": [np.nan, 0.01],
        }
    )
    require_marks(table)
    with pytest.raises(ContractViolation, match="b: expected the optimism"):
        require_marks(table.assign(optimism_macro_f1=np.nan))
    with pytest.raises(ContractViolation, match="b: expected the optimism"):
        require_marks(table[["system", "protocol"]])
