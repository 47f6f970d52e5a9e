"""The cells that experts answered, as the yardstick of cuts and probabilities: truth, weight and fold."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from annotation.alignment.adapt import fold_of
from annotation.trust.audit import answered_cells, answers_of
from annotation.votes import latest
from data_contracts.concepts import Vocabulary
from data_contracts.tables import State, Witness

CELL_COLUMNS = ["image_id", "concept_id", "true", "weight", "drawn", "fold"]
N_FOLDS = 5


def expert_cells(
    judgements: pd.DataFrame,
    design: pd.DataFrame | None,
    vocabulary: Vocabulary,
    *,
    groups: Mapping[str, str] | None = None,
    n_folds: int = N_FOLDS,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per cell that experts decided and agree on: `CELL_COLUMNS`.

    `true` is 1 or 0. Where cells of a concept were drawn for an audit and answered, only these count, each weighted
    by the cells it stands for: what experts corrected by themselves is where the machine was wrong, and tells nothing
    of the rest. Elsewhere all of an expert's answers count, alike. Weights of a concept sum to the number of cells
    that would tell as much, had they been drawn evenly (Kish). `fold` is the part of the cross-fit; images of one
    group are in one.

    Args:
        judgements: The ledger without the test split, which is no yardstick for what is then applied to it.
        design: How the audit's cells were drawn (`DESIGN_COLUMNS`), or None.
        vocabulary: The concepts that count.
        groups: Image id → patient.
        n_folds: Parts.
        seed: Decides which group falls into which part.
    """
    free = _undrawn(judgements, vocabulary)
    cells = free if design is None else pd.concat([_drawn(judgements, design, vocabulary), free], ignore_index=True)
    of_design = cells.groupby("concept_id")["drawn"].transform("any")
    cells = cells[cells["drawn"] | ~of_design.astype(bool)].drop_duplicates(["image_id", "concept_id"])
    total = cells.groupby("concept_id")["weight"].transform("sum")
    squares = (cells["weight"] ** 2).groupby(cells["concept_id"]).transform("sum")
    names = groups or {}
    folds = fold_of((names.get(i, i) for i in cells["image_id"]), n_folds, seed)
    return cells.assign(weight=cells["weight"] * total / squares, fold=folds)[CELL_COLUMNS].reset_index(drop=True)


def _drawn(judgements: pd.DataFrame, design: pd.DataFrame, vocabulary: Vocabulary) -> pd.DataFrame:
    # Cells that left the run, or lie on the test split, were drawn but are no longer there to be answered for.
    here = answers_of(judgements, design)
    cells = answered_cells(here, vocabulary)
    return cells[["image_id", "concept_id", "true", "weight"]].assign(drawn=True)


def _undrawn(judgements: pd.DataFrame, vocabulary: Vocabulary) -> pd.DataFrame:
    standing = latest(judgements[judgements["witness"] == Witness.EXPERT])
    decided = standing[standing["state"].isin([State.PRESENT, State.ABSENT])]
    decided = decided[decided["concept_id"].isin(vocabulary.ids)]
    answers = decided.assign(true=(decided["state"] == State.PRESENT).astype(np.float64))
    cells = answers.groupby(["image_id", "concept_id"], as_index=False, sort=False)["true"].agg(["min", "max"])
    agreed = cells[cells["min"] == cells["max"]].rename(columns={"min": "true"})
    return agreed[["image_id", "concept_id", "true"]].assign(weight=1.0, drawn=False)
