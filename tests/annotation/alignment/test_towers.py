"""Dense features of every kind of tower, held against what open_clip itself computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from annotation.alignment.kinds import tower_kind
from annotation.alignment.tiles import Tiling
from annotation.alignment.towers import Aligner, load_aligner, require_faithful
from data_contracts.errors import ConfigurationError

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
TIMM_VIT = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
TIMM_CNN = {"image_size": 96, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}


def aligner_of(vision: dict[str, Any], kind: type[torch.nn.Module] = open_clip.CustomTextCLIP) -> Aligner:
    torch.manual_seed(0)
    model: Any = kind(embed_dim=24, vision_cfg=vision, text_cfg=TEXT).eval().requires_grad_(False)
    size = vision["image_size"]
    open_clip.model.set_model_preprocess_cfg(model, vars(open_clip.transform.PreprocessCfg(size=size)))
    return Aligner("tiny", model, open_clip.SimpleTokenizer(context_length=16))


def random_batch(aligner: Aligner, n: int = 2) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (n, *aligner.size_px, 3), dtype=np.uint8)


@pytest.mark.parametrize("vision", [VIT, RESNET, TIMM_VIT, TIMM_CNN], ids=["vit", "resnet", "timm_vit", "timm_cnn"])
def test_pooled_is_the_models_own_image_embedding(vision: dict[str, Any]) -> None:
    aligner = aligner_of(vision)
    batch = random_batch(aligner)
    dense = aligner.dense(batch)
    torch.testing.assert_close(dense.pooled, aligner.model.encode_image(aligner.normalised(batch)))
    assert dense.cells.shape[-1] == 24
    assert dense.cells.shape[1:3] == aligner.cell_shape[:2]


@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_vit_cells_are_open_clips_output_tokens_projected(pool: str) -> None:
    aligner = aligner_of({**VIT, "pool_type": pool, "output_tokens": True}, open_clip.CLIP)
    batch = random_batch(aligner)
    visual = aligner.model.visual
    _, tokens = visual(aligner.normalised(batch))
    expected = (tokens @ visual.proj).unflatten(1, (4, 4))
    visual.output_tokens = False
    torch.testing.assert_close(aligner.dense(batch).cells, expected)


def test_resnet_cells_recompose_the_attention_pool() -> None:
    aligner = aligner_of(RESNET)
    pool = aligner.model.visual.attnpool
    # With a blind query and no positions, attention is uniform: the pool is the mean of its projected values.
    for parameter in (pool.q_proj.weight, pool.q_proj.bias, pool.positional_embedding):
        parameter.zero_()
    dense = aligner.dense(random_batch(aligner))
    torch.testing.assert_close(dense.cells.mean((1, 2)), dense.pooled)
    assert dense.cells.std() > 0


def test_timm_tokens_are_read_behind_the_prefix_and_keep_their_places() -> None:
    aligner = aligner_of(TIMM_VIT)
    batch = random_batch(aligner)
    visual = aligner.model.visual
    out = visual.forward_intermediates(
        aligner.normalised(batch), indices=1, normalize_intermediates=True, output_fmt="NCHW"
    )
    expected = visual.head(out["image_intermediates"][0].permute(0, 2, 3, 1))
    torch.testing.assert_close(aligner.dense(batch).cells, expected)


def test_mean_of_average_pooled_cells_is_the_image_embedding() -> None:
    aligner = aligner_of(TIMM_CNN)
    batch = random_batch(aligner)
    own = aligner.model.encode_image(aligner.normalised(batch))
    torch.testing.assert_close(aligner.dense(batch).cells.mean((1, 2)), own, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("vision", "named"),
    [
        ({**VIT, "attentional_pool": True, "attn_pooler_heads": 2}, "attn_pool"),
        ({**VIT, "final_ln_after_pool": True}, "final_ln_after_pool"),
        ({**TIMM_VIT, "timm_pool": "avg"}, "'avg'"),
        ({**TIMM_VIT, "timm_proj": "mlp"}, "mlp"),
        ({**TIMM_CNN, "timm_pool": "max"}, "'max'"),
    ],
)
def test_other_towers_are_refused_by_name(vision: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be placed in the joint space") as caught:
        tower_kind(aligner_of(vision).model.visual, "tiny")
    assert named in str(caught.value)
    assert "'tiny'" in str(caught.value)


def test_layers_between_pooling_and_projection_are_found_out() -> None:
    vision = {**TIMM_CNN, "timm_model_name": "mobilenetv3_small_050", "image_size": 64}
    with pytest.raises(ConfigurationError, match="layers between the pooling and the projection"):
        require_faithful(aligner_of(vision))


def test_preprocessing_is_open_clips_with_the_whole_image_squashed_in() -> None:
    aligner = aligner_of(VIT)
    pixels = np.random.default_rng(2).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    config = open_clip.transform.PreprocessCfg(size=64, resize_mode="squash")
    transform: Any = open_clip.transform.image_transform_v2(config, is_train=False)
    expected = transform(Image.fromarray(pixels))[None]
    found = aligner.normalised(aligner.preprocess(pixels)[None])
    two_grey_levels = 2 / 255 / min(config.std)
    torch.testing.assert_close(found, expected, atol=1.01 * two_grey_levels, rtol=0)
    # An image of the tower's own size passes untouched, so this is exact.
    small = pixels[:64, :64]
    torch.testing.assert_close(
        aligner.normalised(aligner.preprocess(small)[None]), transform(Image.fromarray(small))[None]
    )


def test_text_rows_are_units_averaged_over_templates() -> None:
    aligner = aligner_of(VIT)
    rows = aligner.embed_text(["erythema", "scale"])
    own = [aligner.model.encode_text(aligner.tokenizer(["scale", "an image showing scale"]), True).mean(0)]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(rows[1], torch.nn.functional.normalize(own[0], dim=0).numpy(), rtol=1e-4, atol=1e-6)


def test_fingerprint_follows_the_weights() -> None:
    one, same, other = aligner_of(VIT), aligner_of(VIT), aligner_of(VIT)
    other.model.visual.proj.mul_(1.001)
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_local_dir_round_trip(tmp_path: Path) -> None:
    aligner = aligner_of(VIT, open_clip.CLIP)
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}, "preprocess_cfg": {"size": 64}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(aligner.model.state_dict(), tmp_path / "open_clip_model.safetensors")
    loaded = load_aligner(f"local-dir:{tmp_path}")
    batch = random_batch(aligner)
    torch.testing.assert_close(loaded.dense(batch).cells, aligner.dense(batch).cells)
    np.testing.assert_allclose(loaded.embed_text(["papule"]), aligner.embed_text(["papule"]), rtol=1e-5)
    assert loaded.fingerprint == aligner.fingerprint


def test_local_dir_without_weights_is_refused_not_random(tmp_path: Path) -> None:
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="could not be loaded"):
        load_aligner(f"local-dir:{tmp_path}")


def test_hub_model_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigurationError, match="local-dir:FOLDER") as caught:
        load_aligner("hf-hub:nobody/no-such-model")
    assert "text tower" in str(caught.value)
    assert "embedded" in str(caught.value)


@pytest.mark.parametrize(("spec", "named"), [("ViT-Z-1", "unknown name"), ("ViT-B-32", "no weights")])
def test_names_must_be_known_and_name_their_weights(spec: str, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        load_aligner(spec)


def test_value_features_of_a_vit_are_its_last_attention_attending_to_itself_only() -> None:
    aligner = replace(aligner_of(VIT, open_clip.CLIP), value_features=True)
    block = aligner.model.visual.transformer.resblocks[-1]
    caught: list[torch.Tensor] = []
    hook = block.register_forward_pre_hook(
        lambda _module, args, kwargs: caught.append(args[0] if args else kwargs["q_x"]), with_kwargs=True
    )
    found = aligner.dense(random_batch(aligner))
    hook.remove()
    tokens = block.ln_1(caught[0])[:, 1:]
    only_itself = torch.full((16, 16), float("-inf")).fill_diagonal_(0)
    values = block.attn(tokens, tokens, tokens, attn_mask=only_itself, need_weights=False)[0]
    expected = aligner.model.visual.ln_post(values) @ aligner.model.visual.proj
    torch.testing.assert_close(found.cells, expected.unflatten(1, (4, 4)))


def test_value_features_of_a_timm_vit_are_its_last_attention_attending_to_itself_only() -> None:
    aligner = replace(aligner_of(TIMM_VIT), value_features=True)
    trunk = aligner.model.visual.trunk
    caught: list[torch.Tensor] = []
    hook = trunk.blocks[-1].register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
    found = aligner.dense(random_batch(aligner))
    hook.remove()
    attention = trunk.blocks[-1].attn
    tokens = trunk.blocks[-1].norm1(caught[0])[:, trunk.num_prefix_tokens :]
    # Alone, a token attends to itself with weight 1: what comes out is its own value.
    alone = attention(tokens.flatten(0, 1)[:, None]).unflatten(0, tokens.shape[:2])[:, :, 0]
    expected = aligner.model.visual.head(trunk.fc_norm(trunk.norm(alone)))
    torch.testing.assert_close(found.cells.flatten(1, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("vision", "named"),
    [
        (RESNET, "kind modified_resnet"),
        (TIMM_CNN, "kind timm_average_cnn"),
        ({**VIT, "layers": 1}, "1 block"),
    ],
)
def test_value_features_are_refused_by_name_elsewhere(vision: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match="value_features") as caught:
        _ = replace(aligner_of(vision), value_features=True).kind
    assert named in str(caught.value)


def test_value_features_and_tiling_have_features_of_their_own_in_the_cache() -> None:
    aligner = aligner_of(VIT)
    tiled = replace(aligner, tiling=Tiling(2.0, 0.25, 4))
    values = replace(aligner, value_features=True)
    assert len({aligner.fingerprint, tiled.fingerprint, values.fingerprint}) == 3


def test_synonyms_are_averaged_as_units() -> None:
    aligner = aligner_of(VIT)
    found = aligner.embed_concepts([("scale", "flakes", "squame"), ("papule",)])
    rows = aligner.embed_text(["scale", "flakes", "squame", "papule"])
    mean = rows[:3].mean(0)
    np.testing.assert_allclose(found[0], mean / np.linalg.norm(mean), rtol=1e-5)
    np.testing.assert_allclose(found[1], rows[3], rtol=1e-5)


@pytest.mark.parametrize("vision", [VIT, RESNET, TIMM_VIT, TIMM_CNN], ids=["vit", "resnet", "timm_vit", "timm_cnn"])
def test_in_bfloat16_cells_are_nearly_the_same_and_come_back_as_float32(vision: dict[str, Any]) -> None:
    aligner = aligner_of(vision)
    half = replace(aligner, bfloat16=True)
    batch = random_batch(aligner)
    exact, rough = aligner.features(batch), half.features(batch)
    assert rough.cells.dtype == rough.pooled.dtype == torch.float32
    assert not torch.equal(exact.cells, rough.cells)
    assert torch.nn.functional.cosine_similarity(exact.cells, rough.cells, dim=-1).min() > 0.98
    assert aligner.fingerprint != half.fingerprint
