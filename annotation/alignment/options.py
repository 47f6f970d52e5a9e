"""What a person can choose about alignment."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from annotation.alignment.tiles import Tiling
from annotation.alignment.towers import EMBEDDED, TEMPLATES


class AlignOptions(BaseModel):
    """How images are aligned with concepts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = EMBEDDED
    """`embedded`, `hf-hub:ORG/NAME`, `local-dir:PATH`, or an open_clip name with its weights, NAME/WEIGHTS."""
    adapt: bool | None = None
    """Fit projections to the run's judgements. Null: only for the embedded model, which is nothing without them."""
    device: str = "cpu"
    """A torch device."""
    batch_size: int = Field(32, ge=1)
    """Images in one pass of the tower."""
    shard_size: int = Field(256, ge=1)
    """Images in one table of results."""
    n_decoders: int = Field(2, ge=1)
    """Threads that read and resize images while the tower works."""
    n_folds: int = Field(5, ge=2)
    """Parts of the cross-fit: every image is scored by heads fitted without its part."""
    seed: int = 0
    """Decides which group falls into which part."""
    max_fit_images: int = Field(8000, ge=1)
    """At most so many judged images are used to fit; more add little and cost memory."""
    max_cache_gb: float = Field(4.0, ge=0)
    """Disk space for cell features; what does not fit is computed again when heads are fitted anew."""
    templates: tuple[str, ...] = TEMPLATES
    """Prompt templates with one `{}`, averaged; the embedded model reads the bare concept."""

    value_features: bool = False
    """Read ViT towers by the values of their last attention (MaskCLIP): sharper maps; refused for other towers."""
    tile_above: float | None = Field(None, gt=1)
    """Images whose longer side exceeds so many times the tower's are looked at in tiles; null: never."""
    tile_overlap: float = Field(0.25, ge=0, le=0.5)
    """Share of a tile that its neighbour sees too."""
    max_tiles_per_side: int = Field(4, ge=2)
    """Larger images are scaled down to so many tiles: each tile costs one pass of the tower."""

    @property
    def tiling(self) -> Tiling | None:
        """How large images are cut, or None."""
        if self.tile_above is None:
            return None
        return Tiling(self.tile_above, self.tile_overlap, self.max_tiles_per_side)

    @property
    def adapts(self) -> bool:
        """Whether projections are fitted."""
        return self.model == EMBEDDED if self.adapt is None else self.adapt
