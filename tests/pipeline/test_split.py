from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_contracts.errors import ConfigurationError
from pipeline.split import SplitFractions, assign_splits, carve, check_splits, group_keys

OPTIONS = SplitFractions()


def images(
    labels: list[str | None], groups: list[str | None] | None = None, ids: list[str] | None = None
) -> pd.DataFrame:
    n = len(labels)
    frame = pd.DataFrame(
        {"image_id": ids or [f"{i:064x}" for i in range(n)], "label": labels, "group_id": groups or [None] * n}
    )
    for name in ("split", "near_duplicate_of", "rejected"):
        frame[name] = None
    return frame.astype("str").astype({"image_id": "str"})


def shares(frame: pd.DataFrame) -> pd.DataFrame:
    return (
        pd.crosstab(frame["label"], frame["split"], normalize="index")
        .reindex(columns=["train", "val", "test"])
        .fillna(0)
    )


def test_fractions_hold_in_every_class() -> None:
    done = assign_splits(images(["a"] * 100 + ["b"] * 1000 + ["c"] * 10), OPTIONS, seed=0)
    np.testing.assert_allclose(shares(done), [[0.7, 0.1, 0.2]] * 3)


patients = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 25)), min_size=1, max_size=120)


@given(
    rows=patients,
    seed=st.integers(0, 5),
    twins=st.lists(st.tuples(st.integers(0, 119), st.integers(0, 119)), max_size=8),
)
@settings(max_examples=25, deadline=None)
def test_groups_never_straddle(rows: list[tuple[str, int]], seed: int, twins: list[tuple[int, int]]) -> None:
    frame = images([r[0] for r in rows], [f"p{r[1]}" for r in rows])
    for a, b in twins:
        if a < b < len(frame):
            frame.loc[b, "near_duplicate_of"] = frame.loc[a, "image_id"]
    done = assign_splits(frame, OPTIONS, seed)
    assert done["split"].notna().all()
    assert check_splits(done) == []
    assert done["split"].groupby(group_keys(done)).nunique().max() == 1
    for _, one_class in done.groupby("label"):
        if one_class.groupby(group_keys(done)).ngroups == len(one_class) >= 3 and done["label"].nunique() == 1:
            assert set(one_class["split"]) == {"train", "val", "test"}


@given(order=st.permutations(range(30)))
@settings(max_examples=8, deadline=None)
def test_order_of_rows_does_not_matter_but_the_seed_does(order: list[int]) -> None:
    frame = images(["a", "b"] * 15)
    first = assign_splits(frame, OPTIONS, seed=1)
    again = assign_splits(frame.iloc[order], OPTIONS, seed=1).sort_index()
    pd.testing.assert_frame_equal(first, again)
    assert (assign_splits(frame, OPTIONS, seed=2)["split"] != first["split"]).any()


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, {"train": 1}),
        (2, {"train": 1, "test": 1}),
        (3, {"train": 1, "test": 1, "val": 1}),
        (5, {"train": 3, "test": 1, "val": 1}),
    ],
)
def test_small_classes_train_first_then_test_then_val(n: int, expected: dict[str, int]) -> None:
    done = assign_splits(images(["rare"] * n + ["b"] * 50), OPTIONS, seed=0)
    assert done.loc[done["label"] == "rare", "split"].value_counts().to_dict() == expected


def test_what_has_a_split_keeps_it_and_draws_its_group() -> None:
    frame = images(["a"] * 40, ["p"] * 3 + [None] * 37)
    frame.loc[0, "split"] = "test"
    frame.loc[10, "split"] = "val"
    done = assign_splits(frame, OPTIONS, seed=0)
    assert done.loc[[0, 1, 2], "split"].tolist() == ["test"] * 3
    assert done.loc[10, "split"] == "val"
    assert done["split"].value_counts().to_dict() == {"train": 28, "test": 8, "val": 4}


def test_adding_images_moves_none() -> None:
    before = assign_splits(images(["a", "b"] * 40), OPTIONS, seed=0)
    frame = images(["a", "b"] * 60)
    frame.loc[before.index, "split"] = before["split"]
    after = assign_splits(frame, OPTIONS, seed=0)
    pd.testing.assert_series_equal(after.loc[before.index, "split"], before["split"])
    np.testing.assert_allclose(shares(after), [[0.7, 0.1, 0.2]] * 2, atol=0.02)


def test_rejected_images_get_no_split_and_take_no_room() -> None:
    frame = images(["a"] * 20)
    frame.loc[:9, "rejected"] = "truncated"
    done = assign_splits(frame, OPTIONS, seed=0)
    assert done.loc[:9, "split"].isna().all()
    assert done["split"].value_counts().to_dict() == {"train": 7, "test": 2, "val": 1}


def test_frames_and_chains_are_one_group() -> None:
    frame = images(["a"] * 5, ["p", "p", "q", None, None], ["x#0", "y", "z", "x#1", "w"])
    frame.loc[2, "near_duplicate_of"] = "y"
    keys = group_keys(frame)
    assert keys.tolist() == ["x#0", "x#0", "x#0", "x#0", "w"]


def test_validation_is_carved_out_of_train_only() -> None:
    frame = images(["a", "b"] * 50, [f"p{i // 4}" for i in range(100)])
    frame["split"] = ["train"] * 80 + ["test"] * 20
    done = carve(frame, ["val"], OPTIONS, seed=0)
    assert (done.loc[80:, "split"] == "test").all()
    assert check_splits(done) == []
    assert (done["split"] == "val").sum() in range(8, 13)  # a part of 0.1 / 0.8 of 80


def test_problems_are_named() -> None:
    frame = images(["a"] * 4, ["p1", "p1", "p2", "p2"])
    frame["split"] = ["train", "test", "val", "val"]
    assert check_splits(frame) == ["1 patient or group(s) lie in more than one split: 'p1'"]


@pytest.mark.parametrize("parts", [(0.7, 0.1, 0.1), (0.0, 0.5, 0.5), (1.2, -0.1, -0.1)])
def test_fractions_are_checked(parts: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigurationError, match="add up to 1"):
        SplitFractions(*parts)
