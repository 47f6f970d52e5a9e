"""A trained model in a few lines of Python: load it, predict, explain, and correct its concepts.

>>> from model import load
>>> model = load(folder)                                # the folder `model` of a run
>>> prediction = model.predict([image])[0]
>>> prediction.class_name in model.class_names
True
>>> explained = model.explain(image)
>>> explained.class_map.shape == image.shape[:2]        # what in the image speaks for the class, 0 to 1
True
>>> corrected = model.intervene(image, {concept: True}) # by the concept's id or name
>>> corrected.before.class_name == prediction.class_name
True

Images are Pillow images or (H, W), (H, W, 3) or (H, W, 4) arrays of 8 bits; `flows.api.load` takes paths too, DICOM
among them. A model is a research tool and no medical device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_contracts.concepts import Vocabulary, slug
from data_contracts.errors import InputRefused
from data_contracts.ports import Pixels
from model import checkpoint
from model.calibration import load_calibration
from model.predict import Classifier, Prediction
from model.reject import Reject, choose_reject

if TYPE_CHECKING:
    from model.explain.intervene import Intervened

Picture = Image.Image | npt.NDArray[np.uint8]

_BATCH = 32


def load(folder: Path | str, *, vocabulary: Vocabulary | None = None, device: str = "auto") -> Model:
    """The model of a run's `model` folder, calibrated where it has a calibration; needs no network.

    With `vocabulary`, the model must be for exactly these concepts. Raises `CheckpointRefused` when a file is missing
    or was altered, `VocabularyMismatch` for other concepts.
    """
    path = Path(folder)
    classifier = checkpoint.load(path, vocabulary=vocabulary, device=device)
    return Model(replace(classifier, calibration=load_calibration(path)))


@dataclass(frozen=True)
class Model:
    """A trained classifier, to be asked about images."""

    classifier: Classifier

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes it tells apart."""
        return self.classifier.class_names

    @property
    def concepts(self) -> dict[str, str]:
        """Concept ids and their names, in order."""
        return dict(zip(self.classifier.vocabulary.ids, self.classifier.vocabulary.names, strict=True))

    def predict(
        self, images: Sequence[Picture], *, coverage: float | None = None, max_risk: float | None = None
    ) -> list[Prediction]:
        """One `Prediction` an image: class, probabilities, concepts and rule; batches are made inside.

        With `coverage` or `max_risk`, predictions that are too uncertain for it, judged by validation images, have
        `rejected` set. Raises `InputRefused` for what is no picture.
        """
        pixels = [as_pixels(image, n) for n, image in enumerate(images)]
        reject = self.reject_option(coverage=coverage, max_risk=max_risk)
        return [
            prediction
            for start in range(0, len(pixels), _BATCH)
            for prediction in self.classifier.predict(pixels[start : start + _BATCH], reject=reject)
        ]

    def explain(self, image: Picture, *, n_concept_maps: int = 3, method: str | None = None) -> Prediction:
        """The `Prediction` with `class_map` and `concept_maps`, (H, W) in [0, 1], by a method of `saliency.METHODS`."""
        return self.classifier.predict([as_pixels(image)], maps=True, n_concept_maps=n_concept_maps, map_method=method)[
            0
        ]

    def intervene(self, image: Picture, corrections: Mapping[str, bool]) -> Intervened:
        """What the model says `before` and `after` the named concepts (by id or name) are set to present or absent.

        Raises `InputRefused` for a concept it does not know, and for a system without concepts.
        """
        from model.explain.intervene import intervene  # noqa: PLC0415 - grad-cam takes seconds to import

        found = {self._concept_id(name): bool(present) for name, present in corrections.items()}
        return intervene(self.classifier, as_pixels(image), found)

    def reject_option(self, *, coverage: float | None = None, max_risk: float | None = None) -> Reject | None:
        """The reject option for a wanted coverage or a highest risk; None where neither is wanted."""
        return choose_reject(self.classifier.calibration, coverage=coverage, max_risk=max_risk)

    def _concept_id(self, name: str) -> str:
        vocabulary = self.classifier.vocabulary
        by_name = {concept.name: concept.concept_id for concept in vocabulary}
        for candidate in (name, by_name.get(name), slug(name)):
            if candidate in vocabulary:
                return str(candidate)
        vocabulary.position(name)
        raise AssertionError("position() raises for an unknown concept")


def as_pixels(image: Picture, number: int = 0) -> Pixels:
    """(H, W, 3) uint8 of a Pillow image or an array of 8 bits, grey, RGB or RGBA; raises `InputRefused` for others."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in {2, 3} or array.size == 0:
        raise InputRefused(
            f"image {number}: expected a Pillow image or 8-bit pixels (H, W), (H, W, 3) or (H, W, 4), got "
            f"{array.dtype} of shape {array.shape}; nothing was predicted.",
            remedy="Bring the pixels to 0–255 and to numpy.uint8; `flows.api.load` reads files as the run did.",
        )
    if array.ndim == 2:
        return np.repeat(array[:, :, None], 3, axis=2)
    if array.shape[2] not in {3, 4}:
        raise InputRefused(f"image {number}: expected 3 or 4 channels last, got shape {array.shape}.")
    return np.ascontiguousarray(array[:, :, :3])
