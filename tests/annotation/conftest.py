"""Drawn images and the embedded endpoint, for tests of the questions that are asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from annotation.vlm.client import VlmClient
from annotation.vlm.journal import Journal
from annotation.vlm.settings import VlmSettings
from data_contracts.errors import ImageRejected, RejectReason

Reader = Callable[[str], npt.NDArray[np.uint8]]


@pytest.fixture
def read() -> Reader:
    """Pixels by id: `large-3` and `small-3` are discs of two kinds, `broken-3` cannot be read."""

    def pixels_of(image_id: str) -> npt.NDArray[np.uint8]:
        kind, number = image_id.split("-")
        if kind == "broken":
            raise ImageRejected(RejectReason.TRUNCATED, image_id)
        radius_px, red = (34 + int(number) % 4, 190) if kind == "large" else (12 + int(number) % 4, 110)
        y, x = np.ogrid[0:120, 0:120]
        pixels = np.full((120, 120, 3), (225, 185, 165), np.uint8)
        pixels[np.hypot(x - 60, y - 60) <= radius_px] = (red, 60 + int(number), 55)
        return pixels

    return pixels_of


@pytest.fixture
def make_embedded(tmp_path: Path) -> Iterator[Callable[..., VlmClient]]:
    """Clients of the embedded endpoint; all of one test share a journal folder."""
    journals: list[Journal] = []

    def make(**changes: Any) -> VlmClient:
        journals.append(Journal(tmp_path / "journal"))
        return VlmClient(VlmSettings(**changes), None, journals[-1])

    yield make
    for journal in journals:
        journal.close()
