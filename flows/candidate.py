"""The model that is being trained, beside the one in use: where it goes, and what it may learn from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

from data_contracts.store import RunFolder
from flows.approval import left_out
from flows.chain import Context, Step
from flows.steps import DATASET


class CandidateFolder(RunFolder):
    """The same run, for training: the model goes beside the one in use; images that a person refused are not seen."""

    @property
    def model_dir(self) -> Path:
        """Folder of the model that is being trained."""
        return self.models_dir / "candidate"

    def read_images(self) -> pd.DataFrame:
        """The images that may be trained on."""
        images = super().read_images()
        return images[~images["image_id"].isin(left_out(self))].reset_index(drop=True)


def candidate_context(context: Context) -> Context:
    """The same context for assembling a data set and training."""
    return replace(context, run=CandidateFolder(context.run.path))


def dataset_step(run: RunFolder) -> Step:
    """The data set's step, which knows of images that a person refused."""
    refused = left_out(run)
    if not refused:
        return DATASET
    return replace(DATASET, inputs=lambda context: {**DATASET.inputs(context), "left_out": sorted(refused)})


def unfinished(run: RunFolder) -> Path | None:
    """Folder of a model that was trained and not compared yet, if there is one."""
    folder = CandidateFolder(run.path).model_dir
    return folder if (folder / "config.json").is_file() else None
