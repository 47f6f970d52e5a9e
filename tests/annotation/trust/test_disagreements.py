from __future__ import annotations

import numpy as np
import pandas as pd

from annotation.trust.disagreements import DISAGREEMENT_COLUMNS, disagreements, most_informative
from annotation.trust.fuse import fuse
from data_contracts.concepts import Concept, Vocabulary

IDS = [f"image-{i:03d}" for i in range(200)]
VOCABULARY = Vocabulary.of([Concept("a", "a"), Concept("b", "b")])
RNG = np.random.default_rng(0)
TRUTH = RNG.random((200, 2)) < 0.4
VLM = TRUTH ^ (RNG.random((200, 2)) < 0.2)
PROBABILITY = np.clip(TRUTH * 0.6 + 0.2 + RNG.normal(0, 0.15, (200, 2)), 0.01, 0.99)


def said(answers: np.ndarray, witness: str, model: str, ids: list[str]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image_id": np.repeat(ids, 2),
            "concept_id": np.tile(["a", "b"], len(ids)),
            "witness": witness,
            "witness_model": model,
            "state": np.where(answers.ravel(), "present", "absent"),
            "probability": np.where(answers.ravel(), 0.9, 0.1) if witness == "vlm" else np.nan,
        }
    )


def alignment() -> pd.DataFrame:
    cells = {"image_id": np.repeat(IDS, 2), "concept_id": np.tile(["a", "b"], 200)}
    return pd.DataFrame({**cells, "similarity": 0.0, "probability": PROBABILITY.ravel()})


LEDGER = pd.concat(
    [
        said(VLM, "vlm", "m", IDS),
        said(TRUTH[:10], "expert", "dr one", IDS[:10]),
        said(~TRUTH[:1], "expert", "dr two", IDS[:1]),
    ],
    ignore_index=True,
)


def found() -> pd.DataFrame:
    return disagreements(fuse(LEDGER, alignment(), VOCABULARY), LEDGER, alignment(), VOCABULARY)


def test_every_contradiction_is_listed_and_nothing_else_that_agrees() -> None:
    table = found()
    assert list(table)[: len(DISAGREEMENT_COLUMNS)] == DISAGREEMENT_COLUMNS
    listed = np.zeros((200, 2), bool)
    listed[[IDS.index(i) for i in table["image_id"]], [["a", "b"].index(c) for c in table["concept_id"]]] = True
    contradicted = (PROBABILITY > 0.5) != VLM
    contradicted[:10] |= VLM[:10] != TRUTH[:10]
    contradicted[:10] |= (PROBABILITY[:10] > 0.5) != TRUTH[:10]
    contradicted[0] = True
    assert (listed >= contradicted).all()
    agreed = ~contradicted & listed
    labels = fuse(LEDGER, alignment(), VOCABULARY)["disagreement"].to_numpy().reshape(200, 2)
    assert (labels[agreed] >= 0.5).all()


def test_experts_against_each_other_come_first_and_settled_cells_last() -> None:
    table = found()
    assert table["information"].is_monotonic_decreasing
    assert set(table["image_id"].head(2)) == {IDS[0]}
    assert table["information"].iloc[1] == 1.0
    settled = table["image_id"].isin(IDS[1:10])
    assert settled.any()
    assert (table.loc[settled, "information"] == 0).all()
    assert (table.loc[settled, "decided_by"] == "expert").all()


def test_what_each_witness_said_stands_beside_it() -> None:
    table = found()
    row = table[(table["image_id"] == IDS[0]) & (table["concept_id"] == "a")].iloc[0]
    words = {True: "present", False: "absent"}
    assert row["expert dr one"] == words[bool(TRUTH[0, 0])]
    assert row["expert dr two"] == words[not TRUTH[0, 0]]
    assert row["vlm m"] == ("present 0.90" if VLM[0, 0] else "absent 0.10")
    assert row["alignment"] == f"{words[bool(PROBABILITY[0, 0] > 0.5)]} {PROBABILITY[0, 0]:.2f}"
    assert table.loc[table["image_id"] == IDS[50], "expert dr one"].eq("").all()


def test_a_stream_keeps_the_most_informative_and_counts_all() -> None:
    table = found()
    parts = [table.iloc[::2].reset_index(drop=True), table.iloc[1::2].reset_index(drop=True)]
    kept, total = most_informative(parts, 7)
    assert total == len(table)
    np.testing.assert_array_equal(kept["information"], table["information"].head(7))
    assert most_informative([table], 10**6)[0].equals(table)


def test_a_silent_run_has_none() -> None:
    nothing = LEDGER.iloc[:0]
    table = disagreements(fuse(nothing, None, VOCABULARY), nothing, None, VOCABULARY)
    assert list(table) == DISAGREEMENT_COLUMNS
    assert most_informative([table], 5)[1] == 0
