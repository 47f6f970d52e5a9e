from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_contracts.errors import ImageRejected, RejectReason
from model.augment import AUGMENTATIONS
from model.backbones import Backbone, build_backbone
from model.config import TrainConfig
from model.data import Draw, FeatureInputs
from model.fit import fit, train
from model.prepare import NOT_FINITE, InputOptions, prepare

CPU = torch.device("cpu")
HISTOLOGY = AUGMENTATIONS["histology"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return build_backbone("embedded", size_px=32)


class BlindToBright(nn.Module):
    """Features that are no numbers for images whose red channel is high."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> Tensor:
        features = self.trunk(images)
        bright = images[:, 0].mean((1, 2)) > 0.2
        return torch.where(bright[:, None], torch.nan, features)


def test_images_whose_features_are_no_numbers_are_left_out_by_name(squares, backbone: Backbone, tmp_path: Path) -> None:
    blind = replace(backbone, module=BlindToBright(backbone.module).eval())
    prepared = prepare(squares.dataset(), squares, blind, frozen=True, cache_dir=tmp_path, device=CPU)
    assert set(prepared.rejected.values()) == {NOT_FINITE}
    assert 0 < len(prepared.rejected) < len(squares.ids)
    (features,) = prepared.inputs.batches([np.arange(len(prepared.dataset))])
    assert torch.isfinite(features).all()
    run = fit(prepared, blind, TrainConfig(epochs=2, seeds=(0,), image_size_px=32))
    first = next(iter(prepared.rejected))
    assert any("no numbers" in warning and first[:12] in warning for warning in run.warnings)
    assert np.isfinite(run.history["train_loss"]).all()


def test_pixels_are_decoded_once_and_served_as_they_are(squares, with_unreadable, backbone, tmp_path: Path) -> None:
    settings = {"frozen": False, "cache_dir": tmp_path, "device": CPU, "options": InputOptions(pixel_cache_gb=1)}
    dataset = squares.dataset().take(np.arange(9))
    first = prepare(dataset, with_unreadable, backbone, **settings)
    assert first.rejected == {"blue-0": RejectReason.TRUNCATED, "red-4": RejectReason.TRUNCATED}
    n_reads = squares.n_reads
    again = prepare(first.dataset, squares, backbone, **settings)
    (images,) = again.inputs.batches([np.array([3, 1])])
    assert squares.n_reads == n_reads
    assert again.n_reused == 7
    expected = torch.stack([backbone.preprocess(squares(first.dataset.image_ids[n])) for n in (3, 1)])
    torch.testing.assert_close(images, expected)


def test_pixels_that_would_take_too_much_disk_are_not_kept(squares, backbone: Backbone, tmp_path: Path) -> None:
    options = InputOptions(pixel_cache_gb=1e-6)
    prepare(squares.dataset(), squares, backbone, frozen=False, cache_dir=tmp_path, device=CPU, options=options)
    assert not list(tmp_path.iterdir())


def test_a_draw_gives_the_same_copies_in_any_order_of_batches(squares, backbone: Backbone, tmp_path: Path) -> None:
    options = InputOptions(augmentation=HISTOLOGY)
    inputs = prepare(
        squares.dataset().take(np.arange(6)),
        squares,
        backbone,
        frozen=False,
        cache_dir=tmp_path,
        device=CPU,
        options=options,
    ).inputs
    (plain,) = inputs.batches([np.arange(6)])
    (drawn,) = inputs.batches([np.arange(6)], Draw(0, 1))
    backwards = torch.cat(list(inputs.batches([np.array([5, 4]), np.array([3, 2, 1, 0])], Draw(0, 1)))).flip(0)
    (other,) = inputs.batches([np.arange(6)], Draw(0, 2))
    assert torch.equal(drawn, backwards)
    assert not torch.equal(drawn, other)
    assert not torch.equal(drawn, plain)


def test_cached_views_are_of_training_images_only_and_only_for_training(squares, backbone, tmp_path: Path) -> None:
    options = InputOptions(augmentation=HISTOLOGY, n_views=2)
    settings = {"frozen": True, "cache_dir": tmp_path, "device": CPU, "options": options}
    prepared = prepare(squares.dataset(), squares, backbone, **settings)
    inputs, rows = prepared.inputs, np.arange(len(prepared.dataset))
    assert isinstance(inputs, FeatureInputs)
    (plain,) = inputs.batches([rows])
    seen = torch.stack([next(inputs.batches([rows], Draw(0, epoch))) for epoch in range(30)])
    is_train = np.isin(rows, prepared.dataset.rows("train"))
    n_kinds = [len(seen[:, row].unique(dim=0)) for row in rows]
    assert {n for n, train_row in zip(n_kinds, is_train, strict=True) if not train_row} == {1}
    assert {n for n, train_row in zip(n_kinds, is_train, strict=True) if train_row} == {3}
    assert torch.equal(seen[0][~is_train], plain[~is_train])
    n_reads = squares.n_reads
    prepare(squares.dataset(), squares, backbone, **settings)
    assert squares.n_reads == n_reads


def test_features_too_large_for_the_memory_are_read_batch_by_batch(squares, backbone, tmp_path, monkeypatch) -> None:
    prepared = prepare(squares.dataset(), squares, backbone, frozen=True, cache_dir=tmp_path, device=CPU)
    inputs = prepared.inputs
    assert isinstance(inputs, FeatureInputs)
    (in_memory,) = inputs.batches([np.array([7, 2])])
    monkeypatch.setattr("model.data._IN_MEMORY_BYTES", 0)
    (mapped,) = FeatureInputs(inputs.stored, inputs.positions).batches([np.array([7, 2])])
    assert torch.equal(in_memory, mapped)


def test_an_image_that_becomes_unreadable_is_named(squares, backbone: Backbone, tmp_path: Path) -> None:
    gone: set[str] = set()

    def read(image_id: str) -> np.ndarray:
        if image_id in gone:
            raise ImageRejected(RejectReason.MISSING_FILE, "gone")
        return squares(image_id)

    prepared = prepare(squares.dataset(), read, backbone, frozen=False, cache_dir=tmp_path, device=CPU)
    gone.add(squares.ids[3])
    with pytest.raises(ImageRejected, match=r"became unreadable while training \(missing_file\)"):
        list(prepared.inputs.batches([np.array([2, 3])]))


def test_the_augmentation_of_a_frozen_backbone_is_said_to_do_nothing(squares, cache_dir: Path) -> None:
    config = TrainConfig(epochs=1, seeds=(0,), image_size_px=64, augmentation="auto")
    run = train(squares.dataset(), squares, config, cache_dir=cache_dir, modality="blood smear microscopy")
    assert run.prepared.augmentation.name == "microscopy"
    assert any("no effect on a frozen backbone" in warning for warning in run.warnings)
