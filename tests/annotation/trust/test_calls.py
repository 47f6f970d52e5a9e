"""Calls of the fused label: expert answers decide where they may begin, and how right they turned out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from annotation.trust.calls import HeldOut, fit_calls, held_out_labels
from annotation.trust.expert_cells import expert_cells
from annotation.trust.fuse import FuseOptions, fuse, learn_fusion
from data_contracts.concepts import Concept, Vocabulary

N = 500
IDS = [f"i{i:04d}" for i in range(N)]
NAMES = ["a", "b", "c", "d"]
VOCABULARY = Vocabulary.of([Concept(name, name) for name in NAMES])
RNG = np.random.default_rng(3)
TRUTH = RNG.random((N, 4)) < 0.4
MISTAKEN = RNG.random((N, 4)) < 0.15
"""Cells that every witness takes for present or nearly so, and that are not."""
SEEN = TRUTH | MISTAKEN
SCORE = np.where(TRUTH, 2.2, MISTAKEN * 1.3) + RNG.normal(0, 0.6, (N, 4))
VLM = np.where(SEEN, RNG.random((N, 4)) < 0.95, RNG.random((N, 4)) < 0.1)


def said(answers: np.ndarray, witness: str, ids: list[str]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image_id": np.repeat(ids, 4),
            "concept_id": np.tile(NAMES, len(ids)),
            "witness": witness,
            "witness_model": "m",
            "state": np.where(answers.ravel(), "present", "absent"),
            "probability": np.nan,
            "evidence": None,
        }
    )


def scores() -> pd.DataFrame:
    cells = {"image_id": np.repeat(IDS, 4), "concept_id": np.tile(NAMES, N)}
    return pd.DataFrame({**cells, "similarity": SCORE.ravel(), "probability": np.nan})


MACHINE = said(VLM, "vlm", IDS)
AUDITED = pd.concat([MACHINE, said(TRUTH[:60], "expert", IDS[:60])], ignore_index=True)
ASKED = FuseOptions(min_precision=0.9, min_npv=0.9)


def precision(labels: pd.DataFrame) -> float:
    """Of calls of presence, on images that no expert saw."""
    rows = labels[~labels["image_id"].isin(IDS[:60])]
    called = rows["present"].fillna(False).to_numpy(bool)
    return float(TRUTH[60:].ravel()[called].mean())


def fitted(ledger: pd.DataFrame, options: FuseOptions) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(table of calls, labels made with them)."""
    learned = learn_fusion(ledger, scores(), VOCABULARY, options)
    cells = expert_cells(ledger, None, VOCABULARY)
    calls = fit_calls(learned, cells, held_out_labels(HeldOut(ledger, scores()), VOCABULARY, options, cells))
    return calls.table, replace(learned, calls=calls).labels(ledger, scores())


def test_without_experts_calls_are_those_of_the_fusion_and_nothing_is_known() -> None:
    table, labels = fitted(MACHINE, ASKED)
    pd.testing.assert_frame_equal(labels, fuse(MACHINE, scores(), VOCABULARY, ASKED))
    assert set(table["method"]) == {"expected"}
    assert table[["precision", "npv"]].isna().all(axis=None)
    assert table["expected_precision"].min() >= 0.9


def test_without_a_wish_the_band_stays_as_chosen_but_its_quality_is_told() -> None:
    table, labels = fitted(AUDITED, FuseOptions())
    pd.testing.assert_frame_equal(labels, fuse(AUDITED, scores(), VOCABULARY))
    assert set(table["method"]) == {"chosen"}
    assert set(table["abstain_high"]) == {0.65}
    assert table["precision"].notna().all()


def test_experts_make_calls_as_right_as_was_asked_where_machines_agree_wrongly() -> None:
    _, misled = fitted(MACHINE, ASKED)
    table, labels = fitted(AUDITED, ASKED)
    assert precision(misled) < 0.82
    assert precision(labels) > precision(misled) + 0.04
    assert set(table["method"]) == {"audited"}
    assert (table["precision"].dropna() <= 1).all()


def test_held_out_labels_do_not_know_the_answers_they_are_held_against() -> None:
    def probabilities(answers: np.ndarray) -> pd.Series:
        ledger = pd.concat([MACHINE, said(answers, "expert", IDS[:60])], ignore_index=True)
        cells = expert_cells(ledger, None, VOCABULARY)
        own = cells.loc[cells["fold"] == cells["fold"].iloc[0], "image_id"].unique()
        labels = held_out_labels(HeldOut(ledger, scores()), VOCABULARY, FuseOptions(), cells)
        assert not labels["decided_by"].eq("expert").any()
        return labels[labels["image_id"].isin(own)].reset_index(drop=True)["probability"]

    cells = expert_cells(AUDITED, None, VOCABULARY)
    own = cells["image_id"][cells["fold"] == cells["fold"].iloc[0]].unique()
    other = TRUTH[:60].copy()
    other[[IDS.index(i) for i in own]] ^= True
    pd.testing.assert_series_equal(probabilities(TRUTH[:60]), probabilities(other))


def test_what_a_person_settled_is_called_whatever_the_cuts_say() -> None:
    _, labels = fitted(AUDITED, FuseOptions(min_precision=0.999, min_npv=0.999))
    settled = labels[labels["decided_by"] == "expert"]
    assert settled["present"].notna().all()
    assert (settled["present"].to_numpy(bool) == TRUTH[:60].ravel()).all()


def test_a_concept_that_is_nowhere_is_called_absent_and_one_without_evidence_is_not_called() -> None:
    nowhere = MACHINE[~MACHINE["concept_id"].isin(["c", "d"])]
    absent = MACHINE[MACHINE["concept_id"] == "c"].assign(state="absent")
    truth = TRUTH[:60] * (1, 1, 0, 0)
    expert = said(truth, "expert", IDS[:60])
    ledger = pd.concat([nowhere, absent, expert[expert["concept_id"] != "d"]], ignore_index=True)
    learned = learn_fusion(ledger, None, VOCABULARY, ASKED)
    cells = expert_cells(ledger, None, VOCABULARY)
    calls = fit_calls(learned, cells, held_out_labels(HeldOut(ledger, None), VOCABULARY, ASKED, cells))
    labels = replace(learned, calls=calls).labels(ledger, None)
    assert calls.table["concept_id"].tolist() == NAMES
    assert calls.table.set_index("concept_id").loc["d", "n"] == 0
    assert (~labels.loc[labels["concept_id"] == "c", "present"].fillna(True)).all()
    assert labels.loc[labels["concept_id"] == "d", "present"].isna().all()


def test_nothing_answered_is_an_empty_table_of_labels() -> None:
    cells = expert_cells(MACHINE, None, VOCABULARY)
    assert held_out_labels(HeldOut(MACHINE, scores()), VOCABULARY, ASKED, cells).empty
    assert cells.empty
