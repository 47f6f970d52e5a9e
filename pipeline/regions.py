"""Where people marked concepts in images: boxes in a CSV, or a folder of masks, completely checked before use.

A CSV has the columns `path,concept,x0,y0,x1,y1`: a box in pixels of the original image, x1 and y1 just outside it,
several rows a cell allowed. A folder holds `CONCEPT_ID/IMAGE.png`: a mask of the image's size, nonzero where the
concept is to be seen (transparency is ignored); IMAGE is the image's path without its ending, or its bare name where
only one image has it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image, UnidentifiedImageError

from data_contracts.concepts import Vocabulary
from data_contracts.errors import ConfigurationError, ContractViolation
from pipeline.paths import is_hidden, os_path, table_path
from pipeline.sheet import Sheet, read_sheet

Mask = npt.NDArray[np.bool_]
Box = tuple[float, float, float, float]
Cell = tuple[str, str]
"""(image id, concept id)."""

_COLUMNS = ("path", "concept", "x0", "y0", "x1", "y1")
_IN_COLOURS = ("P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK")
_IGNORED = "Nothing was aligned; correct these, or leave align.regions out."


@dataclass(frozen=True)
class Regions:
    """What was marked, by image and concept."""

    boxes: Mapping[Cell, tuple[Box, ...]]
    masks: Mapping[Cell, Path]
    size_px: Mapping[str, tuple[int, int]]
    """Image id → (height, width)."""

    @property
    def cells(self) -> frozenset[Cell]:
        """Images and concepts that have a region."""
        return frozenset(self.boxes) | frozenset(self.masks)

    def mask(self, image_id: str, concept_id: str) -> Mask:
        """(H, W) in pixels of the image, True where the concept is; raises `KeyError` where nothing was marked."""
        cell = (image_id, concept_id)
        if cell in self.masks:
            with Image.open(self.masks[cell]) as picture:
                pixels = np.asarray(picture.convert("RGB") if picture.mode in _IN_COLOURS else picture)
            return np.asarray(pixels.reshape(*pixels.shape[:2], -1).any(2), np.bool_)
        mask = np.zeros(self.size_px[image_id], bool)
        for x0, y0, x1, y1 in self.boxes[cell]:
            # A pixel belongs to a box that covers any of it.
            mask[int(np.floor(y0)) : int(np.ceil(y1)), int(np.floor(x0)) : int(np.ceil(x1))] = True
        return mask


def read_regions(path: Path, images: pd.DataFrame, vocabulary: Vocabulary) -> Regions:
    """The regions in a CSV, or in a folder of masks.

    Args:
        path: The file or folder.
        images: IMAGES; regions of rejected images are left out.
        vocabulary: The concepts; a CSV may name them by id or by name.

    Raises:
        ConfigurationError: There is nothing at `path`.
        ContractViolation: Every fault found, with row and column, or with the mask's file.
    """
    known = _Known(images, vocabulary)
    if path.is_dir():
        return _from_masks(path, known)
    if path.is_file():
        return _from_boxes(read_sheet(path), known)
    raise ConfigurationError(f"align.regions: expected a CSV file or a folder of masks, found nothing at {path}.")


class _Known:
    """Images and concepts by what people call them."""

    def __init__(self, images: pd.DataFrame, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.size_px = {
            str(row.image_id): (int(row.height_px), int(row.width_px))
            for row in images[images["rejected"].isna()].itertuples()
        }
        self._by_path = dict(zip(images["path"].astype(str), images["image_id"].astype(str), strict=True))
        self._by_name: dict[str, list[str]] = {}
        for name, image_id in self._by_path.items():
            for short in {name, str(PurePosixPath(name).with_suffix("")), PurePosixPath(name).name, _stem(name)}:
                self._by_name.setdefault(short, []).append(image_id)
        self._concepts = {concept.name.casefold(): concept.concept_id for concept in vocabulary}

    def image(self, name: str) -> tuple[str | None, str]:
        """(image id, fault): one of the two is empty."""
        if name in self._by_path:
            return self._by_path[name], ""
        found = self._by_name.get(name, [])
        if len(found) == 1:
            return found[0], ""
        if found:
            return None, f"{name[:60]!r} is the name of {len(found)} images; write the whole path"
        return None, f"{name[:60]!r} is no image of this run"

    def concept(self, name: str) -> tuple[str | None, str]:
        """(concept id, fault): one of the two is empty."""
        if name in self.vocabulary:
            return name, ""
        if name.casefold() in self._concepts:
            return self._concepts[name.casefold()], ""
        near = difflib.get_close_matches(name, [*self.vocabulary.ids, *self.vocabulary.names], n=1)
        return None, f"{name[:60]!r} is no concept of this run" + (f"; did you mean {near[0]!r}?" if near else "")


def _from_boxes(sheet: Sheet, known: _Known) -> Regions:
    header = [name.casefold() for name in sheet.header]
    missing = [name for name in _COLUMNS if name not in header]
    if missing:
        faults = [f"header: column {name!r} is missing" for name in missing]
        raise ContractViolation(sheet.name, faults, remedy=f"Found: {', '.join(sheet.header[:8])}. {_IGNORED}")
    at = [header.index(name) for name in _COLUMNS]
    faults: list[str] = []
    boxes: dict[Cell, tuple[Box, ...]] = {}
    for row, cells in sheet.rows:
        cell, box, wrong = _box([cells[i] for i in at], known)
        faults += [f"row {row}, column {column!r}: {problem}" for column, problem in wrong]
        if not wrong and cell[0] in known.size_px:
            boxes[cell] = (*boxes.get(cell, ()), box)
    if faults:
        raise ContractViolation(sheet.name, faults, remedy=_IGNORED)
    return Regions(boxes, {}, known.size_px)


def _box(cells: Sequence[str], known: _Known) -> tuple[Cell, Box, list[tuple[str, str]]]:
    """(cell, box, faults as column and problem) of one row; cell and box mean something without faults only."""
    image_id, no_image = known.image(cells[0])
    concept_id, no_concept = known.concept(cells[1])
    wrong = [(column, fault) for column, fault in (("path", no_image), ("concept", no_concept)) if fault]
    numbers: dict[str, float] = {}
    for column, text in zip(_COLUMNS[2:], cells[2:], strict=True):
        value = _number(text)
        if value is None:
            wrong.append((column, f"expected a number of pixels, got {text[:40]!r}"))
        else:
            numbers[column] = value
    if len(numbers) < len(_COLUMNS) - 2:
        return ("", ""), (0.0,) * 4, wrong
    size = known.size_px.get(image_id or "")
    wrong += _box_faults(numbers, size)
    return (image_id or "", concept_id or ""), (numbers["x0"], numbers["y0"], numbers["x1"], numbers["y1"]), wrong


def _box_faults(numbers: Mapping[str, float], size_px: tuple[int, int] | None) -> Iterator[tuple[str, str]]:
    for axis, most in (("x", size_px[1] if size_px else None), ("y", size_px[0] if size_px else None)):
        low, high = numbers[f"{axis}0"], numbers[f"{axis}1"]
        if low < 0:
            yield f"{axis}0", f"expected at least 0, got {low:g}"
        if high <= low:
            yield f"{axis}1", f"expected more than {axis}0 = {low:g}, got {high:g}"
        elif most is not None and high > most:
            yield (
                f"{axis}1",
                f"expected at most {most}, the image's {'width' if axis == 'x' else 'height'}, got {high:g}",
            )


def _number(text: str) -> float | None:
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _from_masks(folder: Path, known: _Known) -> Regions:
    masks: dict[Cell, Path] = {}
    faults: list[str] = []
    for file in _mask_files(folder):
        parts = table_path(file.relative_to(folder).as_posix())
        concept_name, _, name = parts.partition("/")
        concept_id, no_concept = known.concept(os_path(concept_name))
        image_id, no_image = known.image(str(PurePosixPath(name).with_suffix("")))
        wrong = [fault for fault in (no_concept, no_image) if fault]
        if image_id in known.size_px:
            wrong += _mask_faults(file, known.size_px[str(image_id)])
        faults += [f"{parts}: {fault}" for fault in wrong]
        if not wrong and image_id in known.size_px:
            masks[str(image_id), str(concept_id)] = file
    if faults:
        raise ContractViolation(folder.name, faults, remedy=_IGNORED)
    return Regions({}, masks, known.size_px)


def _mask_files(folder: Path) -> Iterator[Path]:
    """Every file below a folder of the folder, in order."""
    for file in sorted(folder.glob("*/**/*")):
        if file.is_file() and not any(is_hidden(part) for part in file.relative_to(folder).parts):
            yield file


def _mask_faults(file: Path, size_px: tuple[int, int]) -> list[str]:
    """What is wrong with a mask's file; only its header is read."""
    try:
        with Image.open(file) as picture:
            width, height = picture.size
    except (OSError, UnidentifiedImageError):
        return ["expected a mask as PNG, got no picture"]
    if (height, width) != size_px:
        return [f"expected a mask of the image's size, {size_px[1]} × {size_px[0]} px, got {width} × {height} px"]
    return []


def _stem(path: str) -> str:
    return PurePosixPath(path).stem
