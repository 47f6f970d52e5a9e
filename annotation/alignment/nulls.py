"""Null prompts: what an honest concept map must beat."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

NULL_PROMPTS = ("an image", "a picture of something", "blorptic vantrule", "quibbet of the sarnile", "text on a page")
"""Prompts that name nothing visible in a medical image: the empty, the nonsensical and the irrelevant."""


def null_margin(similarity: npt.NDArray[np.floating], null_similarity: npt.NDArray[np.floating]) -> float:
    """By how much one concept's scores beat the null prompts' scores over the same images, in standard deviations.

    Both arrays are (n,). The difference of means is divided by the standard deviation of the differences, so a
    concept that is merely a constant above its nulls still counts as above them. NaN for fewer than two images.
    """
    difference = np.asarray(similarity, np.float64) - np.asarray(null_similarity, np.float64)
    if len(difference) < 2:
        return float("nan")
    spread = difference.std(ddof=1)
    return float(difference.mean() / spread) if spread > 0 else float(np.sign(difference.mean()) * np.inf)
