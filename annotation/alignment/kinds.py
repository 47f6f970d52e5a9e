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
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

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


def _vit_value_features(visual: Any, batch: Tensor) -> Features:
    """MaskCLIP (Zhou et al., 2022): the last block's values, which keep their place, before attention mixes them."""
    out = visual.forward_intermediates(batch, indices=2, output_fmt="NLC")
    tokens = out["image_intermediates"][0]  # (B, h*w, F) as they enter the last block
    block = visual.transformer.resblocks[-1]
    attention = block.attn
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)[2]
    values = F.linear(block.ln_1(tokens), attention.in_proj_weight.chunk(3)[2], bias)
    cells = visual.ln_post(attention.out_proj(values))
    height, width = (side // patch for side, patch in zip(batch.shape[-2:], visual.patch_size, strict=True))
    return Features(cells.unflatten(1, (height, width)), out["image_features"])


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


def _timm_token_value_features(visual: Any, batch: Tensor) -> Features:
    """`_vit_value_features` for timm's vision transformers."""
    trunk = visual.trunk
    last, intermediates = trunk.forward_intermediates(batch, indices=2, output_fmt="NLC")
    tokens = intermediates[0]  # (B, h*w, F), prefix tokens already taken off
    block = trunk.blocks[-1]
    attention = block.attn
    bias = None if attention.qkv.bias is None else attention.qkv.bias.chunk(3)[2]
    values = F.linear(block.norm1(tokens), attention.qkv.weight.chunk(3)[2], bias)
    cells = trunk.fc_norm(trunk.norm(attention.proj(values)))
    grid = trunk.patch_embed.dynamic_feat_size(batch.shape[-2:])
    return Features(cells.unflatten(1, grid), visual.head(trunk.forward_head(last)))


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

VALUE_KINDS: dict[str, TowerKind] = {
    "vit": TowerKind("vit_values", _vit_value_features, _vit_project),
    "timm_tokens": TowerKind("timm_token_values", _timm_token_value_features, _timm_project),
}
"""The families that can also be read by the values of their last attention (MaskCLIP)."""


def tower_kind(visual: nn.Module, name: str, *, values: bool = False) -> TowerKind:
    """The way to read `visual` densely; raises `ConfigurationError` naming what stands in the way.

    Args:
        visual: An open_clip image tower.
        name: The aligner's name, for messages.
        values: Read the values of the last attention instead of its output (MaskCLIP).
    """
    kind, obstacle = "", f"image tower {type(visual).__name__}"
    if isinstance(visual, VisionTransformer):
        kind, obstacle = "vit", _vit_obstacle(visual)
    elif isinstance(visual, ModifiedResNet):
        kind, obstacle = "modified_resnet", ""
    elif isinstance(visual, TimmModel):
        kind, obstacle = _timm_kind(visual)
    if obstacle:
        raise unreadable(name, obstacle)
    if not values:
        return TOWER_KINDS[kind]
    obstacle = _value_obstacle(visual, kind)
    if obstacle:
        raise ConfigurationError(
            f"aligner {name!r}: value_features (MaskCLIP) expected a vision transformer of kind "
            f"{', '.join(VALUE_KINDS)}, got {obstacle}; nothing was aligned.",
            remedy="Set [align] value_features = false, or choose a model with a ViT image tower.",
        )
    return VALUE_KINDS[kind]


def unreadable(name: str, obstacle: str) -> ConfigurationError:
    """The refusal of aligner `name` because of `obstacle`."""
    return ConfigurationError(
        f"aligner {name!r}: expected an image tower of kind {', '.join(TOWER_KINDS)}, got {obstacle}; "
        "its cells cannot be placed in the joint space.",
        remedy="Choose a model with token or average pooling and a linear projection in [align] model.",
    )


def _value_obstacle(visual: Any, kind: str) -> str:
    """What keeps the tower from being read by its last attention's values; empty if nothing does."""
    if kind not in VALUE_KINDS:
        return f"the kind {kind}, which has no such attention"
    blocks = visual.transformer.resblocks if kind == "vit" else getattr(visual.trunk, "blocks", ())
    if len(blocks) < 2:
        return f"a transformer of {len(blocks)} block(s)"
    block = blocks[-1]
    attention = getattr(block, "attn", None)
    plain = (
        isinstance(block, ResidualAttentionBlock) and isinstance(attention, nn.MultiheadAttention)
        if kind == "vit"
        else isinstance(getattr(attention, "qkv", None), nn.Linear) and hasattr(block, "norm1")
    )
    return "" if plain else f"blocks of type {type(block).__name__} with attention {type(attention).__name__}"


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
