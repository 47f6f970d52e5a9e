"""Large images in tiles of the tower's size: what would be lost in one small picture gets cells of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_contracts.ports import Pixels


class Layout(NamedTuple):
    """How many tiles one image is cut into; (1, 1) is the whole image, squashed."""

    n_rows: int
    n_columns: int

    @property
    def n_tiles(self) -> int:
        """Passes of the tower."""
        return self.n_rows * self.n_columns


class Overlap(NamedTuple):
    """What two neighbouring tiles share: whole cells, so that the cells of both fall together."""

    rows: int
    columns: int


@dataclass(frozen=True)
class Tiling:
    """When and how images are cut into tiles."""

    above: float
    """The longer side must exceed so many times the tower's."""
    overlap_fraction: float
    """Share of a tile that its neighbour sees too."""
    max_per_side: int
    """At most so many tiles a side; larger images are scaled down to them."""

    def layout(self, size_px: tuple[int, int], tile_px: tuple[int, int]) -> Layout:
        """Tiles of an image of `size_px` (height, width): as many as fit without enlarging it."""
        if max(side / tile for side, tile in zip(size_px, tile_px, strict=True)) <= self.above:
            return Layout(1, 1)
        fitting = (
            int((side / tile - self.overlap_fraction) / (1 - self.overlap_fraction))
            for side, tile in zip(size_px, tile_px, strict=True)
        )
        return Layout(*(min(max(n, 1), self.max_per_side) for n in fitting))

    def overlap(self, grid: tuple[int, int]) -> Overlap:
        """Cells that neighbours share, for a tower of (h, w) cells."""
        return Overlap(*(min(round(self.overlap_fraction * side), side - 1) for side in grid))


def canvas_px(layout: Layout, overlap: Overlap, grid: tuple[int, int], tile_px: tuple[int, int]) -> tuple[int, int]:
    """(height, width) the image is scaled to, so that its tiles cover it exactly."""
    height, width = (
        tile + (n - 1) * step for tile, n, step in zip(tile_px, layout, _steps_px(overlap, grid, tile_px), strict=True)
    )
    return height, width


def cut(
    canvas: Pixels, layout: Layout, overlap: Overlap, grid: tuple[int, int], tile_px: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    """(T, H, W, 3) tiles of a canvas, row by row."""
    down, right = _steps_px(overlap, grid, tile_px)
    height, width = tile_px
    return np.stack(
        [
            canvas[row * down : row * down + height, column * right : column * right + width]
            for row in range(layout.n_rows)
            for column in range(layout.n_columns)
        ]
    )


def stitched(cells: npt.NDArray[np.floating], layout: Layout, overlap: Overlap) -> npt.NDArray[np.float16]:
    """(n, T, h, w, F) cells of tiles as one grid an image; cells that several tiles saw are averaged."""
    n_images, _, height, width, n_features = cells.shape
    down, right = height - overlap.rows, width - overlap.columns
    shape = (height + (layout.n_rows - 1) * down, width + (layout.n_columns - 1) * right)
    total = np.zeros((n_images, *shape, n_features), np.float32)
    seen = np.zeros((*shape, 1), np.float32)
    for number in range(layout.n_tiles):
        row, column = divmod(number, layout.n_columns)
        place = np.s_[row * down : row * down + height, column * right : column * right + width]
        total[(slice(None), *place)] += cells[:, number]
        seen[place] += 1
    return (total / seen).astype(np.float16)


def _steps_px(overlap: Overlap, grid: tuple[int, int], tile_px: tuple[int, int]) -> tuple[int, int]:
    """(down, right) from one tile to the next: whole cells, rounded to pixels."""
    down, right = (
        round((n_cells - shared) * tile / n_cells) for tile, n_cells, shared in zip(tile_px, grid, overlap, strict=True)
    )
    return down, right
