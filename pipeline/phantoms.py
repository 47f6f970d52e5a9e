"""Synthetic lesion-like pictures with known concepts, for the demo and for tests.

A phantom is no medical image. Each class makes some concepts likelier than others and determines none of them; the
picture is then drawn from the concepts alone, under nuisance that has nothing to do with either: uneven light,
colour casts, skin tones, hairs, rulers, rotation, blur and noise. `truth.csv` holds what was drawn.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from data_contracts.files import write_bytes, write_text

Plane = npt.NDArray[np.float64]

PHANTOM_MODALITY = "synthetic skin lesion phantom, not a photograph"
"""The modality to run phantoms with."""

CLASS_NAMES = ("phantom A", "phantom B", "phantom C")

CONCEPT_RATES: Mapping[str, tuple[float, float, float]] = {
    "large-lesion": (0.25, 0.80, 0.40),
    "elongated-lesion": (0.80, 0.20, 0.20),
    "jagged-outline": (0.20, 0.80, 0.20),
    "dark-centre": (0.25, 0.25, 0.80),
    "speckled-texture": (0.80, 0.20, 0.25),
    "reddish-colour": (0.80, 0.20, 0.25),
    "blue-area-inside": (0.15, 0.80, 0.20),
    "separate-spots-around-it": (0.20, 0.25, 0.80),
    "blurred-edge": (0.20, 0.20, 0.80),
}
"""Known concept → how often it is present in each class. The keys are the columns of `truth.csv`, and the
`concept_id` under which the embedded endpoint proposes the same thing; whatever else it proposes has no known truth."""

TRUTH_FILE = "truth.csv"

_SKIN_TONES = ((0.93, 0.78, 0.69), (0.86, 0.68, 0.57), (0.76, 0.57, 0.45), (0.62, 0.44, 0.33))


@dataclass(frozen=True)
class Phantom:
    """One picture and what was drawn in it."""

    pixels: npt.NDArray[np.uint8]
    """(side, side, 3) RGB."""
    concepts: dict[str, bool]
    """Known concept → whether it was drawn."""


def make_phantoms(folder: Path, *, n_images: int = 300, seed: int = 0, side_px: int = 160) -> None:
    """Write `folder/images/<class>/*.png`, and `folder/truth.csv` with one 0/1 column for each known concept.

    Equal arguments give equal bytes. Images of a class are written in turn, so the classes are balanced.
    """
    rows: list[dict[str, str | int]] = []
    for number in range(n_images):
        class_index = number % len(CLASS_NAMES)
        class_name = CLASS_NAMES[class_index]
        phantom = draw_phantom(class_index, np.random.default_rng([seed, number]), side_px)
        path = f"images/{class_name}/synthetic-{number:04d}.png"
        write_bytes(folder / path, _png(phantom.pixels))
        rows.append({"path": path, **{name: int(value) for name, value in phantom.concepts.items()}})
    write_text(folder / TRUTH_FILE, _csv(rows))


def draw_phantom(class_index: int, random: np.random.Generator, side_px: int = 160) -> Phantom:
    """One phantom of a class: concepts drawn from the class, the picture drawn from the concepts."""
    concepts = {name: random.random() < rates[class_index] for name, rates in CONCEPT_RATES.items()}
    image = _skin(random, side_px)
    image = _lesion(image, concepts, random)
    for nuisance in (_hairs, _ruler, _light, _blur_and_noise):
        image = nuisance(image, random)
    return Phantom((np.clip(image, 0, 1) * 255).round().astype(np.uint8), concepts)


def _skin(random: np.random.Generator, side_px: int) -> Plane:
    """(side, side, 3) skin with a faint blotchy pattern."""
    light, dark = random.choice(len(_SKIN_TONES) - 1) + np.array([0, 1])
    mix = random.random()
    tone = mix * np.array(_SKIN_TONES[light]) + (1 - mix) * np.array(_SKIN_TONES[dark])
    return np.asarray(tone * (1 + 0.02 * _blotches(random, side_px, 0.05)[..., None]))


def _lesion(skin: Plane, concepts: Mapping[str, bool], random: np.random.Generator) -> Plane:
    """The skin with a lesion as the concepts ask."""
    side_px = len(skin)
    radius = side_px * (random.uniform(0.25, 0.30) if concepts["large-lesion"] else random.uniform(0.13, 0.17))
    distance = _outline_distance(side_px, radius, concepts, random)
    edge_px = radius * (random.uniform(0.28, 0.36) if concepts["blurred-edge"] else random.uniform(0.03, 0.07))
    inside = 1 / (1 + np.exp(np.clip(4 * distance / edge_px, -30, 30)))
    colour = _lesion_colour(skin, distance / radius, concepts, random)
    image = skin * (1 - inside[..., None]) + colour * inside[..., None]
    return _satellites(image, colour, distance, radius, random) if concepts["separate-spots-around-it"] else image


def _outline_distance(side_px: int, radius: float, concepts: Mapping[str, bool], random: np.random.Generator) -> Plane:
    """(side, side) pixels from the outline, negative inside: a turned ellipse, smooth or jagged."""
    centre = side_px / 2 + random.uniform(-0.06, 0.06, 2) * side_px
    y, x = np.mgrid[0:side_px, 0:side_px] - centre[:, None, None]
    turn = random.uniform(0, np.pi)
    along, across = x * np.cos(turn) + y * np.sin(turn), -x * np.sin(turn) + y * np.cos(turn)
    ratio = random.uniform(1.65, 2.1) if concepts["elongated-lesion"] else random.uniform(1.0, 1.18)
    angle = np.arctan2(across * np.sqrt(ratio), along / np.sqrt(ratio))
    depth = random.uniform(0.10, 0.15) if concepts["jagged-outline"] else random.uniform(0.0, 0.015)
    wave = sum(
        np.cos(k * angle + random.uniform(0, 2 * np.pi)) * random.uniform(0.6, 1.0) for k in random.integers(5, 12, 3)
    )
    return np.asarray(np.hypot(along / np.sqrt(ratio), across * np.sqrt(ratio)) - radius * (1 + depth * wave))


def _lesion_colour(skin: Plane, depth: Plane, concepts: Mapping[str, bool], random: np.random.Generator) -> Plane:
    """(side, side, 3) colour of the lesion at each place; `depth` is 0 at the outline and -1 in the middle."""
    side_px = len(skin)
    brown = np.array([0.66, 0.58, 0.52]) * random.uniform(0.92, 1.04)
    red = np.array([0.90, 0.52, 0.52]) * random.uniform(0.92, 1.04)
    colour = skin * (red if concepts["reddish-colour"] else brown)
    if concepts["dark-centre"]:
        middle = 1 / (1 + np.exp(12 * (depth + random.uniform(0.45, 0.55))))
        colour = colour * (1 - random.uniform(0.38, 0.48) * middle[..., None])
    if concepts["blue-area-inside"]:
        colour = _blue_area(colour, depth, random)
    strength = random.uniform(0.16, 0.22) if concepts["speckled-texture"] else random.uniform(0.0, 0.02)
    return np.asarray(colour * (1 + strength * _blotches(random, side_px, 0.008)[..., None]))


def _blue_area(colour: Plane, depth: Plane, random: np.random.Generator) -> Plane:
    """The colour with a blue-grey area on one side of the lesion."""
    side_px = len(colour)
    turn = random.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-0.5 : 0.5 : side_px * 1j, -0.5 : 0.5 : side_px * 1j]
    slope = (x * np.cos(turn) + y * np.sin(turn)) / 0.08 + _blotches(random, side_px, 0.06) * 0.4
    share = random.uniform(0.75, 0.9) / (1 + np.exp(-3 * slope)) * (depth < 0.2)
    blue = np.array([0.40, 0.44, 0.60]) * random.uniform(0.9, 1.1)
    return np.asarray(colour * (1 - share[..., None]) + blue * share[..., None])


def _satellites(image: Plane, colour: Plane, distance: Plane, radius: float, random: np.random.Generator) -> Plane:
    """The image with a few small spots of the lesion's colour near it."""
    side_px = len(image)
    spot_px = side_px * 0.028
    near = np.argwhere((distance > 3 * spot_px) & (distance < 3 * spot_px + 0.5 * radius))
    margin = 2 * spot_px
    near = near[((near > margin) & (near < side_px - margin)).all(axis=1)]
    tone = colour[distance < 0].mean(axis=0)
    y, x = np.mgrid[0:side_px, 0:side_px]
    for _ in range(int(random.integers(4, 8))):
        cy, cx = near[random.integers(len(near))]
        share = 1 / (1 + np.exp(1.5 * (np.hypot(y - cy, x - cx) - spot_px * random.uniform(0.9, 1.3))))
        image = image * (1 - share[..., None]) + tone * share[..., None]
    return image


def _hairs(image: Plane, random: np.random.Generator) -> Plane:
    """The image with a few thin dark curved hairs, on half of the images."""
    if random.random() < 0.5:
        return image
    side_px = len(image)
    shade = np.zeros((side_px, side_px))
    t = np.linspace(0, 1, 4 * side_px)[:, None]
    for _ in range(int(random.integers(2, 7))):
        start, bend, end = random.uniform(-0.1, 1.1, (3, 2)) * side_px
        points = ((1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end).round().astype(int)
        points = points[((points >= 0) & (points < side_px)).all(axis=1)]
        shade[points[:, 0], points[:, 1]] = 1
    shade = np.clip(ndimage.gaussian_filter(shade, 0.6) * 1.7, 0, 1)
    return np.asarray(image * (1 - 0.75 * shade[..., None]))


def _ruler(image: Plane, random: np.random.Generator) -> Plane:
    """The image with ruler marks along one edge, on a quarter of the images."""
    if random.random() < 0.75:
        return image
    marked = image.copy()
    every_px = int(random.integers(6, 10))
    for i, position in enumerate(range(3, len(image), every_px)):
        marked[: 9 if i % 5 == 0 else 5, position] = 0.15
    return np.rot90(marked, int(random.integers(4))).copy()


def _light(image: Plane, random: np.random.Generator) -> Plane:
    """The image under uneven light, a colour cast and another exposure."""
    side_px = len(image)
    turn = random.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-0.5 : 0.5 : side_px * 1j, -0.5 : 0.5 : side_px * 1j]
    slope = 1 + random.uniform(0, 0.22) * (x * np.cos(turn) + y * np.sin(turn))
    vignette = 1 - random.uniform(0, 0.15) * (x**2 + y**2) * 2
    cast = random.normal(1, 0.03, 3) * random.uniform(0.88, 1.06)
    return np.asarray(image * (slope * vignette)[..., None] * cast)


def _blur_and_noise(image: Plane, random: np.random.Generator) -> Plane:
    """The image as a camera takes it: slightly out of focus, with sensor noise."""
    sigma_px = random.uniform(0.3, 0.8)
    blurred = ndimage.gaussian_filter(image, (sigma_px, sigma_px, 0))
    return np.asarray(blurred + random.normal(0, random.uniform(0.006, 0.014), image.shape))


def _blotches(random: np.random.Generator, side_px: int, grain: float) -> Plane:
    """(side, side) smooth random pattern of zero mean and unit spread, with a grain relative to the side."""
    pattern = ndimage.gaussian_filter(random.normal(size=(side_px, side_px)), grain * side_px)
    return np.asarray((pattern - pattern.mean()) / pattern.std())


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=4)
    return stream.getvalue()


def _csv(rows: list[dict[str, str | int]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=["path", *CONCEPT_RATES], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
