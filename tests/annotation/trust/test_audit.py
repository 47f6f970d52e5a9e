from __future__ import annotations

from datetime import UTC, datetime
from functools import cache

import numpy as np
import pandas as pd
import pytest

from annotation.trust.agreement import Source, agreement
from annotation.trust.audit import (
    AuditOptions,
    advice,
    answered_cells,
    answers_of,
    read_audit,
    samples_of,
    score,
    without_experts,
)
from annotation.trust.draw import DrawOptions, draw
from annotation.trust.fuse import fuse
from annotation.trust.intervals import audited
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


@cache
def machine_labels() -> pd.DataFrame:
    return fuse(ledger(), None, VOCABULARY)


def drawn(n_cells: int = 200, seed: int = 0) -> pd.DataFrame:
    return draw(lambda: [machine_labels()], IMAGES, VOCABULARY, DrawOptions(n_cells=n_cells, seed=seed))


def scored(audit: pd.DataFrame, judgements: pd.DataFrame) -> pd.DataFrame:
    return score(audit, judgements, None, fuse(without_experts(judgements), None, VOCABULARY), VOCABULARY)


def filled(cells: pd.DataFrame) -> pd.DataFrame:
    true = pd.Series(TRUTH.ravel(), pd.MultiIndex.from_product([IDS, VOCABULARY.ids]))
    keys = pd.MultiIndex.from_frame(cells[["image_id", "concept_id"]])
    return cells.assign(answer=np.where(true.loc[keys].to_numpy(), "1", "0"))


def sensitivity_of_m(audit: pd.DataFrame) -> float:
    """Of the VLM `m` about `good`, without fusing anew for every audit."""
    cells = answered_cells(audit, VOCABULARY)
    said = ledger().query("witness_model == 'm'")["state"].eq("present").to_numpy(float).reshape(N, 2)
    return audited(samples_of(cells, Source(said, said), np.asarray(IDS, object), VOCABULARY))[0].sensitivity.value


def test_two_rounds_together_are_unbiased() -> None:
    said = ledger().query("witness_model == 'm' and concept_id == 'good'")["state"].eq("present").to_numpy()[:700]
    found = []
    for seed in range(16):
        first = drawn(120, seed)
        more = draw(
            lambda: [machine_labels()],
            IMAGES,
            VOCABULARY,
            DrawOptions(n_cells=120, seed=seed),
            asked=first,
            need={"good": 1, "bad": 0.3},
        )
        found.append(sensitivity_of_m(filled(pd.concat([first, more], ignore_index=True))))
    assert np.mean(found) == pytest.approx(said[TRUTH[:700, 0]].mean(), abs=0.025)


def test_where_everything_was_asked_the_interval_is_the_number_itself() -> None:
    table = scored(filled(drawn(10_000)), ledger()).set_index(["witness", "concept_id"])
    row = table.loc[("vlm:m", "good")]
    said = ledger().query("witness_model == 'm' and concept_id == 'good'")["state"].eq("present").to_numpy()[:700]
    assert row["kappa"] == pytest.approx(agreement(said * 1.0, TRUTH[:700, 0] * 1.0).kappa.value)
    assert row["kappa_high"] - row["kappa_low"] < 0.02


def test_unanswered_cells_are_stood_for_by_their_stratum() -> None:
    cells = filled(drawn(400))
    some = cells.assign(answer=np.where(np.arange(400) % 2 == 0, cells["answer"], ""))
    whole, half = (scored(c, ledger()).set_index(["witness", "concept_id"]) for c in (cells, some))
    assert half.loc[("vlm:m", "good"), "n"] < whole.loc[("vlm:m", "good"), "n"]
    assert half.loc[("vlm:m", "good"), "prevalence"] == pytest.approx(
        whole.loc[("vlm:m", "good"), "prevalence"], abs=0.08
    )


def test_disputed_cells_and_corrections_that_were_not_blind_are_no_answers() -> None:
    design = drawn(3)
    said = filled(design)
    first = read_audit(said, IMAGES, VOCABULARY, reviewer="a", created_at=NOW)
    other = said.assign(answer=["1" if said["answer"].iloc[0] == "0" else "0", "", ""])
    second = read_audit(other, IMAGES, VOCABULARY, reviewer="b", created_at=NOW)
    seen = first.iloc[[2]].assign(witness_model="c", evidence=None, state="uncertain")
    found = answers_of(pd.concat([first, second, seen], ignore_index=True), design)
    assert found["answer"].iloc[0] == ""
    assert found["answer"].tolist()[1:] == first["state"].tolist()[1:]


def test_advice_says_why_and_how_many_more() -> None:
    truth = np.r_[np.ones(20), np.zeros(20)]
    one_error = truth.copy()
    one_error[:1] = 0
    kept = advice(agreement(one_error, truth), AuditOptions())
    assert kept["recommendation"] == "keep"
    assert "surely at least 0.40" in str(kept["reason"])
    some_errors = truth.copy()
    some_errors[[0, 1, 2, 3, 4, 20, 21, 22, 23]] = 1 - some_errors[[0, 1, 2, 3, 4, 20, 21, 22, 23]]
    asked = advice(agreement(some_errors, truth), AuditOptions())
    assert (asked["recommendation"], asked["n_more_cells"] > 0) == ("ask_again", True)
    ranking = np.r_[np.linspace(0.3, 0.5, 20), np.linspace(0, 0.2, 20)]
    low = advice(agreement(np.zeros(40), truth, ranking), AuditOptions())
    assert low["recommendation"] == "rethreshold"
    assert "ranks well" in str(low["reason"])
    nothing = advice(agreement(np.ones(9), np.ones(9)), AuditOptions())
    assert nothing["recommendation"] == "ask_again"
    assert nothing["n_more_cells"] >= 5


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
    cells = cells.drop(columns=["path", "concept", "definition"])
    cells = pd.concat([cells, cells.iloc[[3]].assign(answer="0")], ignore_index=True).drop(index=4)
    with pytest.raises(ContractViolation) as caught:
        read_audit(cells, IMAGES, VOCABULARY, reviewer="dr", created_at=NOW)
    text = "; ".join(caught.value.faults)
    assert len(caught.value.faults) == 5
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
    table = scored(filled(drawn(300)), ledger()).set_index(["witness", "concept_id"])
    good, bad = table.loc[("fused", "good")], table.loc[("fused", "bad")]
    assert (good["recommendation"], bad["recommendation"]) == ("keep", "drop")
    assert good["kappa_low"] > 0.6
    assert bad["kappa_high"] < 0.4
    assert table.loc[("vlm:m", "good"), "sensitivity"] > 0.8


def test_experts_own_answers_do_not_flatter_the_fused_labels() -> None:
    cells = filled(drawn(300))
    expert = read_audit(cells, IMAGES, VOCABULARY, reviewer="dr", created_at=NOW)
    with_expert = scored(cells, pd.concat([ledger(), expert]))
    pd.testing.assert_frame_equal(with_expert, scored(cells, ledger()))


def test_weighted_scores_are_unbiased_for_the_population() -> None:
    sensitivity = [sensitivity_of_m(filled(drawn(250, seed))) for seed in range(12)]
    said = ledger().query("witness_model == 'm' and concept_id == 'good'")["state"].eq("present").to_numpy()[:700]
    assert np.mean(sensitivity) == pytest.approx(said[TRUTH[:700, 0]].mean(), abs=0.02)


def test_too_few_answers_ask_for_a_stated_number_more() -> None:
    table = scored(filled(drawn(24)), ledger()).set_index(["witness", "concept_id"])
    open_ones = table.loc["fused"].query("recommendation == 'ask_again'")
    assert (open_ones["n_more_cells"].dropna() >= 1).all()
    assert len(open_ones) >= 1
