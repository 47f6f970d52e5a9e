"""Everything about training that a person can choose. Imports no torch: the command line reads it at start."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

EMBEDDED = "embedded"
"""Name of the backbone whose weights come with the installation."""

Logic = Literal["paper", "dcr"]
TNorm = Literal["godel", "product"]
Family = Literal["med-micn", "black-box", "concept-bottleneck", "rule-only"]


class TrainConfig(BaseModel):
    """Frozen training configuration; unknown keys and contradictions are refused on construction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Family = "med-micn"
    """Which network is trained; `medmicn compare` trains several."""
    logic: Logic = "paper"
    """`paper`: the published rule, polarity and relevance alone; `dcr`: the concept's truth value takes part."""
    t_norm: TNorm = "godel"
    """How truth values are joined: `godel` takes the smallest, `product` multiplies them."""

    backbone: str = Field(EMBEDDED, min_length=1)
    """`embedded` (EfficientNet-lite0, weights included) or any timm name, such as `resnet50`."""
    pretrained: bool = True
    """Start from published weights; false starts from random ones."""
    freeze_backbone: bool = True
    """Leave the backbone as it is and train on its cached features, the choice for a CPU; false fine-tunes it."""
    image_size_px: int = Field(224, ge=32, le=2048)
    """Side of the square that every image is resized to; nothing is cropped away."""

    embedding_size: int = Field(8, ge=1)
    """Length of one concept embedding."""
    temperature: float = Field(100.0, gt=0)
    """Softness of the choice of concepts in `dcr`; 100, as published, takes every concept, 1 the better half."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Fraction of the backbone's features that is hidden in each training step."""

    epochs: int = Field(30, ge=1)
    """Length of training; step sizes fall along a half cosine to 0 at its end."""
    first_candidate_fraction: float = Field(0.5, ge=0, lt=1)
    """The epoch that is kept is chosen on validation images, among those after this fraction of the training: the
    class layer is good after a few epochs, when most concepts have not been learnt yet."""
    patience: int = Field(10, ge=1)
    """Training stops after this many candidate epochs without a better validation result."""
    batch_size: int = Field(32, ge=1)
    """Images in one training step."""
    learning_rate: float = Field(1e-3, gt=0)
    """AdamW step size, at the start, of everything but the backbone."""
    backbone_learning_rate: float = Field(5e-5, gt=0)
    """AdamW step size, at the start, of the backbone when it is fine-tuned."""
    weight_decay: float = Field(1e-2, ge=0)
    """AdamW decoupled weight decay; biases and normalisation weights are not decayed."""
    lambda_concept: float = Field(1.0, ge=0)
    """Weight of the concept loss, λ1. The paper has 0.1; on frozen features 1 learns the concepts much better and the
    classes as well."""
    lambda_neural: float = Field(0.1, ge=0)
    """Weight of the rule's own classification loss, the paper's λ2."""
    class_weights: bool = True
    """Weigh every class equally in the loss, however few images it has."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """One network is trained for each seed; metrics are mean and standard deviation over them."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:N` or `mps`."""
    mixed_precision: bool = True
    """Half precision while fine-tuning on a GPU; no effect elsewhere."""
    decode_threads: int = Field(2, ge=1, le=64)
    """Threads that read images ahead of the network."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) != len(value) or min(value) < 0:
            raise ValueError(f"expected one or more different numbers, none negative, got {list(value)}")
        return value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        kind, _, number = value.partition(":")
        if not (value in {"auto", "cpu", "cuda", "mps"} or (kind == "cuda" and number.isdigit())):
            raise ValueError(f"expected 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps', got {value!r}")
        return value

    @model_validator(mode="after")
    def _cross_check(self) -> Self:
        if self.freeze_backbone and not self.pretrained:
            raise ValueError("pretrained = false with freeze_backbone = true would train on random features")
        return self
