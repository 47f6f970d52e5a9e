"""A trained model in Python, for files: `model.load` with paths, DICOM among them, read as the run read its images.

>>> from flows.api import load
>>> classifier = load(run)                              # a run folder
>>> prediction = classifier.predict([path])[0]
>>> prediction.class_name in classifier.class_names
True
>>> classifier.explain(path).class_map.ndim                # (H, W), 0 to 1: what speaks for the class
2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_contracts.store import RunFolder
from flows.devices import resolve_device
from flows.settings import restored

if TYPE_CHECKING:
    from model.api import Model, Picture
    from model.explain.intervene import Intervened
    from model.predict import Prediction


@dataclass(frozen=True)
class FileModel:
    """A `model.Model` that also takes paths wherever an image is asked for; files that cannot be read are raised."""

    model: Model
    max_pixels: int
    """Files with more pixels are refused, as the run did."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes it tells apart."""
        return self.model.class_names

    @property
    def concepts(self) -> dict[str, str]:
        """Concept ids and their names, in order."""
        return self.model.concepts

    def predict(
        self,
        images: Sequence[Picture | Path | str],
        *,
        coverage: float | None = None,
        max_risk: float | None = None,
    ) -> list[Prediction]:
        """One `Prediction` an image; raises `ImageRejected` for a file that is no image."""
        return self.model.predict([self._read(image) for image in images], coverage=coverage, max_risk=max_risk)

    def explain(self, image: Picture | Path | str, *, n_concept_maps: int = 3, method: str | None = None) -> Prediction:
        """The `Prediction` with its maps, (H, W) in [0, 1]."""
        return self.model.explain(self._read(image), n_concept_maps=n_concept_maps, method=method)

    def intervene(self, image: Picture | Path | str, corrections: dict[str, bool]) -> Intervened:
        """What the model says before and after concepts (by id or name) are set to present or absent."""
        return self.model.intervene(self._read(image), corrections)

    def _read(self, image: Picture | Path | str) -> Picture:
        from pipeline.decode import read_pixels

        return read_pixels(Path(image), max_pixels=self.max_pixels) if isinstance(image, str | Path) else image


def load(run: Path | str) -> FileModel:
    """The trained model of a run folder; raises `InputRefused` where there is no run, `CheckpointRefused` no model."""
    from model.api import load as load_model

    folder = RunFolder(run)
    settings = restored(folder.read_manifest().config)
    model = load_model(folder.model_dir, device=resolve_device(settings.train.device))
    return FileModel(model, settings.source.max_pixels)
