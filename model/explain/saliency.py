"""Where in the image a class or a concept was seen: maps by the grad-cam package.

The network is cut at the last map with spatial cells: the backbone's final feature map for convolutional networks,
the input of the last block for vision transformers (behind it, only the class token reaches the classifier). The
image passes through the first part once; each class or concept then costs one pass through the small rest.
A standardised, frozen backbone needs nothing special: the rest holds its scaling, and gradients start at the cut.

A transformer's maps are read after the last block's first normalisation. Before it, gradient times activation is 0 for
every token, since the normalisation forgets a token's length: a map would be rounding errors.
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

from data_contracts.errors import ConfigurationError, InputRefused
from data_contracts.ports import Pixels
from model.network import Head

if TYPE_CHECKING:
    from model.predict import Classifier, Map, Prediction

METHODS = {
    "hires-cam": HiResCAM,
    "grad-cam": GradCAM,
    "grad-cam++": GradCAMPlusPlus,
    "layer-cam": LayerCAM,
    "xgrad-cam": XGradCAM,
}
"""By name, the most faithful first. Methods that give one map for all targets (eigen-cam) say nothing of a concept."""

DEFAULT_METHOD = "hires-cam"
"""Gradient times activation, cell by cell: what each cell contributes to a linear score (Draelos and Carin, 2020).
Behind an averaged map it equals grad-cam; where cells pass through another layer first, grad-cam's averaged
gradients can light cells that contribute nothing."""


Grids = npt.NDArray[np.float32]
"""(T, h, w) maps of T targets on the grid of the cut."""


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

    @property
    def seen(self) -> nn.Module:
        """The layer whose output maps are made of."""
        return self.backbone.blocks[-1].norm1 if _is_transformer(self.backbone) else self.cells

    def as_cells(self, seen: Tensor) -> Tensor:
        """(B, D, h, w) of the output of that layer, which holds prefix tokens too in a transformer."""
        if not _is_transformer(self.backbone):
            return seen
        n_prefix = int(self.backbone.num_prefix_tokens)
        return seen[:, n_prefix:].transpose(1, 2).unflatten(2, self.backbone.patch_embed.grid_size)

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


def class_map(classifier: Classifier, pixels: Pixels, class_name: str, *, method: str = DEFAULT_METHOD) -> Map:
    """(H, W) in [0, 1]: what speaks for the class in this image; all 0 where nothing does."""
    return _maps_of_one(classifier, pixels, [class_column(classifier, class_name)], method)[0]


def concept_maps(
    classifier: Classifier, pixels: Pixels, concept_ids: Sequence[str], *, method: str = DEFAULT_METHOD
) -> dict[str, Map]:
    """(H, W) in [0, 1] for each concept: what speaks for its presence in this image."""
    columns = [concept_column(classifier, c) for c in concept_ids]
    return dict(zip(concept_ids, _maps_of_one(classifier, pixels, columns, method), strict=True))


def with_maps(
    classifier: Classifier,
    images: Sequence[Pixels],
    predictions: Sequence[Prediction],
    n_concepts: int,
    method: str = DEFAULT_METHOD,
) -> list[Prediction]:
    """The predictions, each with its class's map and those of its leading concepts, at its image's size."""
    leading = [leading_concepts(p, n_concepts) for p in predictions]
    columns = [
        [class_column(classifier, p.class_name), *(concept_column(classifier, c) for c in ids)]
        for p, ids in zip(predictions, leading, strict=True)
    ]
    batch = torch.stack([classifier.backbone.preprocess(pixels) for pixels in images])
    found = []
    for pixels, prediction, ids, heat in zip(
        images, predictions, leading, grids(classifier, batch, columns, method), strict=True
    ):
        first, *others = (_at_size(one, pixels.shape[0], pixels.shape[1]) for one in heat)
        found.append(replace(prediction, class_map=first, concept_maps=dict(zip(ids, others, strict=True))))
    return found


def leading_concepts(prediction: Prediction, n_concepts: int) -> list[str]:
    """Ids of the concepts that are most surely present among those its rule asks for; without a rule, among all."""
    if prediction.rule is None:
        truth = {c: p for c, p in prediction.concept_probabilities.items() if p >= 0.5}
    else:
        truth = {t.concept_id: t.truth for t in prediction.rule.terms if t.present}
    return sorted(truth, key=lambda c: -truth[c])[:n_concepts]


def class_column(classifier: Classifier, class_name: str) -> int:
    """Column of a class in `Rest`'s output; raises `InputRefused` for a class the classifier does not know."""
    if class_name not in classifier.class_names:
        raise InputRefused(f"class: expected one of {', '.join(classifier.class_names)}, got {class_name!r}.")
    return classifier.class_names.index(class_name)


def concept_column(classifier: Classifier, concept_id: str) -> int:
    """Column of a concept in `Rest`'s output; raises `InputRefused` where the system predicts no concepts."""
    position = classifier.vocabulary.position(concept_id)
    if not classifier.has_concepts:
        raise InputRefused(
            f"concept {concept_id!r}: expected a system that predicts concepts, got one of the family "
            f"{classifier.config.family!r}, which has no map of any concept."
        )
    return len(classifier.class_names) + position


def grids(
    classifier: Classifier, images: Tensor, columns: Sequence[Sequence[int]], method: str = DEFAULT_METHOD
) -> list[Grids]:
    """For each of B preprocessed images (B, 3, S, S), the (T, h, w) maps of the columns asked of it, on the cut's grid.

    One pass through the backbone for the batch; each map costs one pass through the rest. A map is in [0, 1], its
    strongest cell at 1, and all 0 where nothing speaks for the target. Raises `ConfigurationError` for an unknown
    method, `InputRefused` where a map is not finite.
    """
    if method not in METHODS:
        raise ConfigurationError(f"saliency method: expected one of {', '.join(METHODS)}, got {method!r}.")
    network = classifier.image_network
    with torch.no_grad():
        at_cut = cut(network.backbone, images.to(classifier.device))
    counts = [len(asked) for asked in columns]
    h, w = at_cut.cells.shape[-2:]
    if sum(counts) == 0:
        return [np.zeros((0, h, w), np.float32) for _ in counts]
    repeats = torch.tensor(counts, device=at_cut.cells.device)
    prefix = None if at_cut.prefix is None else at_cut.prefix.repeat_interleave(repeats, dim=0)
    rest = Rest(network.backbone, network.head, prefix).eval()
    targets: Any = [_column(c) for asked in columns for c in asked]
    cells = at_cut.cells.repeat_interleave(repeats, dim=0).requires_grad_()
    # The package annotates its targets as modules and documents them as callables.
    with METHODS[method](model=rest, target_layers=[rest.seen], reshape_transform=rest.as_cells) as cam:
        maps: Grids = cam(input_tensor=cells, targets=targets)
    _require_finite(maps)
    return np.split(maps, np.cumsum(counts)[:-1])


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
    has_parts = all(hasattr(backbone, name) for name in ("blocks", "norm", "num_prefix_tokens", "patch_embed"))
    # timm's networks share these by habit, not by a type.
    return has_parts and hasattr(backbone.blocks[-1], "norm1")  # type: ignore[index]


def _channels_last(backbone: nn.Module) -> bool:
    """Swin and its kin give (B, h, w, D)."""
    return getattr(backbone, "output_fmt", "NCHW") == "NHWC"


def _maps_of_one(classifier: Classifier, pixels: Pixels, columns: Sequence[int], method: str) -> list[Map]:
    image = classifier.backbone.preprocess(pixels).unsqueeze(0)
    return [_at_size(one, pixels.shape[0], pixels.shape[1]) for one in grids(classifier, image, [columns], method)[0]]


def _require_finite(maps: Grids) -> None:
    if not np.isfinite(maps).all():
        raise InputRefused(
            f"maps: expected finite numbers, {int((~np.isfinite(maps)).any((1, 2)).sum())} of {len(maps)} maps hold "
            "NaN; no map was made.",
            remedy="The model's weights or its input are not finite: train again, with a lower train.learning_rate.",
        )


def _column(column: int) -> _Target:
    return lambda row: row[column]


def _at_size(cells: npt.NDArray[np.float32], height: int, width: int) -> Map:
    grid = torch.from_numpy(np.ascontiguousarray(cells, dtype=np.float32))[None, None]
    full = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)[0, 0]
    return full.clamp(0, 1).numpy()
