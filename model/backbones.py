"""Backbones: the embedded one, whose weights come with the installation, and everything timm knows."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from data_contracts.embedded_weights import (
    LITE0_PACKAGE,
    LITE0_SHA256,
    LITE0_TIMM_NAME,
    lite0_to_timm,
    lite0_weights_path,
)
from data_contracts.errors import ConfigurationError
from data_contracts.ports import Pixels
from model.config import EMBEDDED

SUGGESTED: dict[str, str] = {
    EMBEDDED: "EfficientNet-lite0, ImageNet weights included, no network needed",
    "resnet50": "the paper's smallest backbone",
    "vgg19": "the paper's best backbone on DDI and chest X-ray",
    "densenet169": "the paper's best backbone on COVID-CT",
    "vit_small_patch14_dinov2.lvd142m": "self-supervised vision transformer, strong when frozen",
}
"""Backbones worth trying first. Any other timm name works too."""

_EMBEDDED_MEAN = _EMBEDDED_STD = (0.5, 0.5, 0.5)
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Preprocessing:
    """Pixels to network input: the whole image resized to a square, scaled to [0, 1], then standardised.

    Nothing is cropped away: what matters in a medical image may lie at its border.
    """

    size_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"

    def __call__(self, pixels: Pixels) -> Tensor:
        """(H, W, 3) uint8 → (3, size, size) float32."""
        return self.scale(self.resize(pixels))

    def scale(self, square: Pixels) -> Tensor:
        """(size, size, 3) uint8 → (3, size, size) float32, standardised."""
        scaled = (square.astype(np.float32) / 255 - np.asarray(self.mean, np.float32)) / np.asarray(
            self.std, np.float32
        )
        return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))

    def resize(self, pixels: Pixels) -> Pixels:
        """(H, W, 3) uint8 → (size, size, 3) uint8."""
        method = _RESAMPLING.get(self.interpolation, Image.Resampling.BICUBIC)
        return np.asarray(Image.fromarray(pixels).resize((self.size_px, self.size_px), method))


@dataclass(frozen=True)
class Backbone:
    """A timm model without its classifier, and what has to be known about it."""

    name: str
    """As configured."""
    module: nn.Module
    n_features: int
    """F, the length of the pooled feature vector."""
    preprocess: Preprocessing
    fingerprint: str
    """sha256 of the weights."""
    source: str
    """Where the weights come from, in words."""

    @property
    def size_px(self) -> int:
        """Side of the square input."""
        return self.preprocess.size_px

    @property
    def key(self) -> str:
        """sha256 of weights and preprocessing: features with another key are never mistaken for these."""
        described = [self.name, self.fingerprint, asdict(self.preprocess), self.n_features]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def build_backbone(name: str, *, size_px: int = 224, pretrained: bool = True) -> Backbone:
    """The backbone of this name, in evaluation mode and with gradients off.

    Args:
        name: `embedded` or a timm name.
        size_px: Side of the square input.
        pretrained: Load published weights; False leaves random ones, to be replaced from a checkpoint.

    Raises:
        ConfigurationError: unknown name, weights that cannot be had, or an image size the model cannot take.
    """
    module = _embedded_module(pretrained) if name == EMBEDDED else _timm_module(name, size_px, pretrained)
    module = module.eval().requires_grad_(False)
    n_features = _count_features(name, module, size_px)
    if name == EMBEDDED:
        preprocess = Preprocessing(size_px, _EMBEDDED_MEAN, _EMBEDDED_STD)
        fingerprint, source = LITE0_SHA256, f"package {LITE0_PACKAGE}, sha256 {LITE0_SHA256}"
    else:
        config = resolve_model_data_config(module)
        preprocess = Preprocessing(size_px, config["mean"], config["std"], str(config["interpolation"]))
        fingerprint, source = hash_of_weights(module), f"timm {_tagged(module, name)}"
    return Backbone(name, module, n_features, preprocess, fingerprint, source)


def _embedded_module(pretrained: bool) -> nn.Module:
    module: Any = timm.create_model(LITE0_TIMM_NAME)
    if pretrained:
        state = torch.load(lite0_weights_path(), map_location="cpu", weights_only=True)
        module.load_state_dict(lite0_to_timm(state), strict=True)
    module.reset_classifier(0)
    return module


def _timm_module(name: str, size_px: int, pretrained: bool) -> nn.Module:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "`timm.list_models()` shows the names."
        raise ConfigurationError(f"train.backbone: expected 'embedded' or a timm name, got {name!r}.", remedy=hint)
    options: dict[str, Any] = {"num_classes": 0}
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        options["img_size"] = size_px  # position embeddings are resampled to it
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except AssertionError as error:
        raise _refuse_size(name, size_px, error) from error
    except (OSError, RuntimeError) as error:
        raise ConfigurationError(
            f"train.backbone: the weights of {name!r} could not be had ({type(error).__name__}); nothing was trained.",
            remedy="They are downloaded once from a model hub: check the network or fill its cache on another "
            "machine, or use the backbone 'embedded', which needs no network.",
        ) from error


def _count_features(name: str, module: nn.Module, size_px: int) -> int:
    # Asked of the model itself: timm's attributes disagree with what some architectures return.
    try:
        with torch.inference_mode():
            features = module(torch.zeros(1, 3, size_px, size_px))
    except (AssertionError, RuntimeError) as error:
        raise _refuse_size(name, size_px, error) from error
    if features.ndim != 2:
        raise ConfigurationError(
            f"train.backbone: {name!r} gives features of shape {tuple(features.shape)}, expected (1, F).",
            remedy="Choose a backbone that pools its features.",
        )
    return int(features.shape[1])


def _refuse_size(name: str, size_px: int, error: Exception) -> ConfigurationError:
    first_line = str(error).strip().split("\n")[0][:200]
    return ConfigurationError(
        f"train.image_size_px: backbone {name!r} cannot take {size_px} px ({first_line}).",
        remedy="Patch-based backbones need a multiple of their patch size, such as 224.",
    )


def hash_of_weights(module: nn.Module) -> str:
    """Hex sha256 over names, shapes, types and bytes of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key}:{tuple(value.shape)}:{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tagged(module: nn.Module, name: str) -> str:
    config = getattr(module, "pretrained_cfg", {})
    return ".".join(filter(None, [config.get("architecture", name), config.get("tag", "")]))
