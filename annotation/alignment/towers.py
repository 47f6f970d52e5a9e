"""The aligner: an open_clip model whose image tower can be read densely.

The mean of a tower's cells is its own image embedding only for average-pooling CNNs. Elsewhere the two
differ (cosine 0.1-0.6), so `Dense` keeps both and every number says which one it comes from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from annotation.alignment.kinds import Features, TowerKind, tower_kind, unreadable
from annotation.alignment.tiles import Layout, Tiling, canvas_px, cut
from data_contracts.errors import ConfigurationError
from data_contracts.ports import Pixels

TEMPLATES = ("{}", "an image showing {}")
"""Prompt templates; the text embedding is the mean of their unit embeddings."""

EMBEDDED = "embedded"

_RESIZING = "squash bicubic antialias"
"""How `Aligner.preprocess` works; part of the fingerprint, so change it with the method."""


class Dense(NamedTuple):
    """One batch in the joint space of image and text, not normalised."""

    cells: Tensor
    """(B, h, w, D) one embedding a cell."""
    pooled: Tensor
    """(B, D) what the model's own `encode_image` returns."""


@dataclass(frozen=True)
class Aligner:
    """An open_clip model that can be read densely."""

    name: str
    model: Any
    tokenizer: Callable[[list[str]], Tensor] = field(repr=False)
    device: str = "cpu"
    templates: tuple[str, ...] = TEMPLATES
    value_features: bool = False
    """Cells are the values of the last attention (MaskCLIP) rather than its output."""
    tiling: Tiling | None = None
    """How large images are cut; None: every image is squashed into one."""
    bfloat16: bool | None = None
    """Whether the image tower works in bfloat16 (autocast); None: on a GPU only."""

    @cached_property
    def kind(self) -> TowerKind:
        """How the image tower is read."""
        return tower_kind(self.model.visual, self.name, values=self.value_features)

    @cached_property
    def size_px(self) -> tuple[int, int]:
        """(height, width) of the tower's input."""
        size = self.model.visual.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @cached_property
    def cell_shape(self) -> tuple[int, int, int]:
        """(h, w, F) of one image's cell features."""
        blank = np.zeros((1, *self.size_px, 3), np.uint8)
        height, width, n_features = self.features(blank).cells.shape[1:]
        return height, width, n_features

    @cached_property
    def fingerprint(self) -> str:
        """Hash (hex) of the image tower's weights and input: what makes its features reusable."""
        digest = hashlib.sha256(repr((_RESIZING, self.kind.name, self.size_px, self._mean_and_std)).encode())
        if self.tiling is not None:
            digest.update(repr(self.tiling).encode())
        if self._is_half:
            digest.update(b"bfloat16")
        for key, tensor in sorted(self.model.visual.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def preprocess(self, pixels: Pixels) -> Pixels:
        """(H, W, 3) uint8 pixels at the tower's size, still uint8; safe to call from threads.

        The image is squashed rather than cropped, so that a heatmap always covers all of it.
        """
        return _resized(pixels, self.size_px)

    def tiles(self, pixels: Pixels) -> tuple[Layout, npt.NDArray[np.uint8]]:
        """Layout and (T, H, W, 3) preprocessed tiles; a single one unless the image is large and `tiling` is set."""
        whole = Layout(1, 1)
        layout = whole if self.tiling is None else self.tiling.layout(pixels.shape[:2], self.size_px)
        if self.tiling is None or layout == whole:
            return whole, self.preprocess(pixels)[None]
        grid = self.cell_shape[:2]
        overlap = self.tiling.overlap(grid)
        canvas = _resized(pixels, canvas_px(layout, overlap, grid, self.size_px))
        return layout, cut(canvas, layout, overlap, grid, self.size_px)

    def features(self, batch: npt.NDArray[np.uint8]) -> Features:
        """Cell features of (B, H, W, 3) preprocessed pixels, before the tower's last projection.

        Where the tower works in bfloat16, what comes back is float32 all the same.
        """
        with torch.inference_mode(), torch.autocast(self._device_type, torch.bfloat16, enabled=self._is_half):
            found = self.kind.features(self.model.visual, self.normalised(batch))
        return Features(found.cells.float(), found.pooled.float())

    def project(self, cells: Tensor) -> Tensor:
        """Cell features (..., F) in the joint space (..., D)."""
        with torch.inference_mode():
            return self.kind.project(self.model.visual, cells)

    def dense(self, batch: npt.NDArray[np.uint8]) -> Dense:
        """Cells and pooled embedding of (B, H, W, 3) preprocessed pixels in the joint space."""
        features = self.features(batch)
        return Dense(self.project(features.cells), features.pooled)

    def embed_text(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """(n, D) unit rows: each text in every template, the unit embeddings averaged."""
        with torch.inference_mode():
            rows = [
                self.model.encode_text(self.tokenizer([t.format(text) for t in self.templates]).to(self.device), True)
                for text in texts
            ]
            return F.normalize(torch.stack([row.mean(0) for row in rows]), dim=-1).cpu().numpy()

    def normalised(self, batch: npt.NDArray[np.uint8]) -> Tensor:
        """(B, H, W, 3) uint8 as the (B, 3, H, W) float tensor the model itself takes."""
        mean, std = self._mean_and_std
        # Permuted, not copied: the channels-last layout is also the faster one for convolutions.
        images = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2)
        return images.mul(1 / (255 * std)).sub_(mean / std)

    def embed_concepts(self, wordings: Sequence[Sequence[str]]) -> npt.NDArray[np.float32]:
        """(n, D) unit rows: the unit rows of each concept's wordings (its name and synonyms), averaged."""
        rows = self.embed_text([text for texts in wordings for text in texts])
        ends = np.cumsum([len(texts) for texts in wordings])
        means = np.stack([part.mean(0) for part in np.split(rows, ends[:-1])])
        return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)

    @cached_property
    def text_scale(self) -> float:
        """The factor of cosines in the model's own softmax over texts."""
        scale = getattr(self.model, "logit_scale", None)
        return 1.0 if scale is None else float(scale.exp())

    @property
    def _device_type(self) -> str:
        return torch.device(self.device).type

    @property
    def _is_half(self) -> bool:
        return self._device_type == "cuda" if self.bfloat16 is None else self.bfloat16

    @cached_property
    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        config = open_clip.transform.PreprocessCfg(**self.model.visual.preprocess_cfg)
        return tuple(torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (config.mean, config.std))  # type: ignore[return-value]


def load_aligner(
    spec: str,
    *,
    device: str = "cpu",
    templates: tuple[str, ...] = TEMPLATES,
    value_features: bool = False,
    tiling: Tiling | None = None,
) -> Aligner:
    """The aligner named by `spec`, ready for inference.

    Args:
        spec: `embedded`, `hf-hub:ORG/NAME`, `local-dir:PATH`, or an open_clip name with its weights,
            such as `ViT-B-32/laion2b_s34b_b79k`.
        device: A torch device.
        templates: Prompt templates with one `{}`.
        value_features: Read the values of the last attention (MaskCLIP); only vision transformers can be.
        tiling: How large images are cut; None: never.

    Raises:
        ConfigurationError: The model is unknown, not reachable, or has a tower that cannot be read densely.
    """
    if spec == EMBEDDED:
        from annotation.alignment.embedded import build_embedded  # noqa: PLC0415  (it imports this module)

        # Its own prompt templates stay; a kind that cannot be read as wanted is refused before any work.
        embedded = replace(build_embedded(device=device), value_features=value_features, tiling=tiling)
        require_faithful(embedded)
        return embedded
    name, weights = _split_spec(spec)
    try:
        model: Any = open_clip.create_model_from_pretrained(name, weights, device=device, return_transform=False)
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise _not_loaded(spec, error) from error
    model = model.eval().requires_grad_(False)
    aligner = Aligner(spec, model, tokenizer, device, templates, value_features, tiling)
    require_faithful(aligner)  # an unreadable tower is refused here, not in the middle of a run
    return aligner


def _resized(pixels: Pixels, size_px: tuple[int, int]) -> Pixels:
    """(H, W, 3) uint8 at the given (height, width)."""
    # Antialiased bicubic on bytes: within 2 grey levels of Pillow's, in a quarter of its time.
    writable = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
    image = F.interpolate(writable.permute(2, 0, 1)[None], size_px, mode="bicubic", antialias=True)[0]
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def require_faithful(aligner: Aligner) -> None:
    """Raise `ConfigurationError` unless the tower's cells stand where its own embedding does.

    For average pooling this is a number: the mean of the projected cells must be the image embedding. It is not
    where a trunk has more layers between its pooling and the projection (as MobileNetV3's).
    """
    if aligner.kind.name != "timm_average_cnn":
        return
    noise = np.random.default_rng(0).integers(0, 256, (1, *aligner.size_px, 3), dtype=np.uint8)
    try:
        with torch.inference_mode():  # in full precision, whatever the device: this is about equality
            cells, pooled = aligner.kind.features(aligner.model.visual, aligner.normalised(noise))
        gap = float((aligner.project(cells).mean((1, 2)) - pooled).abs().max() / pooled.abs().max().clamp_min(1e-12))
    except RuntimeError:  # shapes that do not even fit
        gap = float("inf")
    if gap > 1e-3:
        raise unreadable(aligner.name, "layers between the pooling and the projection of a timm trunk")


def _split_spec(spec: str) -> tuple[str, str | None]:
    """(open_clip model name, weights tag); raises `ConfigurationError` when the weights are not named."""
    if spec.startswith(("hf-hub:", "local-dir:")):
        return spec, None
    name, _, weights = spec.partition("/")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights in tags:
        return name, weights
    if name not in open_clip.list_models():
        raise ConfigurationError(
            f"aligner {spec!r}: expected embedded, hf-hub:…, local-dir:… or an open_clip name, got an unknown name.",
            remedy="`python -c 'import open_clip; print(open_clip.list_models())'` lists the names.",
        )
    raise ConfigurationError(
        f"aligner {spec!r}: expected NAME/WEIGHTS with weights from {{{', '.join(tags)}}}, got "
        f"{weights or 'no weights'!r}; labels must name the weights they come from.",
        remedy=f'Set [align] model = "{name}/{tags[-1]}".' if tags else "Choose a model with published weights.",
    )


def _not_loaded(spec: str, error: Exception) -> ConfigurationError:
    cause = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return ConfigurationError(
        f"aligner {spec!r}: could not be loaded ({cause}).",
        remedy="Offline, a model needs all its files on this machine: open_clip_config.json, the weights, the "
        "tokenizer and, when its text tower is a Hugging Face encoder (as BiomedCLIP's), that encoder's files too. "
        'Download them once with a network, point [align] model to "local-dir:FOLDER", or use "embedded", which '
        "needs none.",
    )
