"""The tables of the fuse step that say how far labels can be trusted: agreement, leaks, calibration, reliability."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.spreadsheet import write_csv
from flows.chain import Context
from flows.steps.learned_labels import LearnedLabels, Said, outside_test

AGREEMENT_CSV = "agreement.csv"
LEAKS_CSV = "leaks.csv"
CALIBRATION_CSV = "calibration.csv"
RELIABILITY_CSV = "reliability.csv"
FEW_IMAGES = 400
"""Below so many images a label model has hardly anything to tell a poor judge by."""


def write_trust_tables(
    context: Context, images: pd.DataFrame, vocabulary: Vocabulary, sample: Said, learned: LearnedLabels
) -> tuple[list[Path], list[str]]:
    """Write how witnesses agree, how well the class alone predicts each concept, and how far probabilities hold.

    Returns files and warnings.
    """
    from annotation.trust.agreement import witness_agreement
    from annotation.trust.calibration import calibration_table, reliability_table, stated_probabilities

    run = context.run
    labels = learned.fusion.labels(*learned.heard)
    stated = stated_probabilities(learned.cells, *sample, learned.held_out, vocabulary)
    tables = {
        AGREEMENT_CSV: witness_agreement(*sample, labels, vocabulary),
        CALIBRATION_CSV: calibration_table(stated),
        RELIABILITY_CSV: reliability_table(stated),
    }
    leaks, told = _leaks(labels, images)
    if leaks is not None:
        tables[LEAKS_CSV] = leaks
    for name, table in tables.items():
        write_csv(run.path / name, table)
    return [run.path / name for name in tables], told


def suggestion(n_images: int, prevalence: pd.Series, cells: pd.DataFrame) -> list[str]:
    """A sentence where nothing but an expert could tell a poor judge from a good one, with how many cells would."""
    from annotation.trust.audit_size import cells_to_settle

    n_open = int(prevalence.notna().sum()) * n_images
    n_cells = min(cells_to_settle(prevalence.to_numpy(float)), n_open) - len(cells)
    if n_cells <= 0 or (len(cells) and n_images >= FEW_IMAGES):
        return []
    known, more = "no expert has answered a cell", ""
    if len(cells):
        known, more = f"experts have answered {len(cells)} cells only", "--more "
    few = f", and {n_images} images are few" if n_images < FEW_IMAGES else ""
    return [
        f"{known}{few}: machines' answers alone do not tell a poor judge from a good one; "
        f"`medmicn audit draw {more}--cells {n_cells}` asks for enough to tell, concept by concept"
    ]


def _leaks(labels: pd.DataFrame, images: pd.DataFrame) -> tuple[pd.DataFrame | None, list[str]]:
    from annotation.trust.leaks import class_leak

    if outside_test(images)["label"].nunique() < 2:
        return None, []
    leaks = class_leak(labels, images)
    flagged = leaks[
        leaks["class_constant"].astype(bool) | (leaks["flagged"].astype(bool) & ~leaks["constant"].astype(bool))
    ]
    return leaks, [
        f"concept {row.concept_id!r}: the class alone predicts it (AUROC {row.auroc:.2f}); it may be the diagnosis "
        "in other words"
        for row in flagged.itertuples()
    ]
