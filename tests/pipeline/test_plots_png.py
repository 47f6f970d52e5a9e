from __future__ import annotations

import io

import numpy as np
import pandas as pd
from PIL import Image

from pipeline.report.plots import training_curves_png


def history(n_seeds: int) -> pd.DataFrame:
    epochs = np.arange(1.0, 6)
    rows = [
        {"epoch": epoch, "train_loss": 1 / epoch, "val_loss": 1.2 / epoch, "val_macro_f1": epoch / 6, "seed": seed}
        for seed in range(n_seeds)
        for epoch in epochs + seed / 10
    ]
    return pd.DataFrame(rows)


def colours(png: bytes) -> set[tuple[int, ...]]:
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return {tuple(pixel) for pixel in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}


def test_the_picture_is_on_white_and_shows_both_curves_in_real_colours() -> None:
    png = training_curves_png(history(2), {0: 3, 1: 5})
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    assert picture.width > 1000
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    found = np.array(sorted(colours(png)))
    for wanted in ((0x0B, 0x6E, 0x99), (0xB3, 0x5C, 0x00)):
        assert np.abs(found - wanted).max(axis=1).min() < 40
    # None of the placeholders that the page replaces is left: nothing is nearly black but not the ink.
    assert not {(1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 4, 4), (5, 5, 5)} & colours(png)


def test_the_same_history_is_the_same_file_and_one_without_validation_is_drawn() -> None:
    one = history(1)
    assert training_curves_png(one, {0: 3}) == training_curves_png(one, {0: 3})
    blind = one.assign(val_loss=np.nan, val_macro_f1=np.nan)
    assert training_curves_png(blind, {0: 5}) != training_curves_png(one, {0: 5})
