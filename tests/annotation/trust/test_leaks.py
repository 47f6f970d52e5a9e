from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import entropy
from sklearn.metrics import roc_auc_score

from annotation.trust.leaks import class_leak

N = 300
RNG = np.random.default_rng(0)
LABEL = RNG.integers(0, 3, N)
IMAGES = pd.DataFrame(
    {
        "image_id": [f"i{i}" for i in range(N)],
        "label": np.array(["x", "y", "z"])[LABEL],
        "split": np.where(np.arange(N) < 200, "train", "test"),
        "rejected": None,
    }
)


def labels(**columns: np.ndarray) -> pd.DataFrame:
    parts = [
        pd.DataFrame({"image_id": IMAGES["image_id"], "concept_id": name, "present": pd.array(values, "boolean")})
        for name, values in columns.items()
    ]
    return pd.concat(parts)


def test_the_class_in_other_words_is_flagged_and_an_honest_concept_is_not() -> None:
    table = class_leak(
        labels(
            disguise=LABEL == 1,
            honest=RNG.random(N) < np.array([0.2, 0.5, 0.8])[LABEL],
            random=RNG.random(N) < 0.5,
            always=np.ones(N, bool),
        ),
        IMAGES,
    ).set_index("concept_id")
    assert table["flagged"].to_dict() == {"disguise": True, "honest": False, "random": False, "always": True}
    assert table["class_constant"].to_dict() == {"disguise": True, "honest": False, "random": False, "always": False}
    assert table.loc["disguise", "auroc"] == 1
    assert table.loc["random", "explained_fraction"] < 0.05
    assert table.loc["random", "auroc_low"] < 0.6


def test_numbers_follow_their_definitions_on_train_images_only() -> None:
    present = RNG.random(N) < np.array([0.1, 0.5, 0.9])[LABEL]
    row = class_leak(labels(c=present), IMAGES).iloc[0]
    train, held = present[:200], LABEL[:200]
    rate = np.array([train[held == c].mean() for c in range(3)])
    assert row["n"] == 200
    assert row["auroc"] == pytest.approx(roc_auc_score(train, rate[held]))
    conditional = sum((held == c).mean() * entropy([rate[c], 1 - rate[c]]) for c in range(3))
    total = entropy([train.mean(), 1 - train.mean()])
    assert row["explained_fraction"] == pytest.approx((total - conditional) / total)


def test_each_witness_is_judged_by_itself() -> None:
    states = np.where(LABEL == 1, "present", "absent")
    ledger = pd.concat(
        pd.DataFrame(
            {
                "image_id": IMAGES["image_id"],
                "concept_id": "c",
                "witness": "vlm",
                "witness_model": model,
                "state": said,
            }
        )
        for model, said in (("leaky", states), ("fair", RNG.permutation(states)), ("mute", "uncertain"))
    )
    table = class_leak(ledger, IMAGES).set_index("source")
    assert table["flagged"].to_dict() == {"vlm:leaky": True, "vlm:fair": False}


def test_too_few_images_are_not_judged_and_none_is_no_row() -> None:
    few = labels(c=LABEL == 1)
    assert not class_leak(few.head(10), IMAGES)["flagged"].any()
    assert class_leak(few.iloc[:0], IMAGES).empty
    assert class_leak(few, IMAGES.assign(label=None)).empty
