"""The inputs of a trained classifier on images of a run, with a progress bar, for every step that measures one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_contracts.dataset import AlignedDataset
from flows.chain import Context
from flows.steps.images import image_reader

if TYPE_CHECKING:
    from model.predict import Classifier
    from model.prepare import Prepared


def prepared_for(context: Context, classifier: Classifier, dataset: AlignedDataset, doing: str) -> Prepared:
    """The readable images of `dataset` with what the classifier's network reads; `doing` stands beside the bar."""
    from model.prepare import prepare

    with context.console.bar(doing, len(dataset)) as advance:
        return prepare(
            dataset,
            image_reader(context),
            classifier.backbone,
            frozen=classifier.config.freeze_backbone,
            cache_dir=context.run.cache_dir,
            device=classifier.device,
            advance=advance,
        )
