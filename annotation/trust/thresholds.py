"""From scores to answers: a threshold per concept, with a band around it in which nothing is said."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field
from skimage.filters import threshold_otsu

from annotation.votes import ImageIds, Votes, places, training_votes
from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import ConfigurationError


class ThresholdMethod(StrEnum):
    """How thresholds are found."""

    FIXED = "fixed"
    OTSU = "otsu"
    JUDGEMENTS = "judgements"


class ThresholdOptions(BaseModel):
    """How similarities become answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: ThresholdMethod = ThresholdMethod.OTSU
    """`fixed`: one number for all. `otsu`: per concept, between the two modes of its scores. `judgements`: per
    concept, where alignment agrees best with what was judged (balanced accuracy); Otsu where too little was."""
    fixed: float | None = None
    """The number for `fixed`. It is a property of the model: 0.45 belongs to BioViL, not to yours."""
    abstain_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of images nearest to the threshold about which nothing is said."""
    min_judged: int = Field(10, ge=2)
    """Judged images of either answer that `judgements` asks for before it trusts them."""


def fit_thresholds(
    scores: pd.DataFrame, judgements: pd.DataFrame, options: ThresholdOptions, *, column: str = "similarity"
) -> pd.DataFrame:
    """One row a concept: concept_id, threshold, abstain_low, abstain_high, method (that was used), n (images).

    Args:
        scores: image_id, concept_id and the score; only these images are used, so leave the test split out.
        judgements: The ledger, for the method `judgements`.
        options: Method and band.
        column: The score's column.

    Raises:
        ConfigurationError: `fixed` without a number.
    """
    if options.method is ThresholdMethod.FIXED and options.fixed is None:
        raise ConfigurationError(
            "thresholds: method 'fixed' expects a number in `fixed`, got none.",
            remedy="Set it for your model, or use the method 'otsu'.",
        )
    return pd.DataFrame(
        [
            {"concept_id": concept_id, **_one(rows, judgements, options, column)}
            for concept_id, rows in scores.groupby("concept_id", sort=False)
        ],
        columns=["concept_id", "threshold", "abstain_low", "abstain_high", "method", "n"],
    )


def threshold_votes(
    scores: pd.DataFrame,
    thresholds: pd.DataFrame,
    image_ids: ImageIds,
    vocabulary: Vocabulary,
    *,
    column: str = "similarity",
) -> Votes:
    """The paper's rule as votes: present above the threshold, absent below, silent inside the abstain band."""
    shape = (len(image_ids), len(vocabulary))
    votes = Votes(np.full(shape, 0.5, np.float32), np.zeros(shape, np.float32))
    rows = scores.merge(thresholds, on="concept_id", how="inner")
    row, place = places(rows, image_ids, vocabulary)
    score = rows[column].to_numpy(np.float64)
    inside = (score > rows["abstain_low"].to_numpy()) & (score < rows["abstain_high"].to_numpy())
    known = (row >= 0) & (place >= 0) & np.isfinite(score)
    votes.value[row[known], place[known]] = (score > rows["threshold"].to_numpy())[known]
    votes.weight[row[known], place[known]] = ~inside[known]
    return votes


def _one(
    rows: pd.DataFrame, judgements: pd.DataFrame, options: ThresholdOptions, column: str
) -> dict[str, float | str | int]:
    score = rows[column].to_numpy(np.float64)
    threshold, method = _threshold(rows, score, judgements, options)
    low, high = _band(score, threshold, options.abstain_fraction)
    return {"threshold": threshold, "abstain_low": low, "abstain_high": high, "method": str(method), "n": len(score)}


def _threshold(
    rows: pd.DataFrame, score: npt.NDArray[np.float64], judgements: pd.DataFrame, options: ThresholdOptions
) -> tuple[float, ThresholdMethod]:
    if options.fixed is not None and options.method is ThresholdMethod.FIXED:
        return options.fixed, ThresholdMethod.FIXED
    if options.method is ThresholdMethod.JUDGEMENTS:
        value, weight = _judged(rows, judgements)
        if min((weight * value).sum(), (weight * (1 - value)).sum()) >= options.min_judged:
            return best_cut(score, value, weight), ThresholdMethod.JUDGEMENTS
    return otsu_cut(score), ThresholdMethod.OTSU


def otsu_cut(score: npt.NDArray[np.floating]) -> float:
    """Otsu's cut, moved midway between the two scores that it parts; the score itself when all are equal."""
    if np.ptp(score) == 0:
        return float(score[0])
    # Between far modes every cut is as good, and Otsu names the first: the edge of the lower mode.
    cut = threshold_otsu(score)
    above = score > cut
    return float((score[~above].max() + score[above].min()) / 2) if above.any() else float(cut)


def best_cut(score: npt.NDArray[np.float64], value: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> float:
    """The cut of greatest balanced accuracy against weighted soft answers, midway between two scores."""
    order = np.argsort(score, kind="stable")
    sorted_score = score[order]
    present, absent = (weight * value)[order], (weight * (1 - value))[order]
    # After the i-th score: presences above count as found, absences up to it as rejected.
    gain = absent.cumsum() / absent.sum() - present.cumsum() / present.sum()
    cuts = np.flatnonzero(np.diff(sorted_score) > 0)
    if not len(cuts):
        return float(sorted_score[0])
    best = cuts[gain[cuts].argmax()]
    return float((sorted_score[best] + sorted_score[best + 1]) / 2)


def _judged(rows: pd.DataFrame, judgements: pd.DataFrame) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(value, weight) of the judgements of one concept, aligned with its score rows."""
    concept_id = str(rows["concept_id"].iloc[0])
    votes = training_votes(
        judgements[judgements["concept_id"] == concept_id],
        rows["image_id"].tolist(),
        Vocabulary.of([Concept(concept_id, concept_id)]),
    )
    return votes.value[:, 0], votes.weight[:, 0]


def _band(score: npt.NDArray[np.float64], threshold: float, fraction: float) -> tuple[float, float]:
    """(low, high) around the threshold that hold `fraction` of the scores, those nearest to it."""
    if fraction <= 0:
        return threshold, threshold
    reach = float(np.quantile(np.abs(score - threshold), fraction))
    return threshold - reach, threshold + reach
