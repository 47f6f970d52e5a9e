"""A classifier in use: pixels in; class, concepts, rule and maps out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from data_contracts.concepts import Vocabulary
from data_contracts.errors import InputRefused
from data_contracts.ports import Pixels
from model.backbones import Backbone
from model.calibration import Calibration
from model.config import TrainConfig
from model.devices import resolve_device
from model.explain.rules import image_rule_holds, image_terms, literals_of, rule_text
from model.fit import TrainedRun
from model.loop import Fitted
from model.network import Head, ImageNetwork
from model.outputs import Outputs, as_arrays
from model.reject import Reject

Map = npt.NDArray[np.float32]
"""(H, W) of the image it belongs to, 0 to 1."""


@dataclass(frozen=True)
class Term:
    """One literal of a rule."""

    concept_id: str
    name: str
    present: bool
    """Whether the rule asks for the concept, or for its absence."""
    truth: float
    """ĉ, or 1 − ĉ where absence is asked for."""


@dataclass(frozen=True)
class ImageRule:
    """The rule of one image for the class it was given."""

    text: str
    terms: tuple[Term, ...]
    """The weakest first."""
    holds: bool
    """Whether every literal agrees with the image's concepts at ½."""
    truth: float
    """ŷ_neural of the class."""


@dataclass(frozen=True)
class Prediction:
    """What the classifier says of one image. A system without concepts or rules leaves them out."""

    class_name: str
    class_probabilities: dict[str, float]
    """Calibrated, where the model has a calibration."""
    concept_probabilities: dict[str, float]
    """By concept id."""
    rule: ImageRule | None
    class_map: Map | None = None
    """What in the image speaks for the class."""
    concept_maps: dict[str, Map] = field(default_factory=dict)
    """By concept id: what speaks for each of the rule's leading concepts."""
    rejected: str | None = None
    """Why the class should not be relied on, where a reject option says so."""

    @property
    def confidence(self) -> float:
        """Probability of the class that is said."""
        return self.class_probabilities[self.class_name]


@dataclass(frozen=True)
class Classifier:
    """A backbone and its head, ready for pixels."""

    backbone: Backbone
    network: Head
    vocabulary: Vocabulary
    class_names: tuple[str, ...]
    config: TrainConfig
    seed: int
    device: torch.device
    calibration: Calibration | None = None
    """Fitted on validation images; None leaves probabilities as the network gives them."""

    @classmethod
    def of(cls, run: TrainedRun, fitted: Fitted | None = None, device: str = "cpu") -> Classifier:
        """The classifier of one seed of a run; the best one by default."""
        chosen = fitted or run.best
        return cls(
            chosen.backbone,
            chosen.network,
            run.vocabulary,
            run.class_names,
            run.config,
            chosen.seed,
            resolve_device(device),
        )

    @property
    def image_network(self) -> ImageNetwork:
        """Images to output, on the classifier's device, in evaluation mode."""
        return ImageNetwork(self.backbone.module, self.network).to(self.device).eval()

    @cached_property
    def has_concepts(self) -> bool:
        """Whether the system predicts concepts."""
        where = next(self.network.parameters()).device
        with torch.inference_mode():
            return self.network.eval()(torch.zeros(1, self.backbone.n_features, device=where)).concepts is not None

    def outputs(self, images: Sequence[Pixels]) -> Outputs:
        """Arrays for a batch of (H, W, 3) images of any sizes, class probabilities calibrated."""
        batch = torch.stack([self.backbone.preprocess(pixels) for pixels in images])
        with torch.inference_mode():
            return self.calibrated(as_arrays(self.image_network(batch.to(self.device))))

    def calibrated(self, outputs: Outputs) -> Outputs:
        """The outputs with class probabilities at the fitted temperature; the class that is said stays the same."""
        if self.calibration is None:
            return outputs
        return outputs._replace(class_probabilities=self.calibration(outputs.class_probabilities))

    def predict(
        self,
        images: Sequence[Pixels],
        *,
        maps: bool = False,
        n_concept_maps: int = 3,
        map_method: str | None = None,
        reject: Reject | None = None,
    ) -> list[Prediction]:
        """One prediction an image; with `maps`, the class's map and those of the rule's leading present concepts.

        All images are one batch. With `reject`, predictions below its confidence say why they should not be relied on.
        Raises `InputRefused` where the network's output is not finite.
        """
        if not images:
            return []
        outputs = self.outputs(images)
        _require_finite(outputs)
        predictions = [self._prediction(outputs, n, reject) for n in range(len(images))]
        if not maps:
            return predictions
        from model.explain.saliency import DEFAULT_METHOD, with_maps  # noqa: PLC0415 - grad-cam takes seconds to import

        return with_maps(self, images, predictions, n_concept_maps, map_method or DEFAULT_METHOD)

    def _prediction(self, outputs: Outputs, n: int, reject: Reject | None) -> Prediction:
        predicted = int(outputs.predicted[n])
        concepts = outputs.concept_probabilities[n]
        return Prediction(
            self.class_names[predicted],
            dict(zip(self.class_names, outputs.class_probabilities[n].tolist(), strict=True)),
            dict(zip(self.vocabulary.ids[: len(concepts)], concepts.tolist(), strict=True)),
            self._rule(Outputs(*(part[n : n + 1] for part in outputs)), predicted) if outputs.has_rules else None,
            rejected=reject.says(float(outputs.class_probabilities[n, predicted])) if reject else None,
        )

    def _rule(self, one: Outputs, predicted: int) -> ImageRule:
        asked = np.array([predicted])
        literals = literals_of(one, asked)
        found = image_terms(literals.used[0], literals.present[0], one.concept_probabilities[0], self.vocabulary)
        terms = tuple(
            Term(t["concept_id"], self.vocabulary[t["concept_id"]].name, t["present"], t["truth"]) for t in found
        )
        text = rule_text(self.class_names[predicted], [(t.name, t.present) for t in terms])
        return ImageRule(text, terms, bool(image_rule_holds(one, asked)[0]), float(one.rule_truth[0, predicted]))


def _require_finite(outputs: Outputs) -> None:
    if not np.isfinite(outputs.class_probabilities).all():
        raise InputRefused(
            "prediction: expected finite probabilities, the network gave NaN; nothing was predicted.",
            remedy="The model's weights are not finite: train again, with a lower train.learning_rate.",
        )
