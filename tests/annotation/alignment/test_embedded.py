"""The embedded aligner stays a real open_clip model, whatever is fitted to it."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch

from annotation.alignment.adapt import cross_fit, fold_of
from annotation.alignment.dense import heatmaps
from annotation.alignment.embedded import build_embedded, with_projections
from annotation.alignment.nulls import NULL_PROMPTS
from annotation.alignment.projections import projections
from annotation.alignment.towers import Aligner, load_aligner
from annotation.text import minilm_embedder
from annotation.votes import Votes

CONCEPTS = ["red", "bright", "coarse texture"]


@pytest.fixture(scope="module")
def fitted() -> tuple[Aligner, np.ndarray, np.ndarray]:
    """The fold-0 model fitted to the colour of random images, the images, and the probe's scores of them."""
    aligner = build_embedded()
    rng = np.random.default_rng(0)
    red = rng.integers(0, 2, 24)
    images = rng.integers(0, 120, (24, 224, 224, 3), dtype=np.uint8)
    images[red == 1, ..., 0] += 120
    features = aligner.features(images).cells.mean((1, 2)).numpy()
    votes = Votes(np.stack([red, rng.integers(0, 2, 24), 1 - red], 1).astype(np.float32), np.ones((24, 3), np.float32))
    fit = cross_fit(features, votes, fold_of(map(str, range(24)), 3, 0), 3)
    text, null_text = aligner.embed_text(CONCEPTS), aligner.embed_text(NULL_PROMPTS)
    heads = projections(fit.probes[0], text, features, null_text)
    return with_projections(aligner, heads), images, fit.probes[0](features)


def test_it_is_a_custom_text_clip_of_open_clip() -> None:
    aligner = load_aligner("embedded")
    assert isinstance(aligner.model, open_clip.CustomTextCLIP)
    assert aligner.kind.name == "timm_average_cnn"
    assert aligner.cell_shape == (7, 7, 1280)


def test_mean_over_cells_equals_encode_image(fitted: tuple[Aligner, np.ndarray, np.ndarray]) -> None:
    aligner, images, _ = fitted
    own = aligner.model.encode_image(aligner.normalised(images[:4]))
    cells = aligner.dense(images[:4]).cells
    torch.testing.assert_close(cells.mean((1, 2)), own, atol=1e-6, rtol=1e-4)


def test_dot_product_with_the_models_own_text_is_the_probe(fitted: tuple[Aligner, np.ndarray, np.ndarray]) -> None:
    aligner, images, scores = fitted
    text = torch.from_numpy(aligner.embed_text(CONCEPTS))
    own = aligner.model.encode_image(aligner.normalised(images)) @ text.T
    np.testing.assert_allclose(own.numpy(), scores, atol=1e-4 * np.abs(scores).max() + 1e-6)


def test_similarity_ranks_as_the_probe_and_nulls_see_nothing(fitted: tuple[Aligner, np.ndarray, np.ndarray]) -> None:
    aligner, images, scores = fitted
    text, null = (torch.from_numpy(aligner.embed_text(words)) for words in (CONCEPTS, NULL_PROMPTS))
    found = heatmaps(aligner.dense(images).cells, text, null)
    assert np.corrcoef(found.similarity[:, 0].numpy(), scores[:, 0])[0, 1] > 0.95
    assert found.null_similarity.std() < 0.5 * found.similarity[:, 0].std()


def test_the_unfitted_model_is_not_changed_by_fitting(fitted: tuple[Aligner, np.ndarray, np.ndarray]) -> None:
    assert fitted[0].model is not build_embedded().model
    assert not build_embedded().model.visual.head.proj.weight.any()


def test_minilm_embeds_meaning_and_agrees_with_the_text_tower() -> None:
    rows = minilm_embedder()(["a red skin lesion", "erythematous lesion", "stock market news"])
    assert rows.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.3
    np.testing.assert_allclose(build_embedded().embed_text(["a red skin lesion"]), rows[:1], atol=1e-5)


def test_no_texts_are_no_rows() -> None:
    assert minilm_embedder()([]).shape == (0, 384)
