"""Do new images look like those a model was trained on? Tables in, one table of tests out.

A table of measurements has one row an image. Which test a column gets follows from its name:

| column | what | test | effect |
|---|---|---|---|
| one of `IMAGE_STATISTICS` | brightness, contrast, colour, sharpness, size | Kolmogorov-Smirnov | distance D |
| `disagreement`, `abstained_fraction` | how far witnesses agree on the image | Kolmogorov-Smirnov | distance D |
| `similarity:<concept>` | score of the aligner | Kolmogorov-Smirnov | distance D |
| `present:<concept>` | the fused label; null where it abstains | two proportions, pooled | difference of the shares |
| `format`, `label` | kinds of files, classes | chi-square | Cramér's V |

A test fires when its p value, corrected for the number of all tests (Holm), is below `alpha` *and* its effect reaches a
stated minimum: of 100,000 images every trifle is significant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import chi2_contingency, ks_2samp, norm

from data_contracts.ports import Pixels

IMAGE_STATISTICS = (
    "brightness_fraction",
    "contrast_fraction",
    "red_excess_fraction",
    "blue_excess_fraction",
    "sharpness_log10",
    "pixels_log10",
    "aspect_ratio",
)
"""Columns of `image_statistics`."""
AGREEMENT = ("disagreement", "abstained_fraction")
CATEGORIES = ("format", "label")
PRESENT, SIMILARITY = "present:", "similarity:"

TEST_COLUMNS = (
    *("kind", "quantity", "test", "n_baseline", "n_new", "baseline", "new"),
    *("effect", "min_effect", "p", "p_holm", "fires", "sentence"),
)

_LEAST_P = 1e-15
"""Smaller p values are not told apart."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_FLOOR = 1e-8
"""Variance of a Laplacian below this is a flat image; its logarithm must exist."""

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class DriftOptions:
    """When new images count as different."""

    alpha: float = 0.01
    """Probability that all tests together raise one false alarm, by Holm's correction."""
    min_prevalence_change: float = 0.10
    """Least difference between two shares of images with a concept."""
    min_distance: float = 0.20
    """Least Kolmogorov-Smirnov distance between two distributions."""
    min_association: float = 0.20
    """Least Cramér's V between being new and a category."""
    min_images: int = 30
    """Fewer images, or patients where these are known, on one side are not tested."""


class Finding(NamedTuple):
    """One test before correction."""

    test: str
    n_baseline: int
    n_new: int
    baseline: float
    """Share, median, or NaN for categories."""
    new: float
    effect: float
    p: float


def image_statistics(pixels: Pixels) -> dict[str, float]:
    """`IMAGE_STATISTICS` of one (H, W, 3) image.

    Brightness and contrast are mean and standard deviation of luminance (Rec. 601) as fractions of the full range;
    excess of red and blue is their mean distance to it; sharpness is the variance of the Laplacian.
    """
    height, width = pixels.shape[:2]
    colour = pixels.reshape(-1, 3).mean(0, dtype=np.float64) / 255
    luma = (pixels @ _LUMA) / np.float32(255)
    brightness = float(luma.mean(dtype=np.float64))
    return {
        "brightness_fraction": brightness,
        "contrast_fraction": float(luma.std(dtype=np.float64)),
        "red_excess_fraction": float(colour[0] - brightness),
        "blue_excess_fraction": float(colour[2] - brightness),
        "sharpness_log10": float(np.log10(_laplacian_variance(luma) + _FLOOR)),
        "pixels_log10": float(np.log10(height * width)),
        "aspect_ratio": width / height,
    }


def _laplacian_variance(luma: npt.NDArray[np.float32]) -> float:
    if min(luma.shape) < 3:
        return 0.0
    inner = luma[1:-1, 1:-1]
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * inner
    return float(laplacian.var(dtype=np.float64))


def concept_measurements(labels: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """One row an image: `present:` and `similarity:` of every concept, `disagreement`, `abstained_fraction`.

    `labels` and `scores` are the tables `labels` and `alignment` (without heatmaps), or a part of them.
    """
    present = labels.assign(present=labels["present"].astype("boolean").astype("Float64"))
    table = present.pivot(index="image_id", columns="concept_id", values="present").add_prefix(PRESENT)
    similarity = scores.pivot(index="image_id", columns="concept_id", values="similarity").add_prefix(SIMILARITY)
    by_image = labels.groupby("image_id")
    agreement = pd.DataFrame(
        {
            "disagreement": by_image["disagreement"].mean(),
            "abstained_fraction": labels["present"].isna().groupby(labels["image_id"]).mean(),
        }
    )
    found = agreement.join(table).join(similarity, how="left")
    return found.astype(np.float64).rename_axis(index="image_id", columns=None).reset_index()


def compare(baseline: pd.DataFrame, new: pd.DataFrame, options: DriftOptions = DriftOptions()) -> pd.DataFrame:
    """One row a test (`TEST_COLUMNS`), strongest first; no row where one side has too few images.

    Where `group_id` (the patient) is known, one image of each patient is used: images of one patient are no
    independent evidence.
    """
    baseline, new = _independent(baseline), _independent(new)
    if min(len(baseline), len(new)) < options.min_images:
        return pd.DataFrame(columns=list(TEST_COLUMNS))
    rows = [
        {"kind": kind, "quantity": name, "min_effect": least, **found._asdict()}
        for kind, name, least, found in _tests(baseline, new, options)
    ]
    if not rows:
        return pd.DataFrame(columns=list(TEST_COLUMNS))
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"].tolist())
    table["fires"] = (table["p_holm"] < options.alpha) & (table["effect"] >= table["min_effect"])
    table["sentence"] = [_sentence(row) for row in table.itertuples()]
    order = table.assign(rest=-table["effect"]).sort_values(["fires", "rest"], ascending=[False, True], kind="stable")
    return order[list(TEST_COLUMNS)].reset_index(drop=True)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number by Holm's step-down method (1979)."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))), 1.0)
    return [float(value) for value in corrected]


def two_proportions(k_a: int, n_a: int, k_b: int, n_b: int) -> float:
    """Two-sided p value of the pooled z test of equal shares k/n; 1 where all or none are counted."""
    pooled = (k_a + k_b) / (n_a + n_b)
    variance = pooled * (1 - pooled) * (1 / n_a + 1 / n_b)
    if variance <= 0:
        return 1.0
    return float(2 * norm.sf(abs(k_a / n_a - k_b / n_b) / np.sqrt(variance)))


def _tests(
    baseline: pd.DataFrame, new: pd.DataFrame, options: DriftOptions
) -> Iterator[tuple[str, str, float, Finding]]:
    for name in [name for name in baseline if name in new]:
        old, fresh = baseline[name].dropna(), new[name].dropna()
        if min(len(old), len(fresh)) < options.min_images:
            continue
        if name in IMAGE_STATISTICS or name in AGREEMENT:
            kind = "image" if name in IMAGE_STATISTICS else "agreement"
            yield kind, name, options.min_distance, _distributions(old.to_numpy(float), fresh.to_numpy(float))
        elif name.startswith(SIMILARITY):
            yield (
                *("score", name.removeprefix(SIMILARITY), options.min_distance),
                _distributions(old.to_numpy(float), fresh.to_numpy(float)),
            )
        elif name.startswith(PRESENT):
            found = _proportions(old.to_numpy(float), fresh.to_numpy(float))
            yield "prevalence", name.removeprefix(PRESENT), options.min_prevalence_change, found
        elif name in CATEGORIES and pd.concat([old, fresh]).nunique() > 1:
            yield "category", name, options.min_association, _categories(old, fresh)


def _distributions(old: Floats, new: Floats) -> Finding:
    # The asymptotic p value is conservative for tied values, such as equal sizes.
    found = ks_2samp(old, new, method="asymp")
    return Finding(
        "Kolmogorov-Smirnov",
        len(old),
        len(new),
        float(np.median(old)),
        float(np.median(new)),
        float(found.statistic),
        float(found.pvalue),
    )


def _proportions(old: Floats, new: Floats) -> Finding:
    k_old, k_new = int((old > 0.5).sum()), int((new > 0.5).sum())
    share_old, share_new = k_old / len(old), k_new / len(new)
    p = two_proportions(k_old, len(old), k_new, len(new))
    return Finding("two proportions", len(old), len(new), share_old, share_new, abs(share_old - share_new), p)


def _categories(old: pd.Series, new: pd.Series) -> Finding:
    counts = pd.concat([old.value_counts(), new.value_counts()], axis=1).fillna(0).to_numpy(float)
    found = chi2_contingency(counts, correction=False)
    # With two columns (old, new) V is the square root of chi-square over the number of images.
    v = float(np.sqrt(found.statistic / counts.sum()))
    return Finding("chi-square", len(old), len(new), float("nan"), float("nan"), v, float(found.pvalue))


def _independent(table: pd.DataFrame) -> pd.DataFrame:
    """One image of each patient, the first by id; images without a patient stand for themselves."""
    if "group_id" not in table or not len(table):
        return table
    group = table["group_id"].astype(object).where(table["group_id"].notna(), table["image_id"])
    return table.assign(group_id=group).sort_values("image_id").drop_duplicates("group_id")


_WORDS = {
    "brightness_fraction": "brightness",
    "contrast_fraction": "contrast",
    "red_excess_fraction": "share of red",
    "blue_excess_fraction": "share of blue",
    "sharpness_log10": "sharpness (logarithm)",
    "pixels_log10": "number of pixels (logarithm)",
    "aspect_ratio": "width to height",
    "disagreement": "disagreement of witnesses",
    "abstained_fraction": "share of concepts left open",
    "format": "file format",
    "label": "mix of classes",
}


def _sentence(row: object) -> str:
    kind, quantity = str(getattr(row, "kind")), str(getattr(row, "quantity"))  # noqa: B009
    old, new = float(getattr(row, "baseline")), float(getattr(row, "new"))  # noqa: B009
    effect, p = float(getattr(row, "effect")), float(getattr(row, "p_holm"))  # noqa: B009
    end = f"p {f'{p:.2g}' if p > _LEAST_P else f'< {_LEAST_P:g}'} after Holm)"
    if kind == "prevalence":
        return f"{quantity}: in {old:.0%} of the images before, in {new:.0%} of the new ones ({end}"
    if kind == "category":
        return f"{_WORDS[quantity]}: another one (Cramér's V {effect:.2f}, {end}"
    name = _WORDS.get(quantity, f"score of {quantity}")
    return f"{name}: median {old:.3g} before, {new:.3g} in the new images (distance {effect:.2f}, {end}"
