"""Changes of training images that leave their finding as it is: a registry by modality.

Nothing is mirrored where left and right, or up and down, carry meaning; colour is left alone where it is the finding.
Every number comes from the generator that is handed in, so that an image looks the same whichever thread prepares it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transform

from data_contracts.errors import ConfigurationError


@dataclass(frozen=True)
class Augmentation:
    """Ranges that each number of a change is drawn from, and why they are right for a modality."""

    name: str
    why: str
    """A sentence for people."""
    words: tuple[str, ...] = ()
    """Any of them in the modality's own words chooses this one for `auto`."""
    mirrored: bool = False
    """Mirrored and turned by quarters: what the slide or the camera shows has no upper end."""
    rotation_degrees: float = 0.0
    shift_fraction: float = 0.0
    """Of the side."""
    scale_fraction: float = 0.0
    brightness: float = 0.0
    """Factor 1 ± this; likewise contrast and saturation."""
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """Part of the colour circle."""

    @property
    def changes_nothing(self) -> bool:
        """Whether images stay as they are."""
        return self.name == NONE

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """(3, S, S) uint8 → a changed copy of the same shape and type."""
        if self.changes_nothing:
            return image
        image = self._mirrored(image, rng)
        image = self._moved(image, rng)
        return self._recoloured(image, rng)

    def _mirrored(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        if not self.mirrored:
            return image
        if rng.random() < 0.5:
            image = image.flip(2)
        return torch.rot90(image, int(rng.integers(4)), (1, 2)).contiguous()

    def _moved(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        side = image.shape[-1]
        angle, dx, dy, scale = rng.uniform(-1, 1, 4) * (
            self.rotation_degrees,
            self.shift_fraction * side,
            self.shift_fraction * side,
            self.scale_fraction,
        )
        return transform.affine(
            image,
            angle=float(angle),
            translate=[float(dx), float(dy)],
            scale=1 + float(scale),
            shear=[0.0, 0.0],
            interpolation=transform.InterpolationMode.BILINEAR,
            fill=_border_colour(image),
        )

    def _recoloured(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        brightness, contrast, saturation, hue = rng.uniform(-1, 1, 4) * (
            self.brightness,
            self.contrast,
            self.saturation,
            self.hue,
        )
        if self.brightness:
            image = transform.adjust_brightness(image, 1 + float(brightness))
        if self.contrast:
            image = transform.adjust_contrast(image, 1 + float(contrast))
        if self.saturation:
            image = transform.adjust_saturation(image, 1 + float(saturation))
        return transform.adjust_hue(image, float(hue)) if self.hue else image

    def describe(self) -> dict[str, object]:
        """Name, reason and ranges, as JSON-ready data for the manifest."""
        ranges = ("rotation_degrees", "shift_fraction", "scale_fraction", "brightness", "contrast", "saturation", "hue")
        return {"name": self.name, "why": self.why, "mirrored": self.mirrored} | {k: getattr(self, k) for k in ranges}


NONE, AUTO, GENERAL = "none", "auto", "general"

_POSE = {"rotation_degrees": 7.0, "shift_fraction": 0.04, "scale_fraction": 0.06}
_FREE = {"rotation_degrees": 15.0, "shift_fraction": 0.05, "scale_fraction": 0.1}
_GREY = {"brightness": 0.1, "contrast": 0.1}

AUGMENTATIONS: dict[str, Augmentation] = {
    one.name: one
    for one in (
        Augmentation(NONE, "Images are trained on as they are."),
        Augmentation(
            "mammography",
            "Breasts are compared side by side: never mirrored; grey levels vary with the device.",
            ("mammogra", "tomosynthesis"),
            **_POSE,
            **_GREY,
        ),
        Augmentation(
            "chest-x-ray",
            "The heart is on the left: never mirrored; exposure varies.",
            ("x-ray", "xray", "x ray", "radiograph", "cxr"),
            **_POSE,
            **_GREY,
        ),
        Augmentation(
            "fundus",
            "Disc and macula tell the right eye from the left: never mirrored; lamps differ in brightness.",
            ("fundus", "retina", "retinal", "ophthalmosc"),
            **_POSE,
            **_GREY,
        ),
        Augmentation(
            "oct",
            "Layers lie from top to bottom and the scan knows its side: never mirrored.",
            ("optical coherence", "oct"),
            rotation_degrees=5.0,
            shift_fraction=0.04,
            scale_fraction=0.05,
            **_GREY,
        ),
        Augmentation(
            "ct",
            "Organs have a side: never mirrored; windows differ a little.",
            ("ct", "computed tomography", "pet"),
            **_POSE,
            **_GREY,
        ),
        Augmentation(
            "mri",
            "Organs have a side: never mirrored; intensities have no unit.",
            ("mri", "mr", "magnetic"),
            **_POSE,
            brightness=0.15,
            contrast=0.15,
        ),
        Augmentation(
            "ultrasound",
            "The probe is at the top and its marker at one side: never mirrored; gain varies.",
            ("ultrasound", "sonogra", "echocardio"),
            rotation_degrees=5.0,
            shift_fraction=0.04,
            scale_fraction=0.06,
            brightness=0.15,
            contrast=0.15,
        ),
        Augmentation(
            "endoscopy",
            "The camera turns freely: mirrored and turned; colour is a finding and stays.",
            ("endoscop", "colonoscop", "gastroscop", "laparoscop"),
            mirrored=True,
            **_FREE,
            brightness=0.15,
        ),
        Augmentation(
            "skin",
            "A lesion has no upper end: mirrored and turned; its colour is the finding and stays.",
            ("skin", "derm", "lesion photograph"),
            mirrored=True,
            **_FREE,
            brightness=0.1,
        ),
        Augmentation(
            "histology",
            "Tissue lies on the slide as it fell: mirrored and turned; stains differ a little between laboratories.",
            ("histolog", "histopatholog", "patholog", "biopsy", "h&e"),
            mirrored=True,
            **_FREE,
            **_GREY,
            saturation=0.1,
            hue=0.02,
        ),
        Augmentation(
            "microscopy",
            "Cells have no upper end: mirrored and turned; the stain's colour is the finding and stays.",
            ("blood smear", "smear", "microscop", "cytolog", "bone marrow"),
            mirrored=True,
            **_FREE,
            brightness=0.1,
        ),
        Augmentation(
            GENERAL,
            "Nothing is known of the modality: moved and brightened a little, never mirrored or recoloured.",
            rotation_degrees=5.0,
            shift_fraction=0.04,
            scale_fraction=0.05,
            brightness=0.1,
        ),
    )
}
"""All of them by name; `auto` takes the first whose words are in the modality, in this order, else `general`."""


def augmentation_for(name: str, modality: str) -> Augmentation:
    """The augmentation of that name, or with `auto` the one for the modality; raises `ConfigurationError`."""
    if name == AUTO:
        return next((one for one in AUGMENTATIONS.values() if _fits(one, modality)), AUGMENTATIONS[GENERAL])
    if name not in AUGMENTATIONS:
        close = difflib.get_close_matches(name, AUGMENTATIONS, n=1)
        raise ConfigurationError(
            f"train.augmentation: expected {AUTO} or one of {', '.join(AUGMENTATIONS)}, got {name!r}; nothing was "
            "trained.",
            remedy=f"Did you mean {close[0]}?" if close else None,
        )
    return AUGMENTATIONS[name]


def _fits(augmentation: Augmentation, modality: str) -> bool:
    """A short word must stand alone ("ct", not "fracture"); a long one may begin a longer one ("dermoscopy")."""
    text = " " + " ".join(modality.lower().replace("/", " ").replace(",", " ").split()) + " "
    return any(f" {word} " in text if len(word) <= 3 else f" {word}" in text for word in augmentation.words)


def _border_colour(image: Tensor) -> list[float]:
    """Mean colour of the image's edge: what a shift uncovers looks like more of the same background."""
    edge = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1)
    return edge.float().mean(1).tolist()
