from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage, stats
from skimage.color import rgb2gray

from data_contracts.tables import ALIGNMENT, LABELS
from model.intervals import holm as holm_of_the_model_room
from pipeline.drift import (
    IMAGE_STATISTICS,
    DriftOptions,
    compare,
    concept_measurements,
    holm,
    image_statistics,
    two_proportions,
)


def table(n: int, seed: int, **shift: float) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"image_id": [f"{seed}-{i}" for i in range(n)]})
    for name in ("brightness_fraction", "sharpness_log10", "disagreement", "similarity:red"):
        frame[name] = rng.normal(shift.get(name, 0.0), 1.0, n)
    for name in ("present:red", "present:round"):
        frame[name] = (rng.random(n) < 0.4 + shift.get(name, 0.0)).astype(float)
    frame["format"] = "png"
    frame["label"] = rng.choice(["a", "b"], n)
    return frame


def fired(found: pd.DataFrame) -> set[tuple[str, str]]:
    return set(found.loc[found["fires"], ["kind", "quantity"]].itertuples(index=False, name=None))


def test_statistics_of_an_image_are_those_of_other_libraries() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    found = image_statistics(pixels)
    assert tuple(found) == IMAGE_STATISTICS
    # Rec. 601 weights, where scikit-image has Rec. 709.
    luma = pixels @ np.array([0.299, 0.587, 0.114]) / 255
    assert found["brightness_fraction"] == pytest.approx(luma.mean(), abs=1e-6)
    assert found["brightness_fraction"] == pytest.approx(rgb2gray(pixels).mean(), abs=0.02)
    assert found["contrast_fraction"] == pytest.approx(luma.std(), abs=1e-6)
    assert found["red_excess_fraction"] == pytest.approx(pixels[..., 0].mean() / 255 - luma.mean(), abs=1e-6)
    assert 10 ** found["sharpness_log10"] == pytest.approx(ndimage.laplace(luma)[1:-1, 1:-1].var(), rel=1e-3)
    assert found["pixels_log10"] == pytest.approx(np.log10(2400))
    assert found["aspect_ratio"] == pytest.approx(1.5)


def test_a_blurred_image_is_less_sharp_and_a_flat_or_tiny_one_has_a_number() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    blurred = ndimage.gaussian_filter(pixels, (2, 2, 0))
    assert image_statistics(blurred)["sharpness_log10"] < image_statistics(pixels)["sharpness_log10"] - 1
    for flat in (np.full((9, 9, 3), 7, np.uint8), np.zeros((1, 2, 3), np.uint8)):
        assert all(np.isfinite(value) for value in image_statistics(flat).values())


def test_p_values_are_those_of_scipy() -> None:
    old, new = table(200, 1), table(150, 2, sharpness_log10=0.5)
    found = compare(old, new).set_index("quantity")
    expected = stats.ks_2samp(old["sharpness_log10"], new["sharpness_log10"], method="asymp")
    assert found.at["sharpness_log10", "p"] == pytest.approx(expected.pvalue)
    assert found.at["sharpness_log10", "effect"] == pytest.approx(expected.statistic)
    counts = pd.crosstab(np.r_[np.zeros(200), np.ones(150)], np.r_[old["label"], new["label"]])
    chi = stats.chi2_contingency(counts, correction=False)
    assert found.at["label", "p"] == pytest.approx(chi.pvalue)
    assert found.at["label", "effect"] == pytest.approx(stats.contingency.association(counts, method="cramer"))
    k_old, k_new = int(old["present:red"].sum()), int(new["present:red"].sum())
    # The square of the pooled z statistic is chi-square of the 2 × 2 table.
    square = stats.chi2_contingency([[k_old, 200 - k_old], [k_new, 150 - k_new]], correction=False)
    assert two_proportions(k_old, 200, k_new, 150) == pytest.approx(square.pvalue)
    assert two_proportions(0, 10, 0, 20) == two_proportions(10, 10, 20, 20) == 1.0


def test_holm_is_the_same_in_both_rooms() -> None:
    p = np.random.default_rng(0).random(25) ** 3
    assert holm(p.tolist()) == pytest.approx(holm_of_the_model_room(p.tolist()))
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@pytest.mark.parametrize(
    ("quantity", "shift", "expected"),
    [
        ("brightness_fraction", 1.0, ("image", "brightness_fraction")),
        ("disagreement", 1.0, ("agreement", "disagreement")),
        ("similarity:red", 1.0, ("score", "red")),
        ("present:round", 0.4, ("prevalence", "round")),
    ],
)
def test_what_shifts_fires_and_nothing_else(quantity: str, shift: float, expected: tuple[str, str]) -> None:
    found = compare(table(300, 1), table(200, 2, **{quantity: shift}))
    assert fired(found) == {expected}
    assert found["fires"].iloc[0], "what fires stands first"
    assert "after Holm" in found["sentence"].iloc[0]


def test_a_new_format_and_another_mix_of_classes_fire() -> None:
    found = compare(table(100, 1), table(100, 2).assign(format="jpeg", label="a"))
    assert fired(found) == {("category", "format"), ("category", "label")}


def test_a_hundred_thousand_images_do_not_fire_on_a_trifle() -> None:
    found = compare(table(100_000, 1), table(100_000, 2, brightness_fraction=0.05, **{"present:red": 0.02}))
    significant = found[found["p_holm"] < 0.01]["quantity"].tolist()
    assert {"brightness_fraction", "red"} <= set(significant), "the shift is there, and found"
    assert not found["fires"].any(), "and too small to be of interest"


def test_false_alarms_are_as_rare_as_stated() -> None:
    # Without least effects, so that the tests alone are judged.
    options = DriftOptions(alpha=0.05, min_prevalence_change=0, min_distance=0, min_association=0)
    alarms = [bool(compare(table(150, s), table(80, 1000 + s), options)["fires"].any()) for s in range(200)]
    # 0.05 of 200 are 10; more than 19 come by chance in fewer than 4 of 1,000 cases.
    assert sum(alarms) <= 19


def test_too_few_images_or_patients_are_not_tested() -> None:
    shifted = table(29, 2, brightness_fraction=5)
    assert not len(compare(table(100, 1), shifted))
    assert len(compare(table(100, 1), table(30, 2)))
    many = table(300, 2, brightness_fraction=5)
    assert not len(compare(table(100, 1), many.assign(group_id=[f"patient {i % 10}" for i in range(300)])))


def test_images_of_one_patient_are_no_independent_evidence() -> None:
    # 40 patients with 50 identical images each: by images everything is significant, by patients nothing.
    few = table(40, 2).loc[np.repeat(np.arange(40), 50)].reset_index(drop=True)
    grouped = few.assign(group_id=few["image_id"], image_id=[str(i) for i in range(len(few))])
    options = DriftOptions(min_prevalence_change=0, min_distance=0, min_association=0)
    found = compare(table(400, 1), grouped, options)
    assert set(found["n_new"]) == {40}
    assert not found["fires"].any()


def test_open_labels_are_no_labels() -> None:
    labels = pd.DataFrame(
        {
            "image_id": ["1", "1", "2", "2"],
            "concept_id": ["red", "round", "red", "round"],
            "present": pd.array([True, None, False, True], "boolean"),
            "probability": 0.5,
            "decided_by": "fused",
            "disagreement": [0.2, 0.4, 0.0, 0.0],
        }
    )
    found = concept_measurements(labels, ALIGNMENT.empty()).set_index("image_id")
    assert found.loc["1", "present:red"] == 1
    assert np.isnan(found.loc["1", "present:round"])
    assert found.loc["1", "abstained_fraction"] == 0.5
    assert found.loc["1", "disagreement"] == pytest.approx(0.3)
    assert found.loc["2", "present:red"] == 0
    assert concept_measurements(LABELS.empty(), ALIGNMENT.empty()).empty
