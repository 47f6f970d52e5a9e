"""Large images in tiles."""

from __future__ import annotations

import numpy as np
import pytest

from annotation.alignment.tiles import Layout, Tiling, canvas_px, cut, stitched

TILING = Tiling(above=2.0, overlap_fraction=0.25, max_per_side=4)
TILE_PX = (64, 64)
GRID = (4, 4)


@pytest.mark.parametrize(
    ("size_px", "layout"),
    [
        ((60, 50), (1, 1)),
        ((128, 128), (1, 1)),
        ((130, 64), (2, 1)),
        ((64, 256), (1, 4)),
        ((200, 160), (3, 3)),
        ((5000, 5000), (4, 4)),
    ],
)
def test_as_many_tiles_as_fit_without_enlarging(size_px: tuple[int, int], layout: tuple[int, int]) -> None:
    found = TILING.layout(size_px, TILE_PX)
    assert found == layout
    canvas = canvas_px(found, TILING.overlap(GRID), GRID, TILE_PX)
    assert found == (1, 1) or all(c <= max(s, t) for c, s, t in zip(canvas, size_px, TILE_PX, strict=True))


def test_cells_of_tiles_stand_where_their_pixels_are() -> None:
    layout, overlap = Layout(2, 3), TILING.overlap(GRID)
    height, width = canvas_px(layout, overlap, GRID, TILE_PX)
    canvas = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    tiles = cut(canvas, layout, overlap, GRID, TILE_PX)
    cells = tiles.reshape(6, 4, 16, 4, 16, 3).astype(np.float32).mean((2, 4))
    found = stitched(cells[None], layout, overlap)
    expected = canvas.reshape(height // 16, 16, width // 16, 16, 3).astype(np.float32).mean((1, 3))
    np.testing.assert_allclose(found[0], expected, rtol=2e-3)


def test_cells_that_two_tiles_saw_are_averaged() -> None:
    cells = np.stack([np.zeros((4, 4, 1)), np.ones((4, 4, 1))])[None]
    row = stitched(cells, Layout(1, 2), TILING.overlap(GRID))[0, 0, :, 0]
    assert row.tolist() == [0, 0, 0, 0.5, 1, 1, 1]
