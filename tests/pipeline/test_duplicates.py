from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image, ImageEnhance, ImageFilter
from scipy.ndimage import gaussian_filter

from pipeline.decode import read_pixels
from pipeline.duplicates import (
    Clusters,
    NearDuplicateOptions,
    fingerprint,
    mark_exact,
    mark_near,
    near_duplicate_clusters,
    registered_correlation,
    reject_across_splits,
)

Pixels = npt.NDArray[np.uint8]


def scene(seed: int, side: int = 240) -> Pixels:
    """Smooth random blobs of colour: as unlike each other as photographs are."""
    noise = np.random.default_rng(seed).normal(size=(side, side, 3))
    blurred = gaussian_filter(noise, (9, 9, 0))
    low, high = blurred.min(), blurred.max()
    return ((blurred - low) / (high - low) * 255).astype(np.uint8)


def cell(seed: int, side: int = 240) -> Pixels:
    """A dark round body in the middle of a pale field: all alike, none the same."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    angle = np.arctan2(y, x)
    edge = 0.5 + sum(rng.normal(0, 0.05) * np.cos(k * angle + rng.uniform(0, 6)) for k in range(2, 7))
    texture = gaussian_filter(rng.normal(size=(side, side)), 6) * 120
    grey = np.where(np.hypot(x, y) < edge, 90 + texture, 220 + texture / 4)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream)


def stamped(image: Image.Image) -> Image.Image:
    copy = image.copy()
    copy.paste((255, 255, 255), (150, 60, 155, 65))
    return copy


VARIANTS = {
    "saved again": lambda i: jpeg(i, 30),
    "half the size": lambda i: i.resize((120, 120)),
    "cropped by two percent": lambda i: i.crop((3, 2, 237, 236)),
    "brighter": lambda i: ImageEnhance.Brightness(i).enhance(1.15),
    "more contrast": lambda i: ImageEnhance.Contrast(i).enhance(1.2),
    "blurred": lambda i: i.filter(ImageFilter.GaussianBlur(1.5)),
    "grey": lambda i: i.convert("L").convert("RGB"),
    "with an arrow": stamped,
}


@pytest.mark.parametrize("make", [scene, cell])
@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_are_found(make: type[object], variant: str) -> None:
    originals = [make(seed) for seed in range(6)]  # type: ignore[call-arg]
    copies = [np.asarray(VARIANTS[variant](Image.fromarray(p)).convert("RGB")) for p in originals]  # type: ignore[arg-type]
    clusters = near_duplicate_clusters([fingerprint(p) for p in [*originals, *copies]])  # type: ignore[list-item]
    np.testing.assert_array_equal(clusters, [*range(6), *range(6)])


@pytest.mark.parametrize("make", [scene, cell])
def test_merely_similar_images_are_not(make: type[object]) -> None:
    prints = [fingerprint(make(seed)) for seed in range(80)]  # type: ignore[call-arg,arg-type]
    np.testing.assert_array_equal(near_duplicate_clusters(prints), np.arange(80))


def test_clusters_are_transitive_and_named_by_their_first() -> None:
    base = Image.fromarray(scene(1))
    chain = [np.asarray(base.crop((k, k, 240, 240))) for k in (0, 4, 8, 12)]
    prints = [fingerprint(scene(2)), *map(fingerprint, chain), fingerprint(scene(3))]
    np.testing.assert_array_equal(near_duplicate_clusters(prints), [0, 1, 1, 1, 1, 5])


def test_flat_images_are_like_nothing() -> None:
    flat = [fingerprint(np.full((50, 50, 3), tone, np.uint8)) for tone in (0, 0, 255)]
    assert flat == [b"", b"", b""]
    np.testing.assert_array_equal(near_duplicate_clusters(flat), [0, 1, 2])


def test_near_search_can_be_switched_off() -> None:
    prints = [fingerprint(scene(1))] * 2
    np.testing.assert_array_equal(near_duplicate_clusters(prints), [0, 0])
    np.testing.assert_array_equal(near_duplicate_clusters(prints, NearDuplicateOptions(enabled=False)), [0, 1])


def test_registration_undoes_a_known_shift_and_stretch() -> None:
    from scipy.ndimage import map_coordinates

    image = gaussian_filter(np.random.default_rng(0).normal(size=(32, 32)), 2)
    y, x = np.mgrid[0:32, 0:32].astype(float)
    moved = map_coordinates(image, [y * 1.03 + 0.6, x * 0.98 - 0.4], order=1, mode="nearest") * 3 + 7
    assert np.corrcoef(image.ravel(), moved.ravel())[0, 1] < 0.97
    assert registered_correlation(image, moved) > 0.99


def test_union_find_against_reachability() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 40, (30, 2))
    clusters = Clusters(40)
    reach = np.eye(40, dtype=bool)
    for a, b in pairs:
        clusters.join(int(a), int(b))
        reach[a, b] = reach[b, a] = True
    for _ in range(6):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    np.testing.assert_array_equal([clusters.root(i) for i in range(40)], reach.argmax(axis=1))


def rows(*items: tuple[str, str, str | None, str | None]) -> pd.DataFrame:
    frame = pd.DataFrame(items, columns=["image_id", "path", "label", "split"])
    for name in ("rejected", "detail", "near_duplicate_of"):
        frame[name] = pd.Series(None, index=frame.index, dtype="str")
    return frame.astype({"label": "str", "split": "str"})


def test_one_copy_of_the_same_bytes_stays() -> None:
    marked = mark_exact(
        rows(("x", "1", "a", None), ("x", "2", "a", None), ("y", "3", "a", "train"), ("y", "4", "a", "test"),
             ("z", "5", None, None), ("z", "6", "b", None), ("w", "7", "a", None))
    )  # fmt: skip
    assert marked.loc[marked["rejected"] == "exact_duplicate", "path"].tolist() == ["2", "3", "5"]
    assert marked.loc[2, "detail"] == "same bytes as '4'"


def test_copies_with_two_labels_are_all_rejected() -> None:
    marked = mark_exact(rows(("x", "1", "a", None), ("x", "2", "b", None), ("y", "3", "a", None)))
    assert marked["rejected"].fillna("").tolist() == ["conflicting_labels", "conflicting_labels", ""]


def test_near_duplicates_across_splits_leave_the_test_image() -> None:
    frame = rows(("x", "1", "a", "train"), ("y", "2", "a", "test"), ("z", "3", "a", "val"), ("v", "4", "a", "val"),
                 ("u", "5", "a", "train"), ("t", "6", "b", "train"))  # fmt: skip
    frame["near_duplicate_of"] = pd.Series([None, "x", "x", None, "v", None], dtype="str")
    marked = reject_across_splits(frame)
    assert marked.loc[marked["rejected"].notna(), "path"].tolist() == ["1", "3", "5"]
    assert marked.loc[0, "detail"] == "near duplicate of '2', which is in test"


def test_marks_name_the_copy_that_stays() -> None:
    data = fingerprint(scene(1))
    frame = rows(("x", "1", "a", "train"), ("y", "2", "a", "test"), ("z", "3", "a", "train"))
    frame["fingerprint"] = [data, data, fingerprint(scene(2))]
    assert mark_near(frame)["near_duplicate_of"].fillna("").tolist() == ["y", "", ""]


def test_real_cells_are_not_near_duplicates_of_each_other(shared_data: Path) -> None:
    paths = sorted((shared_data / "wbcatt" / "images" / "lymphocyte").iterdir())[:150]
    prints = [fingerprint(read_pixels(path)) for path in paths]
    np.testing.assert_array_equal(near_duplicate_clusters(prints), np.arange(150))


def test_real_copies_in_two_classes_are_found_and_neighbouring_slices_are_not(shared_data: Path) -> None:
    images = shared_data / "covid-ct" / "images"
    copies = [
        ("covid/kjr-21-e24-p5-29.png", "non_covid/71%0.jpg"),
        ("covid/kjr-21-e24-p5-31.png", "non_covid/71%1.jpg"),
    ]
    slices = [("non_covid/1215.png", "non_covid/1216.png"), ("non_covid/6%0.jpg", "non_covid/6%1.jpg")]
    found = near_duplicate_clusters([fingerprint(read_pixels(images / p)) for pair in copies + slices for p in pair])
    np.testing.assert_array_equal(found, [0, 0, 2, 2, 4, 5, 6, 7])
    assert all(a <= b for a, b in pairwise(found))
