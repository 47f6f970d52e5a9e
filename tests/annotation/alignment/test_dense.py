from __future__ import annotations

import torch
from torch.nn import functional as F

from annotation.alignment.dense import heatmaps, reference_contrast


def test_maps_are_cosines_and_the_score_is_their_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(3, 4, 5, 8, generator=generator)
    text = F.normalize(torch.randn(6, 8, generator=generator), dim=-1)
    null = F.normalize(torch.randn(2, 8, generator=generator), dim=-1)
    found = heatmaps(cells, text, null)
    expected = F.cosine_similarity(cells[:, None], text[None, :, None, None], dim=-1)
    torch.testing.assert_close(found.maps, expected)
    torch.testing.assert_close(found.similarity, expected.mean((2, 3)))
    null_maps = F.cosine_similarity(cells[:, None], null[None, :, None, None], dim=-1)
    torch.testing.assert_close(found.null_similarity, null_maps.mean((1, 2, 3)))


def test_the_score_is_not_the_cosine_of_the_pooled_cell() -> None:
    cells = torch.tensor([[[[10.0, 0.0], [0.0, 1.0]]]])
    found = heatmaps(cells, torch.tensor([[1.0, 0.0]]))
    assert found.similarity.item() == 0.5
    assert F.cosine_similarity(cells.mean((1, 2)), torch.tensor([[1.0, 0.0]])).item() > 0.99


def test_empty_cells_are_cosine_zero_and_missing_nulls_are_not_a_number() -> None:
    found = heatmaps(torch.zeros(1, 2, 2, 3), torch.eye(3))
    assert found.maps.abs().max() == 0
    assert found.null_similarity.isnan().all()


def test_contrast_is_the_share_in_a_softmax_with_the_concepts_own_references() -> None:
    similarity = torch.tensor([[0.3, 0.1]])
    references = torch.tensor([[0.2, 0.25, 0.9]])
    applies = torch.tensor([[True, True, False], [True, False, False]])
    found = reference_contrast(similarity, references, applies, 10.0)
    first = torch.softmax(10 * torch.tensor([0.3, 0.2, 0.25]), 0)[0]
    second = torch.softmax(10 * torch.tensor([0.1, 0.2]), 0)[0]
    torch.testing.assert_close(found.float(), torch.stack([first, second])[None])


def test_what_image_and_references_share_cancels_in_the_contrast() -> None:
    applies = torch.ones(1, 1, dtype=torch.bool)
    low = reference_contrast(torch.tensor([[0.1]]), torch.tensor([[0.05]]), applies, 100.0)
    high = reference_contrast(torch.tensor([[0.6]]), torch.tensor([[0.55]]), applies, 100.0)
    torch.testing.assert_close(low, high, rtol=1e-4, atol=1e-6)
