"""Where in the image a class or a concept was seen: maps by the grad-cam package.

The network is cut at the last map with spatial cells: the backbone's final feature map for convolutional networks,
the input of the last block for vision transformers (behind it, only the class token reaches the classifier). The
image passes through the first part once; each class or concept then costs one pass through the small rest.
A standardised, frozen backbone needs nothing special: the rest holds its scaling, and gradients start at the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM
from torch import Tensor, nn
from torch.nn import functional as F

from data_contracts.errors import ConfigurationError
from data_contracts.ports import Pixels
from model.network import Head

if TYPE_CHECKING:
    from model.predict import Classifier, Map, Prediction

METHODS = {
    "grad-cam": GradCAM,
    "grad-cam++": GradCAMPlusPlus,
    "hires-cam": HiResCAM,
    "layer-cam": LayerCAM,
    "xgrad-cam": XGradCAM,
}
"""By name; for a backbone that averages its map before a linear layer, grad-cam and hires-cam are the same."""


class Cut(NamedTuple):
    """One batch of images at the cut."""

    cells: Tensor
    """(B, D, h, w)"""
    prefix: Tensor | None
    """(B, P, D) class and register tokens of a transformer."""


class Rest(nn.Module):
    """What follows the cut: cells → [class logits, concept logits] as one row."""

    def __init__(self, backbone: nn.Module, head: Head, prefix: Tensor | None) -> None:
        """Join the backbone's end and a head."""
        super().__init__()
        # timm's networks share these methods by habit, not by a type.
        self.backbone: Any = backbone
        self.head, self.prefix = head, prefix
        self.cells = nn.Identity()

    def forward(self, cells: Tensor) -> Tensor:
        """(B, D, h, w) → (B, C + K)."""
        output = self.head(self.pooled(self.cells(cells)))
        concepts: list[Tensor] = [] if output.concepts is None else [output.concepts.logits]
        return torch.cat([output.class_logits, *concepts], dim=1)

    def pooled(self, cells: Tensor) -> Tensor:
        """(B, D, h, w) → features (B, F)."""
        if _is_transformer(self.backbone):
            tokens = cells.flatten(2).transpose(1, 2)
            if self.prefix is not None:
                tokens = torch.cat([self.prefix.expand(len(cells), -1, -1), tokens], dim=1)
            return self.backbone.forward_head(self.backbone.norm(self.backbone.blocks[-1](tokens)))
        if _channels_last(self.backbone):
            cells = cells.permute(0, 2, 3, 1)
        return self.backbone.forward_head(cells)


class _Target(Protocol):
    def __call__(self, row: Tensor) -> Tensor: ...


def class_map(classifier: Classifier, pixels: Pixels, class_name: str, *, method: str = "grad-cam") -> Map:
    """(H, W) in [0, 1]: what speaks for the class in this image; all 0 where nothing does."""
    return _maps(classifier, pixels, [classifier.class_names.index(class_name)], method)[0]


def concept_maps(
    classifier: Classifier, pixels: Pixels, concept_ids: Sequence[str], *, method: str = "grad-cam"
) -> dict[str, Map]:
    """(H, W) in [0, 1] for each concept: what speaks for its presence in this image."""
    if not concept_ids:
        return {}
    columns = [len(classifier.class_names) + classifier.vocabulary.position(c) for c in concept_ids]
    return dict(zip(concept_ids, _maps(classifier, pixels, columns, method), strict=True))


def with_maps(classifier: Classifier, pixels: Pixels, prediction: Prediction, n_concepts: int) -> Prediction:
    """The prediction with its class's map, and those of the concepts that are most surely present in its rule."""
    terms = () if prediction.rule is None else prediction.rule.terms
    asked = [t for t in terms if t.present]
    leading = [t.concept_id for t in sorted(asked, key=lambda t: -t.truth)[:n_concepts]]
    return replace(
        prediction,
        class_map=class_map(classifier, pixels, prediction.class_name),
        concept_maps=concept_maps(classifier, pixels, leading),
    )


def overlay(pixels: Pixels, saliency: Map, *, strength: float = 0.45) -> Pixels:
    """(H, W, 3) uint8: the image with the map in colour over it; where the map is 0 the image is unchanged."""
    colours = matplotlib.colormaps["inferno"](saliency)[..., :3] * 255
    weight = (strength * saliency)[..., None]
    return np.clip(np.rint(pixels * (1 - weight) + colours * weight), 0, 255).astype(np.uint8)


def cut(backbone: Any, images: Tensor) -> Cut:
    """The images (B, 3, S, S) at the cut; raises `ConfigurationError` for a backbone without a grid of cells."""
    if _is_transformer(backbone):
        return _cut_transformer(backbone, images)
    cells = backbone.forward_features(images) if hasattr(backbone, "forward_features") else None
    if cells is None or cells.ndim != 4:
        raise ConfigurationError(
            f"maps: backbone {type(backbone).__name__} has no final grid of cells, which saliency maps need.",
            remedy="Choose a convolutional network or a vision transformer with patch tokens; all else works without.",
        )
    return Cut(cells.permute(0, 3, 1, 2) if _channels_last(backbone) else cells, None)


def _cut_transformer(backbone: Any, images: Tensor) -> Cut:
    seen: list[Tensor] = []

    def see(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    handle = backbone.blocks[-1].register_forward_pre_hook(see)
    try:
        backbone.forward_features(images)
    finally:
        handle.remove()
    tokens = seen[0]  # (B, P + h·w, D)
    n_prefix = int(backbone.num_prefix_tokens)
    h, w = backbone.patch_embed.grid_size
    cells = tokens[:, n_prefix:].transpose(1, 2).unflatten(2, (h, w))
    return Cut(cells, tokens[:, :n_prefix] if n_prefix else None)


def _is_transformer(backbone: nn.Module) -> bool:
    return all(hasattr(backbone, name) for name in ("blocks", "norm", "num_prefix_tokens", "patch_embed"))


def _channels_last(backbone: nn.Module) -> bool:
    """Swin and its kin give (B, h, w, D)."""
    return getattr(backbone, "output_fmt", "NCHW") == "NHWC"


def _maps(classifier: Classifier, pixels: Pixels, columns: Sequence[int], method: str) -> list[Map]:
    if method not in METHODS:
        raise ConfigurationError(f"saliency method: expected one of {', '.join(METHODS)}, got {method!r}.")
    network = classifier.image_network
    image = classifier.backbone.preprocess(pixels).unsqueeze(0).to(classifier.device)
    with torch.no_grad():
        at_cut = cut(network.backbone, image)
    rest = Rest(network.backbone, network.head, at_cut.prefix).eval()
    targets: Any = [_column(c) for c in columns]
    cells = at_cut.cells.expand(len(columns), -1, -1, -1).clone().requires_grad_()
    # The package annotates its targets as modules and documents them as callables.
    with METHODS[method](model=rest, target_layers=[rest.cells]) as cam:
        maps: npt.NDArray[np.float32] = cam(input_tensor=cells, targets=targets)
    return [_at_size(one, pixels.shape[0], pixels.shape[1]) for one in maps]


def _column(column: int) -> _Target:
    return lambda row: row[column]


def _at_size(cells: npt.NDArray[np.float32], height: int, width: int) -> Map:
    grid = torch.from_numpy(np.ascontiguousarray(cells, dtype=np.float32))[None, None]
    full = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)[0, 0]
    return full.clamp(0, 1).numpy()
