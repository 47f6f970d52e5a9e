"""What the review page needs from other rooms: predictions, interventions, and what a change of concepts costs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from data_contracts.ports import PixelReader
from data_contracts.tables import ConceptOrigin, vocabulary_of
from flows.chain import Context
from flows.devices import resolve_device
from flows.ledger import asked_concepts
from pipeline.review.ports import Cost, Ports, Predicted

if TYPE_CHECKING:
    from model.predict import Classifier, Prediction

CONFIG_OF_A_MODEL = "config.json"
"""Without this file a model folder holds no checkpoint."""


def review_ports(context: Context, read: PixelReader) -> Ports:
    """Everything the page can offer of this run; predictions only where a model was trained."""
    model = _Model(context, read)
    is_trained = (context.run.model_dir / CONFIG_OF_A_MODEL).is_file()
    return Ports(
        predict=model.predict if is_trained else None,
        intervene=model.intervene if is_trained else None,
        cost=lambda concepts: cost_of(context, concepts),
    )


def cost_of(context: Context, concepts: pd.DataFrame) -> Cost:
    """What judging every image would take if `concepts` were the run's concepts table. Nothing is sent."""
    from flows.pricing import price_words, priced
    from flows.steps.judge import open_works

    asked = asked_concepts(concepts)
    vocabulary = vocabulary_of(asked[asked["origin"] != ConceptOrigin.GIVEN])
    works = list(open_works(context, vocabulary))
    taken = [priced(context, work) for work in works]
    reasons: dict[str, int] = {}
    for work in taken:
        for why, n_cells in work.reasons.items():
            reasons[why] = reasons.get(why, 0) + n_cells
    return Cost(
        n_questions=sum(work.n_cells for work in works),
        n_requests=sum(work.estimate.requests for work in taken),
        price="; ".join(f"{price_words(work.estimate, work.price)} for {work.endpoint.model}" for work in taken),
        reasons=reasons,
    )


class _Model:
    """The run's classifier, read when it is first asked: a page must not wait for torch."""

    def __init__(self, context: Context, read: PixelReader) -> None:
        self._context = context
        self._read = read

    @cached_property
    def _classifier(self) -> Classifier:
        from model.checkpoint import load

        return load(self._context.run.model_dir, device=resolve_device(self._context.settings.train.device))

    def predict(self, image_id: str) -> Predicted:
        """What it says of one image, with the class's map."""
        return _plain(self._classifier.predict([self._read(image_id)], maps=True, n_concept_maps=0)[0])

    def intervene(self, image_id: str, concepts: Mapping[str, bool]) -> tuple[Predicted, Predicted]:
        """What it says before and after concepts are set."""
        from model.explain.intervene import intervene

        known = {c: present for c, present in concepts.items() if c in self._classifier.vocabulary}
        found = intervene(self._classifier, self._read(image_id), known)
        return _plain(found.before), _plain(found.after)


def _plain(prediction: Prediction) -> Predicted:
    class_map = prediction.class_map
    return Predicted(
        class_name=prediction.class_name,
        class_probabilities=prediction.class_probabilities,
        concept_probabilities=prediction.concept_probabilities,
        rule=prediction.rule.text if prediction.rule else None,
        rule_holds=prediction.rule.holds if prediction.rule else None,
        warning=prediction.rejected,
        class_map=None if class_map is None else np.asarray(class_map, np.float32),
    )
