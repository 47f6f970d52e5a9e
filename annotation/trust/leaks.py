"""Does the class leak into the concepts? A column that the class alone predicts explains nothing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field
from sklearn.metrics import mutual_info_score

from annotation.trust.agreement import auroc_interval
from annotation.votes import latest
from data_contracts.tables import Split, State


class LeakOptions(BaseModel):
    """When a concept counts as the class in other words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_explained_fraction: float = Field(0.9, gt=0, le=1)
    """Share of a concept's entropy that the class may explain before the concept is flagged."""
    constant_fraction: float = Field(0.01, ge=0, lt=0.5)
    """A class is constant in a concept when at most this share of its images answers differently."""
    min_images: int = Field(20, ge=2)
    """Fewer answered images than this are not judged."""


def class_leak(answers: pd.DataFrame, images: pd.DataFrame, options: LeakOptions | None = None) -> pd.DataFrame:
    """How well the class alone predicts each concept, one row per source and concept.

    Columns: source, concept_id, n, prevalence, auroc with auroc_low and auroc_high (of the class's own rate of
    presence as score), explained_fraction (mutual information over the concept's entropy), class_constant (every
    class answers one way, and not all the same way), constant (one answer throughout), flagged.

    Args:
        answers: LABELS, or judgements; of judgements each witness and model is a source of its own.
        images: The images table; classes are used of train and val only (or of all where there is no split).
        options: Limits.
    """
    settings = options or LeakOptions()
    classes = _classes(images)
    joined = _binary(answers).merge(classes, on="image_id", how="inner")
    rows = [
        {"source": source, "concept_id": concept_id, **_leak(group, settings)}
        for (source, concept_id), group in joined.groupby(["source", "concept_id"], sort=False)
    ]
    return pd.DataFrame(rows, columns=["source", "concept_id", *_leak(joined.iloc[:0], settings)])


def _classes(images: pd.DataFrame) -> pd.DataFrame:
    """image_id and label of accepted, labelled images outside the test split."""
    usable = images["rejected"].isna() & images["label"].notna() & (images["split"] != Split.TEST)
    return images.loc[usable, ["image_id", "label"]]


def _binary(answers: pd.DataFrame) -> pd.DataFrame:
    """source, image_id, concept_id, present (0 or 1) of everything that was answered."""
    if "state" not in answers:
        said = answers[answers["present"].notna()]
        return said[["image_id", "concept_id"]].assign(source="fused", present=said["present"].astype(int))
    standing = latest(answers)
    said = standing[standing["state"].isin([State.PRESENT, State.ABSENT])]
    source = said["witness"].astype(str) + ":" + said["witness_model"].astype(str)
    present = (said["state"] == State.PRESENT).astype(int)
    return said[["image_id", "concept_id"]].assign(source=source, present=present)


def _leak(rows: pd.DataFrame, options: LeakOptions) -> dict[str, float | bool]:
    present = rows["present"].to_numpy(np.float64)
    rates = rows.groupby("label")["present"].transform("mean").to_numpy(np.float64)
    area = auroc_interval(rates, present)
    explained = _explained_fraction(rows["label"].to_numpy(), present)
    constant = len(present) > 0 and len(np.unique(present)) == 1
    settled = np.minimum(rates, 1 - rates) <= options.constant_fraction
    class_constant = bool(len(present) and settled.all() and not constant)
    judged = len(present) >= options.min_images
    return {
        "n": len(present),
        "prevalence": float(present.mean()) if len(present) else float("nan"),
        "auroc": area.value,
        "auroc_low": area.low,
        "auroc_high": area.high,
        "explained_fraction": explained,
        "class_constant": class_constant,
        "constant": constant,
        "flagged": judged and (class_constant or constant or explained > options.max_explained_fraction),
    }


def _explained_fraction(label: npt.NDArray[np.object_], present: npt.NDArray[np.float64]) -> float:
    """I(concept; class) / H(concept), 0-1; NaN for a concept without entropy."""
    entropy = mutual_info_score(present, present) if len(present) else 0.0
    return float(mutual_info_score(label, present) / entropy) if entropy > 0 else float("nan")
