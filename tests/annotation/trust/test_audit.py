from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from annotation.trust.audit import COLUMNS, AuditOptions, draw, read_audit, score
from annotation.trust.fuse import fuse
from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import ContractViolation
from data_contracts.tables import JUDGEMENTS

N = 900
IDS = [f"image-{i:04d}" for i in range(N)]
VOCABULARY = Vocabulary.of([Concept("good", "good", "Seen well."), Concept("bad", "bad", "Seen badly.")])
TRUTH = np.random.default_rng(0).random((N, 2)) < (0.2, 0.5)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
IMAGES = pd.DataFrame(
    {
        "image_id": IDS,
        "path": [f"{i}.png" for i in IDS],
        "label": np.where(np.arange(N) % 3 == 0, "x", "y"),
        "split": np.where(np.arange(N) < 700, "train", "test"),
        "rejected": [None] * (N - 1) + ["truncated"],
    }
)


def ledger(seed: int = 1) -> pd.DataFrame:
    """Two VLMs: right about `good` (5 % errors), guessing about `bad`."""
    rng = np.random.default_rng(seed)
    parts = []
    for model in ("m", "n"):
        said = TRUTH ^ (rng.random((N, 2)) < (0.05, 0.5))
        parts.append(
            pd.DataFrame(
                {
                    "image_id": np.repeat(IDS, 2),
                    "concept_id": np.tile(["good", "bad"], N),
                    "witness": "vlm",
                    "witness_model": model,
                    "state": np.where(said.ravel(), "present", "absent"),
                    "probability": np.nan,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def drawn(n_cells: int = 200, seed: int = 0) -> pd.DataFrame:
    labels = fuse(ledger(), None, VOCABULARY)
    return draw(labels, IMAGES, VOCABULARY, AuditOptions(n_cells=n_cells, seed=seed))


def filled(cells: pd.DataFrame) -> pd.DataFrame:
    true = pd.Series(TRUTH.ravel(), pd.MultiIndex.from_product([IDS, VOCABULARY.ids]))
    keys = pd.MultiIndex.from_frame(cells[["image_id", "concept_id"]])
    return cells.assign(answer=np.where(true.loc[keys].to_numpy(), "1", "0"))


def test_the_draw_has_the_asked_size_once_each_and_no_test_or_rejected_image() -> None:
    cells = drawn()
    assert list(cells.columns) == COLUMNS
    assert len(cells) == 200
    assert not cells.duplicated(["image_id", "concept_id"]).any()
    assert set(cells["image_id"]) <= set(IDS[:700])
    assert set(cells["answer"]) == {""}
    assert set(cells["definition"]) == {"Seen well.", "Seen badly."}


def test_the_draw_is_seeded() -> None:
    pd.testing.assert_frame_equal(drawn(), drawn())
    assert not drawn(seed=1)["image_id"].equals(drawn()["image_id"])


def test_inclusion_probabilities_stand_for_the_whole_population() -> None:
    weight = 1 / drawn()["inclusion_probability"]
    assert weight.sum() == pytest.approx(700 * 2, rel=1e-6)


def test_both_classes_and_every_stratum_are_asked() -> None:
    cells = drawn().merge(IMAGES[["image_id", "label"]], on="image_id")
    assert cells.groupby("stratum")["label"].nunique().min() == 2
    assert cells["concept_id"].value_counts().min() > 50


def test_asking_for_more_than_there_is_gives_everything() -> None:
    cells = drawn(10_000)
    assert len(cells) == 1400
    assert set(cells["inclusion_probability"]) == {1.0}


def test_cells_a_person_decided_are_not_asked_again() -> None:
    expert = ledger().head(1400).assign(witness="expert", witness_model="dr")
    labels = fuse(pd.concat([ledger(), expert]), None, VOCABULARY)
    assert draw(labels, IMAGES, VOCABULARY, AuditOptions()).empty


def test_answers_come_back_as_expert_judgements() -> None:
    cells = drawn(6).assign(answer=["1", "absent", " Yes ", "?", "", "0.0"])
    found = read_audit(cells, IMAGES, VOCABULARY, reviewer="dr", created_at=NOW)
    JUDGEMENTS.to_arrow(found, "judgements")
    assert found["state"].tolist() == ["present", "absent", "present", "uncertain", "absent"]
    assert set(found["witness"]) == {"expert"}
    assert set(found["witness_model"]) == {"dr"}


def test_every_fault_is_told_with_its_row_and_nothing_is_imported() -> None:
    cells = drawn(5)
    cells["answer"] = ["maybe", "1", "1", "1", "0"]
    cells.loc[1, "image_id"] = "nobody"
    cells.loc[2, "concept_id"] = "renamed"
    cells.loc[4, ["image_id", "concept_id"]] = cells.loc[3, ["image_id", "concept_id"]].to_numpy()
    with pytest.raises(ContractViolation) as caught:
        read_audit(cells, IMAGES, VOCABULARY, reviewer="dr", created_at=NOW)
    text = "; ".join(caught.value.faults)
    assert len(caught.value.faults) == 4
    for part in (
        "row 2, column 'answer'",
        "'maybe'",
        "row 3, column 'image_id'",
        "row 4, column 'concept_id'",
        "twice",
    ):
        assert part in text


def test_a_file_that_is_no_audit_is_refused() -> None:
    with pytest.raises(ContractViolation, match="'answer' is missing"):
        read_audit(IMAGES, IMAGES, VOCABULARY, reviewer="dr", created_at=NOW)


def test_scores_tell_the_good_concept_from_the_bad() -> None:
    table = score(filled(drawn(300)), ledger(), None, VOCABULARY).set_index(["witness", "concept_id"])
    good, bad = table.loc[("fused", "good")], table.loc[("fused", "bad")]
    assert (good["recommendation"], bad["recommendation"]) == ("keep", "drop")
    assert good["kappa_low"] > 0.6
    assert bad["kappa_high"] < 0.4
    assert table.loc[("vlm:m", "good"), "sensitivity"] > 0.8


def test_experts_own_answers_do_not_flatter_the_fused_labels() -> None:
    cells = filled(drawn(300))
    expert = read_audit(cells, IMAGES, VOCABULARY, reviewer="dr", created_at=NOW)
    with_expert = score(cells, pd.concat([ledger(), expert]), None, VOCABULARY)
    pd.testing.assert_frame_equal(with_expert, score(cells, ledger(), None, VOCABULARY))


def test_weighted_scores_are_unbiased_for_the_population() -> None:
    found = [score(filled(drawn(250, seed)), ledger(), None, VOCABULARY) for seed in range(12)]
    sensitivity = [t.set_index(["witness", "concept_id"]).loc[("vlm:m", "good"), "sensitivity"] for t in found]
    said = ledger().query("witness_model == 'm' and concept_id == 'good'")["state"].eq("present").to_numpy()[:700]
    assert np.mean(sensitivity) == pytest.approx(said[TRUTH[:700, 0]].mean(), abs=0.02)


def test_too_few_answers_ask_for_a_stated_number_more() -> None:
    table = score(filled(drawn(24)), ledger(), None, VOCABULARY).set_index(["witness", "concept_id"])
    open_ones = table.loc["fused"].query("recommendation == 'ask_again'")
    assert (open_ones["n_more_cells"].dropna() >= 1).all()
    assert len(open_ones) >= 1
