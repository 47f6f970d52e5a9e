from __future__ import annotations

from datetime import UTC, datetime

import pandas as pd
import pytest

from data_contracts.tables import CONCEPTS, IMAGES
from pipeline.report.card import CardContent, data_sheet, model_card
from pipeline.report.markdown import Markdown, escaped, interval, table

NOW = datetime(2026, 5, 4, tzinfo=UTC)
MODEL = {
    "train": {
        "family": "med-micn",
        "logic": "paper",
        "t_norm": "godel",
        "freeze_backbone": True,
        "epochs": 30,
        "batch_size": 32,
        "learning_rate": 0.001,
        "weight_decay": 0.01,
        "lambda_concept": 1.0,
        "lambda_neural": 0.1,
        "seeds": [0, 1],
    },
    "class_names": ["benign", "malignant"],
    "seed": 1,
    "epoch": 7,
    "backbone": {
        "name": "embedded",
        "initial_weights": "package x",
        "n_features": 1280,
        "preprocess": {"size_px": 224},
    },
}


def content(**parts: object) -> CardContent:
    return CardContent("run", NOW, "dermoscopy", False, {}, **parts)


def test_half_a_run_has_texts_that_say_what_is_missing() -> None:
    card = model_card(content())
    assert "No model was trained" in card
    assert "Nothing was measured." in card
    assert "Probabilities are not calibrated." in card
    assert "None is in use" in card
    sheet = data_sheet(content(images=IMAGES.empty(), concepts=CONCEPTS.empty()))
    assert "0 of 0 files were used" in sheet
    assert "No two witnesses were compared." in sheet


@pytest.mark.parametrize("write", [model_card, data_sheet])
def test_names_cannot_become_markup_or_break_a_table(write) -> None:
    hostile = "<script>alert(1)</script> | [x](y)\n# title"
    images = pd.DataFrame(
        [{"image_id": "a", "path": "p", "label": hostile, "split": "test", "modality": "m", "format": "png"}]
    ).reindex(columns=IMAGES.column_names)
    found = write(content(images=images, model=MODEL | {"class_names": [hostile]}))
    assert "<script>" not in found
    assert "\n# title" not in found
    row = next(line for line in found.splitlines() if line.startswith("| &lt;script"))
    assert row.replace("\\|", "").count("|") == 4


def test_a_generated_data_set_and_published_protocol_are_said_at_once() -> None:
    found = model_card(CardContent("run", NOW, "m", True, {}, model=MODEL))
    assert "nothing about patients" in found
    assert "Test images chose nothing." in found
    paper = model_card(content(model=MODEL | {"train": MODEL["train"] | {"protocol": "paper"}}))
    assert "flatter the model" in paper
    assert "Test images chose nothing." not in paper


def test_numbers_stand_with_their_intervals() -> None:
    metrics = {"accuracy": {"mean": 0.9, "sd": 0.01}, "ece": {"mean": 0.05, "sd": None}}
    bounds = pd.DataFrame([{"metric": "accuracy", "estimate": 0.91, "low": 0.88, "high": 0.94, "n": 200}])
    groups = pd.DataFrame(
        [
            {
                **{
                    "column": "skin",
                    "value": "V",
                    "n": 9,
                    "metric": "accuracy",
                    "estimate": 0.5,
                    "low": 0.2,
                    "high": 0.8,
                },
                **dict.fromkeys(["difference", "difference_low", "difference_high", "p_holm"], float("nan")),
                "note": "group too small: 9 images",
            }
        ]
    )
    card = model_card(content(model=MODEL, metrics=metrics, intervals=bounds, n_test=200, subgroups=groups))
    assert "| Accuracy | 0.900 ± 0.010 | 0.910 (0.880 to 0.940) |" in card
    assert "| skin = V | 9 | accuracy | 0.500 (0.200 to 0.800) | – | – | group too small: 9 images |" in card
    assert interval(0.5, float("nan"), float("nan")) == "0.500"


def test_strengths_are_shown_as_in_the_paper() -> None:
    rows = [("none", 0.0), ("pgd", 8.0), ("uniform noise", 0.0), ("jpeg", 1.0)]
    numbers = dict.fromkeys(
        ["accuracy", "accuracy_low", "accuracy_high", "macro_f1", "concept_auroc", "map_correlation"], 0.5
    )
    frame = pd.DataFrame([{"perturbation": name, "strength": s, "n": 4, **numbers} for name, s in rows])
    card = model_card(content(robustness=frame))
    for expected in ("| none |  |", "| pgd | 8/255 |", "| uniform noise | 0/255 |", "| jpeg | severity 1 |"):
        assert expected in card


def test_markdown_is_escaped_once() -> None:
    assert escaped("a_b *c*") == r"a\_b \*c\*"
    assert escaped(Markdown("a_b")) == "a_b"
    assert escaped(3) == 3
    assert table(["x"], [[None], [float("nan")], [1.5]]) == "| x |\n| --- |\n| – |\n| – |\n| 1.5 |"
