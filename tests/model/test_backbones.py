from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as T

from data_contracts.errors import ConfigurationError
from model.backbones import build_backbone


def test_the_embedded_features_are_the_ones_its_own_classifier_reads() -> None:
    backbone = build_backbone("embedded", size_px=64)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        pooled = backbone.module.forward_features(images).mean((2, 3))
        torch.testing.assert_close(backbone.module(images), pooled)
    assert backbone.n_features == 1280
    assert not any(p.requires_grad for p in backbone.module.parameters())


def test_preprocessing_agrees_with_torchvision() -> None:
    backbone = build_backbone("embedded", size_px=48)
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3)).astype(np.uint8)
    resized = T.resize(Image.fromarray(pixels), [48, 48], InterpolationMode.BICUBIC)
    expected = T.normalize(T.to_tensor(resized), [0.5] * 3, [0.5] * 3)
    torch.testing.assert_close(backbone.preprocess(pixels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet10t", "vgg11", "vit_tiny_patch16_224"])
def test_any_timm_backbone_says_how_many_features_it_gives(name: str) -> None:
    backbone = build_backbone(name, size_px=64, pretrained=False)
    with torch.no_grad():
        assert backbone.module(torch.zeros(1, 3, 64, 64)).shape == (1, backbone.n_features)


def test_the_key_depends_on_weights_and_preprocessing() -> None:
    one = build_backbone("embedded", size_px=64)
    assert one.key == build_backbone("embedded", size_px=64).key
    assert one.key != build_backbone("embedded", size_px=96).key
    torch.manual_seed(0)
    first = build_backbone("resnet10t", size_px=64, pretrained=False)
    assert first.key != build_backbone("resnet10t", size_px=64, pretrained=False).key


def test_an_unknown_name_is_refused_with_close_ones() -> None:
    with pytest.raises(ConfigurationError, match="resnet50"):
        build_backbone("resnet5O")


def test_weights_that_cannot_be_had_are_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_args: object, **_options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigurationError, match="embedded"):
        build_backbone("resnet18")


def test_an_image_size_a_transformer_cannot_take_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="image_size_px"):
        build_backbone("xcit_nano_12_p16_224", size_px=50, pretrained=False)
