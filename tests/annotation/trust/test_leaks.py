from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import entropy
from sklearn.metrics import roc_auc_score

from annotation.trust.leaks import LeakOptions, class_leak, leak_refusals

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


SAID = np.array(["absent", "present"])


def ledger(answers: np.ndarray, witness: str = "vlm") -> pd.DataFrame:
    states = SAID[answers.astype(int)]
    return pd.DataFrame(
        {"image_id": IMAGES["image_id"], "concept_id": "c", "witness": witness, "witness_model": "m", "state": states}
    )


def scores(score: np.ndarray, class_score: np.ndarray | float = np.nan) -> pd.DataFrame:
    return pd.DataFrame(
        {"image_id": IMAGES["image_id"], "concept_id": "c", "score": score, "class_score": class_score, "fold": 0}
    )


# Nearly all of one class have it and nearly nobody else; who is the exception can be seen, or cannot.
ODD = RNG.random(N) < 0.15
SIGN = (LABEL == 1) ^ ODD
LOOSE = LeakOptions(max_explained_fraction=0.2)


def test_a_sign_of_one_disease_is_kept_when_its_exceptions_follow_the_pixels() -> None:
    seen = class_leak(ledger(SIGN), IMAGES, LOOSE, scores=scores(SIGN + 0.5 * RNG.standard_normal(N))).iloc[0]
    unseen = class_leak(ledger(SIGN), IMAGES, LOOSE, scores=scores(LABEL == 1)).iloc[0]
    assert (seen["flagged"], seen["refused"], seen["follows_pixels"]) == (True, False, True)
    assert (unseen["flagged"], unseen["refused"], unseen["follows_pixels"]) == (True, True, False)
    assert unseen["within_auroc"] == 0.5


def test_exceptions_that_only_look_like_another_class_are_the_diagnosis_still() -> None:
    looks = SIGN + 0.5 * RNG.standard_normal(N)  # the answers follow a diagnosis made from the pixels
    row = class_leak(ledger(SIGN), IMAGES, LOOSE, scores=scores(looks, looks)).iloc[0]
    assert row["within_low"] > 0.5
    assert row["refused"]


def test_a_handful_of_exceptions_saves_nobody() -> None:
    answers = LABEL == 1
    answers[:4] ^= True
    row = class_leak(ledger(answers), IMAGES, LOOSE, scores=scores(answers)).iloc[0]
    assert row["n_exceptions"] == 4
    assert row["refused"]


def test_people_and_fused_labels_are_flagged_but_not_refused() -> None:
    for said in (ledger(LABEL == 1, "expert"), labels(c=LABEL == 1)):
        row = class_leak(said, IMAGES).iloc[0]
        assert (row["flagged"], row["refused"]) == (True, False)


def test_a_refusal_says_who_and_how_much() -> None:
    found = leak_refusals(class_leak(ledger(LABEL == 1), IMAGES), {"c": "Disguise"})
    sentence = found["vlm:m", "c"]
    assert "'Disguise'" in sentence
    assert "class alone explains 100 % (AUROC 1.00, 200 images)" in sentence
    assert "only 0 answers differ" in sentence
    assert leak_refusals(class_leak(ledger(RNG.random(N) < 0.5), IMAGES)) == {}
