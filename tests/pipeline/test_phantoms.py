from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_contracts.concepts import slug
from pipeline.phantoms import CLASS_NAMES, CONCEPT_RATES, draw_phantom, make_phantoms


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("phantoms")
    make_phantoms(made, n_images=30, seed=5)
    return made


def test_images_and_truth_fit_together(folder: Path) -> None:
    truth = pd.read_csv(folder / "truth.csv")
    assert list(truth.columns) == ["path", *CONCEPT_RATES]
    assert set(truth.drop(columns="path").to_numpy().ravel()) == {0, 1}
    assert sorted(truth["path"]) == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    assert truth["path"].str.split("/").str[1].value_counts().to_dict() == dict.fromkeys(CLASS_NAMES, 10)


def test_everything_says_that_it_is_synthetic(folder: Path) -> None:
    truth = pd.read_csv(folder / "truth.csv")
    assert truth["path"].str.contains("phantom").all()
    assert truth["path"].str.contains("synthetic").all()


def test_equal_seeds_give_equal_bytes_and_others_do_not(folder: Path, tmp_path: Path) -> None:
    make_phantoms(tmp_path / "same", n_images=3, seed=5)
    make_phantoms(tmp_path / "other", n_images=3, seed=6)
    for path in (tmp_path / "same").rglob("*.png"):
        name = path.relative_to(tmp_path / "same")
        assert path.read_bytes() == (folder / name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_images_are_plain_rgb_of_the_asked_size(folder: Path, tmp_path: Path) -> None:
    make_phantoms(tmp_path, n_images=1, side_px=96)
    with Image.open(next(tmp_path.rglob("*.png"))) as image:
        assert (image.mode, image.size, image.info) == ("RGB", (96, 96), {})
    with Image.open(next(folder.rglob("*.png"))) as image:
        assert image.size == (160, 160)


def test_no_class_determines_a_concept() -> None:
    rates = np.array(list(CONCEPT_RATES.values()))
    assert rates.shape == (len(CONCEPT_RATES), len(CLASS_NAMES))
    assert rates.min() > 0.1
    assert rates.max() < 0.9
    assert (rates.max(axis=1) - rates.min(axis=1) > 0.3).all()


def test_concepts_follow_their_rates() -> None:
    # The concepts are drawn before the picture, so the same seeds with a tiny picture tell their rates.
    drawn = [draw_phantom(1, np.random.default_rng([0, i]), 32).concepts for i in range(150)]
    for name, rates in CONCEPT_RATES.items():
        spread = np.sqrt(rates[1] * (1 - rates[1]) / 150)
        assert np.mean([d[name] for d in drawn]) == pytest.approx(rates[1], abs=4 * spread)


def test_truth_columns_are_concept_ids() -> None:
    assert all(slug(name) == name for name in CONCEPT_RATES)


@pytest.mark.parametrize("class_index", range(3))
def test_a_lesion_stands_out_from_the_skin(class_index: int) -> None:
    phantom = draw_phantom(class_index, np.random.default_rng(3))
    grey = phantom.pixels.mean(axis=2)
    border = np.concatenate([grey[:6].ravel(), grey[-6:].ravel()])
    assert np.median(grey[70:90, 70:90]) < np.median(border) - 10
