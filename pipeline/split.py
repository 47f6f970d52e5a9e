"""Images in, train / val / test out: stratified by label, whole groups only, the same for the same seed.

A group is what must never straddle splits: the images of one patient, the frames of one file, near
duplicates, and all of these chained together. Images that have a split keep it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_contracts.errors import ConfigurationError
from data_contracts.tables import Split
from pipeline.duplicates import Clusters, cluster_ids
from pipeline.wording import some

_ORDER = (Split.TRAIN.value, Split.TEST.value, Split.VAL.value)
"""Who is served first when several lack a class: it needs training images first, then test images."""


@dataclass(frozen=True)
class SplitFractions:
    """Wanted shares of the images; they add up to 1."""

    train: float = 0.7
    val: float = 0.1
    test: float = 0.2

    def __post_init__(self) -> None:
        parts = (self.train, self.val, self.test)
        if min(parts) < 0 or abs(sum(parts) - 1) > 1e-6 or self.train <= 0:
            raise ConfigurationError(
                f"split fractions: expected train > 0, val and test >= 0 that add up to 1, got {parts}."
            )

    def of(self, split: str) -> float:
        """Share of one split."""
        return {Split.TRAIN.value: self.train, Split.VAL.value: self.val, Split.TEST.value: self.test}[split]


def group_keys(images: pd.DataFrame) -> pd.Series:
    """For each row the name of the group that must stay together: the smallest `image_id` in it.

    Chains `group_id`, frames of one file, exact and near duplicates.
    """
    rows = images.reset_index(drop=True)
    clusters = Clusters(len(rows))
    links = [rows["group_id"], rows["image_id"].str.partition("#")[0], cluster_ids(rows)]
    for link in links:
        first: dict[str, int] = {}
        for i, value in enumerate(link):
            if not pd.isna(value):
                clusters.join(i, first.setdefault(value, i))
    roots = np.array([clusters.root(i) for i in range(len(rows))], np.int64)
    return pd.Series(rows["image_id"].groupby(roots).transform("min").to_numpy(), index=images.index, dtype="str")


def assign_splits(
    images: pd.DataFrame, fractions: SplitFractions, seed: int, *, into: Sequence[str] = _ORDER
) -> pd.DataFrame:
    """The images with `split` filled wherever it is null and the image is not rejected.

    A group with a split anywhere draws its other images there. The rest goes group by group, large ones
    first, to the split of `into` that lacks most of the group's classes; the last groups of a class go where it
    is still missing, so three groups of a class are enough for it to be in every split. The order among equals
    is drawn from `seed` and the image ids: neither paths nor the order of rows matter.
    """
    filled = images.copy()
    accepted = filled[filled["rejected"].isna()]
    if accepted.empty:
        return filled
    keys = group_keys(accepted)
    labels = accepted["label"].fillna("").astype("category")
    codes = labels.cat.codes.to_numpy(np.int64)
    n_classes = len(labels.cat.categories)
    split = accepted["split"].astype(object).where(accepted["split"].notna(), None)
    split = split.fillna(keys.map(_settled(keys, split)))
    held = np.stack([np.bincount(codes[(split == name).to_numpy()], minlength=n_classes) for name in into])
    sizes = np.bincount(codes, minlength=n_classes)
    room = np.outer([fractions.of(name) for name in into], sizes) - held
    open_rows = split.isna()
    chosen = _fill(keys[open_rows], codes[open_rows.to_numpy()], room, held, into, seed)
    filled.loc[accepted.index, "split"] = split.fillna(keys.map(chosen)).astype("str")
    return filled


def check_splits(images: pd.DataFrame) -> list[str]:
    """Sentences on patients and near duplicates that straddle splits; empty if none does."""
    accepted = images[images["rejected"].isna() & images["split"].notna()]
    problems = []
    for what, key in (("patient or group", accepted["group_id"]), ("near-duplicate cluster", cluster_ids(accepted))):
        names = straddling(accepted["split"], key)
        if names:
            problems.append(f"{len(names)} {what}(s) lie in more than one split: {some([n[:40] for n in names])}")
    return problems


def straddling(split: pd.Series, key: pd.Series) -> list[str]:
    """Values of `key` whose rows are in more than one split, sorted."""
    counts = split.groupby(key).nunique()
    return sorted(counts.index[counts > 1])


def carve(images: pd.DataFrame, missing: Sequence[str], fractions: SplitFractions, seed: int) -> pd.DataFrame:
    """A given split with the `missing` parts (val, test) taken out of train: grouped, stratified, the rest stays."""
    part = images[(images["split"] == Split.TRAIN) & images["rejected"].isna()]
    into = [s for s in _ORDER if s == Split.TRAIN.value or s in missing]
    total = sum(fractions.of(s) for s in into)
    shares = {s: fractions.of(s) / total if s in into else 0.0 for s in _ORDER}
    drawn = assign_splits(part.assign(split=None), SplitFractions(**shares), seed, into=into)
    carved = images.copy()
    carved.loc[part.index, "split"] = drawn["split"]
    return carved


def _settled(keys: pd.Series, split: pd.Series) -> dict[str, str]:
    """Group → the split that most of its images have already."""
    pairs = pd.DataFrame({"key": keys, "split": split}).dropna()
    counts = pairs.groupby(["key", "split"]).size().reset_index(name="n").sort_values(["n", "split"])
    return dict(zip(counts["key"], counts["split"], strict=True))  # later rows, with larger n, win


def _fill(
    keys: pd.Series,
    codes: npt.NDArray[np.int64],
    room: npt.NDArray[np.float64],
    held: npt.NDArray[np.int64],
    into: Sequence[str],
    seed: int,
) -> dict[str, str]:
    """Group → split, for groups without any; `room` and `held` (splits, classes) are updated on the way."""
    weight = 1.0 / np.maximum((room + held).sum(axis=0), 1.0)  # so that a rare class weighs as much as a common one
    wanted = [i for i in range(len(into)) if room[i].sum() + held[i].sum() > 0]
    counts: dict[str, npt.NDArray[np.int64]] = {}
    for key, code in zip(keys, codes, strict=True):
        counts.setdefault(key, np.zeros(room.shape[1], np.int64))[code] += 1
    n_left = np.bincount([int(c.argmax()) for c in counts.values()], minlength=room.shape[1])
    chosen = {}
    for key in sorted(counts, key=lambda k: (-counts[k].sum(), _draw(seed, k))):
        main_class = int(counts[key].argmax())
        empty = [i for i in wanted if not held[i, main_class]]
        if empty and n_left[main_class] <= len(empty):
            best = empty[0]  # the last groups of a class go where it is missing: train first
        else:
            best = int(np.argmax((room * counts[key] * weight).sum(axis=1).round(9)))
        n_left[main_class] -= 1
        room[best] -= counts[key]
        held[best] += counts[key]
        chosen[key] = into[best]
    return chosen


def _draw(seed: int, key: str) -> str:
    return hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()
