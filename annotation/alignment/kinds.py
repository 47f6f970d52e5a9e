"""The families of open_clip image towers that can be read densely, and how each of them is read.

Recipes per family: the cells of the last layer, and the tower's own last projection applied to every cell.
Everything else (attention pooling, norms after pooling, deeper heads) is refused by name: there, a cell has no
place in the joint space of image and text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from data_contracts.errors import ConfigurationError


class Features(NamedTuple):
    """One batch before the tower's last projection."""

    cells: Tensor
    """(B, h, w, F) one feature vector a cell."""
    pooled: Tensor
    """(B, D) what the model's own `encode_image` returns."""


@dataclass(frozen=True)
class TowerKind:
    """How one family of image towers is read densely: cell features, then a projection of every cell."""

    name: str
    features: Callable[[Any, Tensor], Features]
    """(visual, (B, 3, H, W)) → cell features and the tower's own pooled embedding."""
    project: Callable[[Any, Tensor], Tensor]
    """(visual, (..., F)) → (..., D): the tower's last projection, applied to every cell."""


def _vit_features(visual: Any, batch: Tensor) -> Features:
    out = visual.forward_intermediates(batch, indices=1, normalize_intermediates=True, output_fmt="NLC")
    (tokens,) = out["image_intermediates"]  # (B, h*w, F) after ln_post
    height, width = (side // patch for side, patch in zip(batch.shape[-2:], visual.patch_size, strict=True))
    return Features(tokens.unflatten(1, (height, width)), out["image_features"])


def _vit_project(visual: Any, cells: Tensor) -> Tensor:
    return cells @ visual.proj


def _resnet_features(visual: Any, batch: Tensor) -> Features:
    out = visual.forward_intermediates(batch, indices=1)
    (grid,) = out["image_intermediates"]  # (B, F, h, w)
    return Features(grid.permute(0, 2, 3, 1), out["image_features"])


def _resnet_project(visual: Any, cells: Tensor) -> Tensor:
    pool = visual.attnpool
    return pool.c_proj(pool.v_proj(cells))


def _timm_tokens_features(visual: Any, batch: Tensor) -> Features:
    trunk = visual.trunk
    tokens = trunk.forward_features(batch)  # (B, prefix + h*w, F)
    grid = trunk.patch_embed.dynamic_feat_size(batch.shape[-2:])
    cells = trunk.fc_norm(tokens[:, trunk.num_prefix_tokens :]).unflatten(1, grid)
    return Features(cells, visual.head(trunk.forward_head(tokens)))


def _timm_average_features(visual: Any, batch: Tensor) -> Features:
    grid = visual.trunk.forward_features(batch)  # (B, F, h, w)
    return Features(grid.permute(0, 2, 3, 1), visual.head(visual.trunk.forward_head(grid)))


def _timm_project(visual: Any, cells: Tensor) -> Tensor:
    return visual.head(cells)


TOWER_KINDS: dict[str, TowerKind] = {
    kind.name: kind
    for kind in (
        TowerKind("vit", _vit_features, _vit_project),
        TowerKind("modified_resnet", _resnet_features, _resnet_project),
        TowerKind("timm_tokens", _timm_tokens_features, _timm_project),
        TowerKind("timm_average_cnn", _timm_average_features, _timm_project),
    )
}
"""Every family of image towers that can be read densely, by name."""


def tower_kind(visual: nn.Module, name: str) -> TowerKind:
    """The way to read `visual` densely; raises `ConfigurationError` naming what stands in the way."""
    kind, obstacle = "", f"image tower {type(visual).__name__}"
    if isinstance(visual, VisionTransformer):
        kind, obstacle = "vit", _vit_obstacle(visual)
    elif isinstance(visual, ModifiedResNet):
        kind, obstacle = "modified_resnet", ""
    elif isinstance(visual, TimmModel):
        kind, obstacle = _timm_kind(visual)
    if obstacle:
        raise unreadable(name, obstacle)
    return TOWER_KINDS[kind]


def unreadable(name: str, obstacle: str) -> ConfigurationError:
    """The refusal of aligner `name` because of `obstacle`."""
    return ConfigurationError(
        f"aligner {name!r}: expected an image tower of kind {', '.join(TOWER_KINDS)}, got {obstacle}; "
        "its cells cannot be placed in the joint space.",
        remedy="Choose a model with token or average pooling and a linear projection in [align] model.",
    )


def _vit_obstacle(visual: VisionTransformer) -> str:
    if visual.attn_pool is not None:
        return "attention pooling (attn_pool, as in CoCa)"
    if visual.final_ln_after_pool:
        return "final_ln_after_pool"
    return "" if visual.pool_type in {"tok", "avg"} else f"pool_type {visual.pool_type!r}"


def _timm_kind(visual: TimmModel) -> tuple[str, str]:
    """(kind, obstacle): one of the two is empty."""
    if set(dict(visual.head.named_children())) - {"drop", "proj"}:
        return "", f"the head {', '.join(dict(visual.head.named_children()))} of a timm tower"
    if not hasattr(visual.head, "proj"):
        return "", "a timm tower without a linear projection"
    pool = getattr(visual.trunk, "global_pool", None)
    if pool == "token" and hasattr(visual.trunk, "fc_norm") and hasattr(visual.trunk, "patch_embed"):
        return "timm_tokens", ""
    if getattr(pool, "pool_type", None) == "avg" and not hasattr(visual.trunk, "num_prefix_tokens"):
        return "timm_average_cnn", ""
    return "", f"timm pooling {getattr(pool, 'pool_type', pool)!r} of {type(visual.trunk).__name__}"
