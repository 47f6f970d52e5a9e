"""Rows of single files in; the settled `images` table out: duplicates marked, every accepted image in a split.

What is found on the way and does not stop a run becomes a warning; a SOURCE that is of no use as a whole is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from data_contracts.errors import SourceRefused
from data_contracts.tables import Split
from pipeline.duplicates import cluster_ids, mark_exact, mark_near, reject_across_splits
from pipeline.ingest_options import IngestOptions
from pipeline.split import assign_splits, carve, check_splits, straddling
from pipeline.wording import some


def settle(
    images: pd.DataFrame, options: IngestOptions, earlier: Mapping[str, str], warnings: list[str]
) -> pd.DataFrame:
    """The table with duplicates marked and every accepted image in a split; adds to `warnings`.

    `earlier` is image id → split of the last run: an image that had a split stays there unless SOURCE gives one.
    Raises `SourceRefused` for a given split that patients straddle, or that has nothing to train on.
    """
    given = images["split"].notna() & images["rejected"].isna()
    images = mark_near(mark_exact(images), options.near_duplicates)
    _warn_of_contradictions(images, warnings)
    if given.any():
        images = _keep_given(images, options, earlier, warnings)
    images["split"] = images["split"].fillna(images["image_id"].map(earlier).astype("str"))
    images = _drop_straddling(images, warnings)
    images = assign_splits(images, options.fractions, options.seed)
    images["split"] = images["split"].where(images["rejected"].isna())
    _warn_of_small_classes(images, warnings)
    warnings.extend(f"{problem}: results on test are too good." for problem in check_splits(images))
    return images


def _keep_given(
    images: pd.DataFrame, options: IngestOptions, earlier: Mapping[str, str], warnings: list[str]
) -> pd.DataFrame:
    """A given split, checked, and with the parts that it lacks carved out of train."""
    accepted = images[images["rejected"].isna()]
    patients = straddling(accepted["split"], accepted["group_id"])
    if patients and not options.allow_patient_overlap:
        raise SourceRefused(
            f"given split: expected each patient in one split, but {len(patients)} lie in several: {some(patients)}; "
            "nothing was read.",
            remedy="Correct the split, drop its column to have one drawn, or allow patient overlap.",
        )
    images = _drop_straddling(images, warnings)
    split = images.loc[images["rejected"].isna(), "split"]
    if split.isna().any():
        warnings.append(f"{split.isna().sum()} image(s) have no given split: theirs was drawn.")
        return images
    has = set(split)
    if Split.TRAIN.value not in has:
        raise SourceRefused(
            f"given split: expected images in train, got only {', '.join(sorted(has))}; nothing was read."
        )
    missing = [s for s in (Split.VAL.value, Split.TEST.value) if s not in has and options.fractions.of(s) > 0]
    if not missing:
        return images
    warnings.append(f"given split has no {' and no '.join(missing)}: drawn from its train images.")
    carved = images["image_id"].map(earlier).astype("str")
    moved = (images["split"] == Split.TRAIN) & carved.isin(missing)
    if moved.any():
        images["split"] = images["split"].mask(moved, carved)
        # What is new since then is train: the carved parts are full, and known images never move.
        return images
    return carve(images, missing, options.fractions, options.seed)


def _drop_straddling(images: pd.DataFrame, warnings: list[str]) -> pd.DataFrame:
    dropped = reject_across_splits(images)
    n = int(dropped["rejected"].notna().sum() - images["rejected"].notna().sum())
    if n:
        warnings.append(
            f"{n} image(s) were left out: a near duplicate is in another split; the copy in test, else val, stays."
        )
    return dropped


def _warn_of_contradictions(images: pd.DataFrame, warnings: list[str]) -> None:
    accepted = images[images["rejected"].isna()]
    mixed = accepted["label"].groupby(cluster_ids(accepted)).nunique()
    names = mixed.index[mixed > 1]
    if len(names):
        paths = accepted.loc[accepted["image_id"].isin(names), "path"]
        warnings.append(
            f"{len(names)} cluster(s) of near duplicates carry several labels, such as that of {paths.iloc[0]!r}."
        )
    spelled = Counter(name.casefold() for name in accepted["label"].dropna().unique())
    twice = [name for name, n in spelled.items() if n > 1]
    if twice:
        warnings.append(f"class names that differ only in upper and lower case are taken as different: {some(twice)}.")


def _warn_of_small_classes(images: pd.DataFrame, warnings: list[str]) -> None:
    accepted = images[images["rejected"].isna()]
    for label, rows in accepted.groupby("label"):
        if len(rows) == 1:
            warnings.append(
                f"class {label!r} has one image: it is in {rows['split'].iloc[0]}, and nothing can test it."
            )
            continue
        lacking = [s.value for s in Split if not (rows["split"] == s).any() and (accepted["split"] == s).any()]
        if lacking:
            warnings.append(f"class {label!r} ({len(rows)} images) has none in {' and '.join(lacking)}.")
    bare = [s.value for s in Split if not (accepted["split"] == s).any()]
    if bare:
        warnings.append(f"no image is in {' or '.join(bare)}: there are too few, or their share is 0.")
    lost = sorted(set(images["label"].dropna()) - set(accepted["label"].dropna()))
    if lost:
        warnings.append(f"every image of class(es) {some(lost)} was rejected.")


def refuse_useless(source: Path, images: pd.DataFrame, warnings: list[str]) -> None:
    """Raise `SourceRefused` if no image is accepted, or if there is one class only; warn of missing labels."""
    accepted = images[images["rejected"].isna()]
    if accepted.empty:
        counts = ", ".join(f"{n} {reason}" for reason, n in images["rejected"].value_counts().items())
        first = images.iloc[0]
        raise SourceRefused(
            f"SOURCE {source}: none of {len(images)} image(s) can be used: {counts}; such as {first['path']!r}.",
            remedy="Correct the files, or give another folder.",
        )
    labels = accepted["label"].dropna()
    if len(labels) and labels.nunique() < 2:
        raise SourceRefused(
            f"SOURCE {source}: expected at least 2 classes, got one: {labels.iloc[0]!r} "
            f"({len(labels)} images; {len(images) - len(accepted)} rejected).",
            remedy="Add images of another class, or give a folder without classes to annotate only.",
        )
    if labels.empty:
        warnings.append("The images have no labels: they can be annotated, but nothing can be trained on them.")
    elif len(labels) < len(accepted):
        warnings.append(f"{len(accepted) - len(labels)} accepted image(s) have no label and are annotated only.")
