from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from annotation.trust.calibration import (
    CALIBRATION_COLUMNS,
    brier_score,
    calibration_table,
    expected_calibration_error,
    reliability_table,
    stated_probabilities,
)
from annotation.trust.expert_cells import expert_cells
from annotation.trust.fuse import fuse
from data_contracts.concepts import Concept, Vocabulary


def stated(n: int, seed: int = 0, *, bias: float = 0.0, source: str = "vlm:m") -> pd.DataFrame:
    """Cells whose truth is drawn with the stated probability, less `bias`."""
    rng = np.random.default_rng(seed)
    probability = rng.random(n)
    return pd.DataFrame(
        {
            "source": source,
            "image_id": [f"i{i // 4}" for i in range(n)],
            "concept_id": "a",
            "probability": probability,
            "true": (rng.random(n) < np.clip(probability - bias, 0, 1)).astype(float),
            "weight": rng.uniform(0.5, 2, n),
        }
    )


def test_brier_score_is_scikit_learns() -> None:
    table = stated(300)
    p, y, w = (table[c].to_numpy() for c in ("probability", "true", "weight"))
    assert brier_score(p, y, w) == pytest.approx(brier_score_loss(y, p, sample_weight=w))


def test_the_reliability_curve_is_scikit_learns() -> None:
    table = stated(300).assign(weight=1.0)
    observed, confidence = calibration_curve(table["true"], table["probability"], n_bins=10)
    found = reliability_table(table)
    np.testing.assert_allclose(found["observed"], observed)
    np.testing.assert_allclose(found["confidence"], confidence)
    assert found["n"].sum() == 300
    assert ((found["low"] < found["observed"]) & (found["observed"] < found["high"] + 1e-9)).all()
    p, y = table["probability"].to_numpy(), table["true"].to_numpy()
    ece = (np.abs(observed - confidence) * found["n"]).sum() / 300
    assert expected_calibration_error(p, y, np.ones(300)) == pytest.approx(ece)


def test_weights_stand_for_repeated_cells() -> None:
    table = stated(60).assign(weight=np.tile([1.0, 3.0], 30))
    repeated = table.loc[table.index.repeat(table["weight"].astype(int))].assign(weight=1.0)
    one, other = calibration_table(table).iloc[0], calibration_table(repeated).iloc[0]
    assert (one["ece"], one["brier"]) == (pytest.approx(other["ece"]), pytest.approx(other["brier"]))


def test_intervals_hold_what_they_are_of() -> None:
    """Calibrated probabilities have an ECE of 0; with a bias of 0.2 it is 0.18, because shares are cut off at 0."""
    held = {0.0: 0, 0.2: 0}
    for bias, truth in ((0.0, 0.0), (0.2, 0.18)):
        for seed in range(40):
            row = calibration_table(stated(200, seed, bias=bias)).iloc[0]
            held[bias] += row["ece_low"] <= truth <= row["ece_high"]
            assert row["brier_low"] <= row["brier"] <= row["brier_high"]
    assert min(held.values()) >= 35


def test_no_answer_is_not_known_and_says_so() -> None:
    found = calibration_table(pd.DataFrame({"source": ["vlm:m", "fused"]}).reindex(columns=list(stated(1))))
    assert list(found) == CALIBRATION_COLUMNS
    assert found["source"].tolist() == ["vlm:m", "fused"]
    assert found["ece"].isna().all()
    assert found["note"].str.startswith("not known").all()
    assert reliability_table(stated(5).iloc[:0]).empty


def test_sources_are_held_against_cells_they_spoke_of_and_similarity_is_no_probability() -> None:
    ids, vocabulary = [f"i{i}" for i in range(60)], Vocabulary.of([Concept("a", "a"), Concept("b", "b")])
    truth = np.random.default_rng(0).random((60, 2)) < 0.5

    def said(answers: np.ndarray, witness: str, rows: int, probability: float = np.nan) -> pd.DataFrame:
        cells = {"image_id": np.repeat(ids[:rows], 2), "concept_id": np.tile(["a", "b"], rows)}
        state = np.where(answers[:rows].ravel(), "present", "absent")
        p = np.where(answers[:rows].ravel(), probability, 1 - probability)
        return pd.DataFrame(
            {**cells, "witness": witness, "witness_model": "m", "state": state, "probability": p, "evidence": None}
        )

    ledger = pd.concat([said(truth, "vlm", 60, 0.8), said(truth, "expert", 40)], ignore_index=True)
    scores = ledger.head(120)[["image_id", "concept_id"]].assign(similarity=0.1, probability=np.nan)
    scores.loc[scores["concept_id"] == "a", "probability"] = 0.3
    cells = expert_cells(ledger, None, vocabulary)
    labels = fuse(ledger[ledger["witness"] != "expert"], scores, vocabulary)
    found = calibration_table(stated_probabilities(cells, ledger, scores, labels, vocabulary))
    every = found[found["concept_id"] == "all"].set_index("source")
    assert every["n"].to_dict() == {"vlm:m": 80, "alignment": 40, "fused": 80}
    assert every.loc["vlm:m", "ece"] == pytest.approx(0.2)
    assert every.loc["vlm:m", "brier"] == pytest.approx(0.04)
