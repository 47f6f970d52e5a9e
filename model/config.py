"""Everything about training that a person can choose. Imports no torch: the command line reads it at start."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

EMBEDDED = "embedded"
"""Name of the backbone whose weights come with the installation."""

Logic = Literal["paper", "dcr"]
TNorm = Literal["godel", "product"]
Logger = Literal["none", "tensorboard", "mlflow"]
Family = Literal["med-micn", "black-box", "label-free-cbm", "sequential-cbm", "joint-cbm", "cem", "rule-only"]
Fusion = Literal["concat", "residual", "bottleneck"]


class TrainConfig(BaseModel):
    """Frozen training configuration; unknown keys and contradictions are refused on construction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Family = "med-micn"
    """Which network is trained; `medmicn compare` trains several."""
    logic: Logic = "paper"
    """`paper`: the published rule, polarity and relevance alone; `dcr`: the concept's truth value takes part."""
    t_norm: TNorm = "godel"
    """How truth values are joined: `godel` takes the smallest, `product` multiplies them."""
    fusion: Fusion = "concat"
    """What Med-MICN's class layer reads: `concat`, as published, features beside concepts, so that it may pass the
    concepts by; `bottleneck` concepts alone; `residual` concepts first, and features only for what those leave over."""
    side_dropout: float = Field(0.5, gt=0, lt=1)
    """With fusion `residual`: in training, the features' part is hidden for this fraction of the images, and the
    concepts learn to decide from those alone."""

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
    """Length of training; step sizes fall with every step along a half cosine to 0 at its end."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Epochs in which step sizes first rise in a straight line; worth one or two when a backbone is fine-tuned."""
    first_candidate_fraction: float = Field(0.5, ge=0, lt=1)
    """The epoch that is kept is chosen on validation images, among those after this fraction of the training: the
    class layer is good after a few epochs, when most concepts have not been learnt yet."""
    patience: int = Field(10, ge=1)
    """Training stops after this many candidate epochs without a better validation result."""
    batch_size: int = Field(32, ge=1)
    """Images in one training step, or in one part of it with `accumulate_steps`; of each process with `processes`."""
    accumulate_steps: int = Field(1, ge=1)
    """Batches whose gradients make one training step: the step of a large batch in the memory of a small one."""
    learning_rate: float = Field(1e-3, gt=0)
    """AdamW step size, at the start, of everything but the backbone."""
    backbone_learning_rate: float = Field(5e-5, gt=0)
    """AdamW step size, at the start, of the backbone when it is fine-tuned."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each block of the backbone has the step size of the one above it times this: 0.75 leaves the early ones nearly
    as they were."""
    weight_decay: float = Field(1e-2, ge=0)
    """AdamW decoupled weight decay; biases and normalisation weights are not decayed."""
    lambda_concept: float = Field(1.0, ge=0)
    """Weight of the concept loss, λ1. The paper has 0.1; on frozen features 1 learns the concepts much better and the
    classes as well."""
    lambda_neural: float = Field(0.1, ge=0)
    """Weight of the rule's own classification loss, the paper's λ2."""
    class_weights: bool = True
    """Weigh every class equally in the loss, however few images it has."""
    focal_gamma: float = Field(0.0, ge=0)
    """Focal loss: images whose class is already clear count (1 − p)^gamma times; 0 is plain cross-entropy, 2 usual."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Part of each class target that is spread over all classes."""
    randint_probability: float = Field(0.0, ge=0, le=1)
    """RandInt (Concept Embedding Models): in training, each known concept is replaced by its label this often, so that
    the classifier learns to follow corrections; 0.25 as published."""
    concept_dropout: float = Field(0.0, ge=0, lt=1)
    """In training, each concept is hidden this often: its probability becomes ½, which says nothing."""

    augmentation: str = Field("none", min_length=1)
    """Changes that training images go through: `none`, `auto` (what the words of `source.modality` allow; nothing is
    mirrored where left and right matter) or a name such as `chest-x-ray` or `histology`."""
    augmented_views: int = Field(0, ge=0, le=100)
    """With a frozen backbone: cached features of this many changed copies of each training image, for scarce labels;
    each costs one more pass through the backbone. A backbone that is fine-tuned sees a new copy in every epoch."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """One network is trained for each seed; metrics are mean and standard deviation over them."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:N` or `mps`."""
    mixed_precision: bool = True
    """Half precision while fine-tuning on a GPU; no effect elsewhere."""
    compile: bool = False
    """Let `torch.compile` write kernels for the network: minutes at the start, faster steps; needs a C++ compiler."""
    deterministic: bool = False
    """Only kernels that give the same bits every time, also on a GPU, where steps then take about 1.1 to 2 times as
    long; on a CPU results are the same bits anyway."""
    processes: int = Field(1, ge=1, le=64)
    """Processes of this machine that train together, one for each GPU; each takes `batch_size` images of a step."""
    save_every_s: float = Field(60.0, ge=0)
    """Seconds after which the state of the training is put on the disk; a killed run goes on from there."""
    logger: Logger = "none"
    """Also write the curves for `tensorboard` or `mlflow`; the package has to be installed."""
    pixel_cache_gb: float = Field(4.0, ge=0)
    """While a backbone is fine-tuned, resized images are kept on the disk if all of them fit in this, so that a file is
    decoded once and not in every epoch; 0: never."""
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
        if self.augmented_views and not self.freeze_backbone:
            raise ValueError(
                "augmented_views is for a frozen backbone; one that is fine-tuned needs augmentation alone"
            )
        if self.augmented_views and self.augmentation == "none":
            raise ValueError("augmented_views needs an augmentation: 'auto' or a name, got 'none'")
        if self.randint_probability + self.concept_dropout > 1:
            raise ValueError("expected randint_probability + concept_dropout up to 1: a concept is one or the other")
        return self
