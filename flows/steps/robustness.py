"""The paper's sensitivity analysis and common corruptions, over so many held-out images as the settings allow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_contracts.dataset import AlignedDataset
from data_contracts.spreadsheet import write_csv
from flows.chain import Context, StepResult
from flows.steps.images import image_reader
from flows.steps.maps import chosen_images

if TYPE_CHECKING:
    from model.predict import Classifier

ROBUSTNESS_FILE = "robustness.csv"


def write_robustness(context: Context, classifier: Classifier, dataset: AlignedDataset) -> StepResult:
    """`robustness.csv`, one row a perturbation and strength; nothing where `explain.robustness_images` is 0."""
    path = context.run.explanations_dir / ROBUSTNESS_FILE
    n_images = context.settings.explain.robustness_images
    path.unlink(missing_ok=True)
    if not n_images:
        return StepResult()
    from model.robustness import all_perturbations, robustness

    wanted = set(chosen_images(context, n_images=n_images))
    rows = np.flatnonzero(dataset.frame["image_id"].isin(wanted).to_numpy()).astype(np.int64)
    n_passes = len(rows) * (1 + len(all_perturbations()))
    with context.console.bar("changing pixels", n_passes) as advance:
        table = robustness(classifier, dataset, image_reader(context), rows, advance=advance)
    write_csv(path, table.round(5))
    return StepResult([path], {"perturbations": len(table)})
