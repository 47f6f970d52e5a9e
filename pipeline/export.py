"""Tables for people: the wide label sheet."""

from __future__ import annotations

import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.tables import State

CELLS = {State.PRESENT: "1", State.ABSENT: "0", State.UNCERTAIN: "uncertain", State.NOT_ASSESSED: ""}
"""How a state is written in a cell. Four states, four spellings: none collapses into another."""

DESCRIBING = ("image_id", "path", "label", "split")
"""Columns of the wide sheet that say which image a row is."""


def states_of(labels: pd.DataFrame) -> pd.DataFrame:
    """(image_id, concept_id, state) of a `labels` table; a label that abstains is `uncertain`."""
    present = labels["present"].astype("boolean")
    state = present.map({True: State.PRESENT.value, False: State.ABSENT.value}).astype("str")
    return labels[["image_id", "concept_id"]].assign(state=state.where(present.notna(), State.UNCERTAIN.value))


def wide_labels(images: pd.DataFrame, labels: pd.DataFrame, vocabulary: Vocabulary) -> pd.DataFrame:
    """One row an accepted image, one text column a concept (see `CELLS`); empty means nobody labelled it."""
    return wide_states(images, states_of(labels), vocabulary)


def wide_states(images: pd.DataFrame, states: pd.DataFrame, vocabulary: Vocabulary) -> pd.DataFrame:
    """As `wide_labels`, from a table of (image_id, concept_id, state)."""
    rows = images.loc[images["rejected"].isna(), list(DESCRIBING)].reset_index(drop=True)
    cells = states.assign(cell=states["state"].map(CELLS)).pivot(index="image_id", columns="concept_id", values="cell")
    cells = cells.reindex(index=rows["image_id"], columns=list(vocabulary.ids))
    cells = cells.astype(object).where(cells.notna(), "").astype("str")
    described = rows.astype("str").fillna("")
    return pd.concat([described, cells.reset_index(drop=True)], axis=1)
