from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from data_contracts.concepts import Concept, Vocabulary
from data_contracts.dataset import AlignedDataset
from data_contracts.errors import ImageRejected, RejectReason
from model.config import Logic, TrainConfig
from model.fit import TrainedRun, train

N_IMAGES = 90
CLASSES = ("blue", "red", "striped")
VOCABULARY = Vocabulary.of(
    [
        Concept("bluish", "colour: bluish", group="colour"),
        Concept("reddish", "colour: reddish", group="colour"),
        Concept("stripes", "stripes"),
        Concept("bright", "bright"),
    ]
)


class Squares:
    """Coloured squares whose concepts are known; image `red-7` is the 7th, and a reader of its pixels."""

    def __init__(self, n_images: int = N_IMAGES) -> None:
        rng = np.random.default_rng(0)
        self.y = np.arange(n_images) % 3
        self.stripes = (self.y == 2) | (rng.random(n_images) < 0.1)
        self.reddish = np.where(self.y == 2, rng.random(n_images) < 0.5, self.y == 1)
        self.bright = rng.random(n_images) < 0.5
        self.ids = [f"{CLASSES[j]}-{n}" for n, j in enumerate(self.y)]
        self.n_reads = 0

    def __call__(self, image_id: str) -> npt.NDArray[np.uint8]:
        self.n_reads += 1
        n = self.ids.index(image_id)
        rng = np.random.default_rng(n)
        pixels = np.full((40, 48, 3), 140 if self.bright[n] else 70, dtype=np.float64)
        pixels[..., 0 if self.reddish[n] else 2] += 90
        if self.stripes[n]:
            pixels[::8] *= 0.2
        return np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)

    def dataset(self) -> AlignedDataset:
        concepts = np.stack([~self.reddish, self.reddish, self.stripes, self.bright], axis=1).astype(np.float32)
        mask = np.ones_like(concepts, dtype=bool)
        mask[::7, 3] = False
        split = np.array(["train", "train", "train", "val", "test", "test"])[(np.arange(len(self.y)) // 3) % 6]
        frame = pd.DataFrame(
            {
                "image_id": self.ids,
                "path": [f"{i}.png" for i in self.ids],
                "label": [CLASSES[j] for j in self.y],
                "split": split,
                "group_id": None,
            }
        )
        return AlignedDataset(frame, concepts, mask, VOCABULARY, CLASSES)


@pytest.fixture(scope="session")
def squares() -> Squares:
    return Squares()


@pytest.fixture
def with_unreadable(squares: Squares) -> Callable[[str], npt.NDArray[np.uint8]]:
    def read(image_id: str) -> npt.NDArray[np.uint8]:
        if image_id in {"blue-0", "red-4"}:
            raise ImageRejected(RejectReason.TRUNCATED, f"image {image_id}: truncated")
        return squares(image_id)

    return read


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="session")
def trained(squares: Squares, cache_dir: Path) -> dict[str, TrainedRun]:
    """One small run of each logic on the embedded backbone's features."""
    logics: tuple[Logic, ...] = ("paper", "dcr")
    return {
        logic: train(
            squares.dataset(),
            squares,
            TrainConfig(logic=logic, epochs=30, seeds=(0, 1), image_size_px=64, lambda_neural=1.0),
            cache_dir=cache_dir,
        )
        for logic in logics
    }
