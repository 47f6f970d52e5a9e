"""A finished run's evidence: every file is there, and they tell one story."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from data_contracts.spreadsheet import read_csv
from flows.steps.evidence import (
    CONCEPT_USE_FILE,
    CONCEPT_USE_PAGE,
    IMAGE_RULES_FILE,
    INTERVENTIONS_FILE,
    INTERVENTIONS_PLOT,
    KNOCK_OUT_FILE,
    KNOCK_OUT_PLOT,
    RULE_CLASSES_FILE,
    RULES_FILE,
    RULES_PAGE,
    rules_of_other_seeds,
)
from tests.flows.conftest import Finished


@pytest.fixture(scope="module")
def tables(finished: Finished) -> dict[str, pd.DataFrame]:
    names = (RULES_FILE, RULE_CLASSES_FILE, IMAGE_RULES_FILE, CONCEPT_USE_FILE, KNOCK_OUT_FILE, INTERVENTIONS_FILE)
    return {name: read_csv(finished.run.explanations_dir / name) for name in names}


def test_every_rule_has_its_numbers_with_intervals(finished: Finished, tables: dict[str, pd.DataFrame]) -> None:
    rules, n = tables[RULES_FILE], (finished.run.read_dataset().frame["split"] == "test").sum()
    assert rules["n_images"].eq(n).all()
    for name in ("precision", "recall", "coverage", "fidelity"):
        known = rules.dropna(subset=[name])
        assert (known[f"{name}_low"] <= known[name] + 1e-9).all()
        assert (known[name] <= known[f"{name}_high"] + 1e-9).all()
    ids = set(finished.run.vocabulary().ids)
    assert all({term["concept_id"] for term in json.loads(terms)} <= ids for terms in rules["terms"])
    assert set(tables[RULE_CLASSES_FILE]["class"]) == set(finished.run.read_dataset().class_names)


def test_rules_are_compared_with_those_of_the_other_seed(finished: Finished, tables: dict[str, pd.DataFrame]) -> None:
    rules = tables[RULES_FILE]
    assert rules["n_seeds"].eq(1).all()  # two seeds were trained
    assert rules["stability"].between(0, 1).all()
    saved = json.loads((finished.run.model_dir / "config.json").read_text())["seed"]
    assert set(rules_of_other_seeds(finished.run.model_dir, saved)) == {0, 1} - {saved}


def test_every_held_out_image_has_its_rule_with_truth_values(
    finished: Finished, tables: dict[str, pd.DataFrame]
) -> None:
    dataset = finished.run.read_dataset()
    table = tables[IMAGE_RULES_FILE]
    assert set(table["image_id"]) == set(dataset.frame.loc[dataset.frame["split"] == "test", "image_id"])
    for terms, length in zip(table["terms"], table["length"], strict=True):
        assert len(json.loads(terms)) == length
        assert all(0 <= term["truth"] <= 1 for term in json.loads(terms))


def test_the_use_of_concepts_is_measured_beside_its_controls(tables: dict[str, pd.DataFrame]) -> None:
    use = tables[CONCEPT_USE_FILE].set_index("measure")
    assert {
        *("accuracy", "lost_without_concepts", "lost_with_shuffled_concepts", "share_through_concepts"),
        *("accuracy_with_random_concepts", "leakage_linear_probabilities", "completeness_embeddings"),
        *("area_right_corrections_random", "area_wrong_corrections_utility"),
    } <= set(use.index)
    assert use["control"].notna().all()
    assert use["meaning"].str.endswith(".").all()
    assert ((use["low"] <= use["value"] + 1e-9) & (use["value"] <= use["high"] + 1e-9)).all()


def test_curves_start_at_the_classifiers_accuracy(tables: dict[str, pd.DataFrame]) -> None:
    accuracy = tables[CONCEPT_USE_FILE].set_index("measure").at["accuracy", "value"]
    curves = tables[INTERVENTIONS_FILE]
    assert curves.loc[curves["n_corrected"] == 0, "accuracy"].tolist() == pytest.approx([accuracy] * 6)
    assert set(curves["order"]) == {"random", "uncertainty", "utility"}


def test_pages_and_pictures_are_there_and_say_what_limits_them(finished: Finished) -> None:
    folder = finished.run.explanations_dir
    rules, use = ((folder / name).read_text("utf-8") for name in (RULES_PAGE, CONCEPT_USE_PAGE))
    assert "took no part in reading them" in " ".join(rules.split())
    assert "reading of the network, not the way it decides" in " ".join(rules.split())
    assert "`fusion = " in use
    assert "always saying the commonest class" in use
    for name in (KNOCK_OUT_PLOT, INTERVENTIONS_PLOT):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_files_belong_to_the_explaining_step(finished: Finished) -> None:
    outputs = finished.run.read_manifest().steps["explain"].outputs
    assert {f"explanations/{name}" for name in (RULES_PAGE, CONCEPT_USE_PAGE, KNOCK_OUT_FILE)} <= set(outputs)
