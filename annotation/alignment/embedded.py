"""The embedded aligner: a real open_clip model from packages only, no network.

EfficientNet-lite0 (ImageNet weights) sees, MiniLM reads, and linear heads meet in 384 dimensions. The heads are
fitted on the run's own judgements (see `adapt`); until then the image head is random and its cosines mean nothing.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from open_clip import CustomTextCLIP
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg
from torch import nn

from annotation.alignment.projections import Projections
from annotation.alignment.towers import EMBEDDED, Aligner
from annotation.text import quiet_loading
from data_contracts.embedded_weights import LITE0_TIMM_NAME, lite0_to_timm, lite0_weights_path, minilm_folder

SIZE_PX = 224
JOINT_DIMENSIONS = 384
CONTEXT_LENGTH = 128
"""Tokens of a concept's text; a name with its definition is far shorter."""


def embedded_config() -> dict[str, Any]:
    """The embedded model as an open_clip configuration (`embed_dim`, `vision_cfg`, `text_cfg`)."""
    folder = str(minilm_folder())
    return {
        "embed_dim": JOINT_DIMENSIONS,
        "vision_cfg": {
            "timm_model_name": LITE0_TIMM_NAME,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "timm_proj_bias": True,
            "image_size": SIZE_PX,
        },
        "text_cfg": {
            "hf_model_name": folder,
            "hf_tokenizer_name": folder,
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "linear",
            "context_length": CONTEXT_LENGTH,
        },
    }


@cache
def build_embedded(*, device: str = "cpu") -> Aligner:
    """The embedded aligner, its heads not yet fitted; raises `ConfigurationError` when a package is missing."""
    with quiet_loading():
        model: Any = CustomTextCLIP(**embedded_config())
        tokenizer = HFTokenizer(str(minilm_folder()), context_length=CONTEXT_LENGTH)
    state = lite0_to_timm(torch.load(lite0_weights_path(), map_location="cpu", weights_only=True))
    model.visual.trunk.load_state_dict({k: v for k, v in state.items() if not k.startswith("classifier.")})
    # Fixed start values: two runs have the same fingerprint, and text starts in MiniLM's own space.
    nn.init.zeros_(model.visual.head.proj.weight)
    nn.init.zeros_(model.visual.head.proj.bias)
    nn.init.eye_(model.text.proj.weight)
    model.visual.preprocess_cfg = {**vars(PreprocessCfg(size=SIZE_PX, mean=(0.5,) * 3, std=(0.5,) * 3))}
    model.visual.preprocess_cfg["resize_mode"] = "squash"
    return Aligner(EMBEDDED, model.to(device).eval().requires_grad_(False), tokenizer, device, ("{}",))


def with_projections(aligner: Aligner, projections: Projections) -> Aligner:
    """The embedded aligner with fitted heads: a complete open_clip model of its own (one per fold)."""
    model = copy.deepcopy(aligner.model)
    for parameter, value in (
        (model.visual.head.proj.weight, projections.image_weight),
        (model.visual.head.proj.bias, projections.image_bias),
        (model.text.proj.weight, projections.text_weight),
    ):
        parameter.copy_(torch.as_tensor(value))
    return replace(aligner, model=model)
