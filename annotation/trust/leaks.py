"""Does the class leak into the concepts? A column that the class alone predicts explains nothing.

Many honest signs go with one disease: nearly all eosinophils have red granules. So how well the class predicts a
column is reported, but a witness is refused only when its answers are all but a function of the class, and what is
left within classes does not follow the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field
from sklearn.metrics import mutual_info_score

from annotation.trust.agreement import auroc_interval
from annotation.trust.pairs import count_pairs
from annotation.votes import latest
from data_contracts.tables import Split, State, Witness


class LeakOptions(BaseModel):
    """When a concept counts as the class in other words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_explained_fraction: float = Field(0.9, gt=0, le=1)
    """Share of a concept's entropy that the class may explain before the concept is flagged."""
    constant_fraction: float = Field(0.01, ge=0, lt=0.5)
    """A class is constant in a concept when at most this share of its images answers differently."""
    min_images: int = Field(20, ge=2)
    """Fewer answered images than this are not judged."""
    min_exceptions: int = Field(10, ge=2)
    """Fewer answers against the rule of their class than this say nothing about whether they follow the pixels."""


def class_leak(
    answers: pd.DataFrame,
    images: pd.DataFrame,
    options: LeakOptions | None = None,
    *,
    scores: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """How well the class alone predicts each concept, one row per source and concept.

    Columns: source, concept_id, n, prevalence, auroc with auroc_low and auroc_high (of the class's own rate of
    presence as score), explained_fraction (mutual information over the concept's entropy), class_constant (every
    class answers one way, and not all the same way), constant (one answer throughout), n_exceptions (answers against
    the rule of their class), within_auroc with within_low and within_high (how the pixels' score ranks the answers of
    images of one class), follows_pixels (the exceptions do, and better than by how much an image looks like a class),
    flagged (the class in other words, or constant), refused (a machine's answers, flagged for the class, whose
    exceptions do not follow the pixels).

    Fused labels and people's answers are never refused: fusion may rightly end at what the class says, and a person
    who looked at the image has the last word.

    Args:
        answers: LABELS, or judgements; of judgements each witness and model is a source of its own.
        images: The images table; classes are used of train and val only (or of all where there is no split).
        options: Limits.
        scores: image_id, concept_id, score, and where known class_score (the same from the class as it looks) and
            fold (which head scored it), all cross-fitted; without them no answer is known to follow the pixels.
    """
    settings = options or LeakOptions()
    classes = _classes(images)
    joined = _binary(answers).merge(classes, on="image_id", how="inner")
    joined = _with_scores(joined, scores)
    rows = [
        {"source": source, "concept_id": concept_id, **_leak(group, settings, _is_machine(str(source)))}
        for (source, concept_id), group in joined.groupby(["source", "concept_id"], sort=False)
    ]
    return pd.DataFrame(rows, columns=["source", "concept_id", *_leak(joined.iloc[:0], settings, False)])


def leak_refusals(table: pd.DataFrame, names: Mapping[str, str] | None = None) -> dict[tuple[str, str], str]:
    """(source, concept id) → why that witness may not label it, in words, for the refused rows of `class_leak`."""
    refused = table[table["refused"].astype(bool)]
    return {
        (str(row["source"]), str(row["concept_id"])): _sentence(row, names or {}) for row in refused.to_dict("records")
    }


def _is_machine(source: str) -> bool:
    return source.startswith(f"{Witness.VLM}:")


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


def _with_scores(answers: pd.DataFrame, scores: pd.DataFrame | None) -> pd.DataFrame:
    """The answers with score, class_score and fold, where there are any."""
    blank = {"score": np.nan, "class_score": np.nan, "fold": 0}
    if scores is None:
        return answers.assign(**blank)
    known = scores.assign(**{name: value for name, value in blank.items() if name not in scores})
    joined = answers.merge(known[["image_id", "concept_id", *blank]], on=["image_id", "concept_id"], how="left")
    return joined.assign(fold=joined["fold"].fillna(0))


def _leak(rows: pd.DataFrame, options: LeakOptions, is_machine: bool) -> dict[str, float | bool]:
    present = rows["present"].to_numpy(np.float64)
    rates = rows.groupby("label")["present"].transform("mean").to_numpy(np.float64)
    area = auroc_interval(rates, present)
    explained = _explained_fraction(rows["label"].to_numpy(), present)
    constant = len(present) > 0 and len(np.unique(present)) == 1
    settled = np.minimum(rates, 1 - rates) <= options.constant_fraction
    class_constant = bool(len(present) and settled.all() and not constant)
    judged = len(present) >= options.min_images
    like_class = judged and not constant and (class_constant or explained > options.max_explained_fraction)
    within = _within_classes(rows, present, rates, options)
    return {
        "n": len(present),
        "prevalence": float(present.mean()) if len(present) else float("nan"),
        "auroc": area.value,
        "auroc_low": area.low,
        "auroc_high": area.high,
        "explained_fraction": explained,
        "class_constant": class_constant,
        "constant": constant,
        **within,
        "flagged": like_class or (judged and constant),
        "refused": bool(is_machine and like_class and not within["follows_pixels"]),
    }


def _within_classes(
    rows: pd.DataFrame, present: npt.NDArray[np.float64], rates: npt.NDArray[np.float64], options: LeakOptions
) -> dict[str, float | bool]:
    """What the answers hold beyond the class: do the exceptions follow the pixels?"""
    n_exceptions = int((present != (rates > 0.5)).sum())
    strata = rows.groupby(["label", "fold"], sort=False).ngroup().to_numpy(np.int64)
    score, class_score = (rows[name].to_numpy(np.float64)[:, None] for name in ("score", "class_score"))
    pairs = count_pairs(score, present[:, None], class_score[None], strata=strata)
    value, low, high = pairs.interval((1, 0))[0]
    beyond = pairs.interval((1, -1))[0, 1]
    # Answers that follow a diagnosis made from the pixels stray from the true class where the image looks like another.
    more_than_class = np.isnan(beyond) or beyond > 0
    follows = bool(n_exceptions >= options.min_exceptions and low > 0.5 and more_than_class)
    return {
        "n_exceptions": n_exceptions,
        "within_auroc": float(value),
        "within_low": float(np.maximum(low, 0)),
        "within_high": float(np.minimum(high, 1)),
        "follows_pixels": follows,
    }


def _explained_fraction(label: npt.NDArray[np.object_], present: npt.NDArray[np.float64]) -> float:
    """I(concept; class) / H(concept), 0-1; NaN for a concept without entropy."""
    entropy = mutual_info_score(present, present) if len(present) else 0.0
    return float(mutual_info_score(label, present) / entropy) if entropy > 0 else float("nan")


def _sentence(row: Mapping[str, object], names: Mapping[str, str]) -> str:
    concept_id = str(row["concept_id"])
    left = (
        f"only {row['n_exceptions']} answers differ from the rule of their class"
        if np.isnan(float(str(row["within_auroc"])))
        else f"within classes the pixels rank {row['n_exceptions']} exceptions with AUROC {row['within_auroc']:.2f} "
        f"(95 % interval {row['within_low']:.2f} to {row['within_high']:.2f})"
    )
    return (
        f"concept {names.get(concept_id, concept_id)!r}: expected answers that say more than the class, got answers of "
        f"{row['source']} of which the class alone explains {100 * float(str(row['explained_fraction'])):.0f} % (AUROC "
        f"{row['auroc']:.2f}, {row['n']} images), and {left}; it is the diagnosis in other words and may not label."
    )
