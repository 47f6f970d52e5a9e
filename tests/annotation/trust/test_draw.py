"""The draw of cells: size, spread and probabilities, however the labels are cut into shards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest

from annotation.trust.draw import COLUMNS, DESIGN_COLUMNS, SHEET_COLUMNS, DrawOptions, LabelShards, draw
from data_contracts.concepts import Concept, Vocabulary

N = 900
IDS = [f"image-{i:04d}" for i in range(N)]
VOCABULARY = Vocabulary.of([Concept("good", "good", "Seen well."), Concept("bad", "bad", "Seen badly.")])
IMAGES = pd.DataFrame(
    {
        "image_id": IDS,
        "path": [f"{i}.png" for i in IDS],
        "label": np.where(np.arange(N) % 3 == 0, "x", "y"),
        "split": np.where(np.arange(N) < 700, "train", "test"),
        "rejected": [None] * (N - 1) + ["truncated"],
    }
)


def machine_labels() -> pd.DataFrame:
    """Labels sure of `good`, unsure of `bad`."""
    rng = np.random.default_rng(0)
    probability = np.stack([rng.beta(0.3, 0.6, N), rng.beta(2, 2, N)], 1)
    return pd.DataFrame(
        {
            "image_id": np.repeat(IDS, 2),
            "concept_id": np.tile(VOCABULARY.ids, N),
            "probability": probability.ravel(),
            "decided_by": "vlm",
            "disagreement": rng.random(2 * N) * np.tile([0.3, 1.0], N),
        }
    )


def in_shards(labels: pd.DataFrame, n_rows: int) -> LabelShards:
    def shards() -> Iterator[pd.DataFrame]:
        for start in range(0, len(labels), n_rows):
            yield labels.iloc[start : start + n_rows].astype({"image_id": "category", "concept_id": "category"})

    return shards


def drawn(n_cells: int = 200, seed: int = 0) -> pd.DataFrame:
    return draw(lambda: [machine_labels()], IMAGES, VOCABULARY, DrawOptions(n_cells=n_cells, seed=seed))


@pytest.mark.parametrize("n_cells", [40, 600])
@pytest.mark.parametrize("n_rows", [61, 1000])
def test_the_draw_does_not_depend_on_how_the_labels_are_cut(n_cells: int, n_rows: int) -> None:
    options = DrawOptions(n_cells=n_cells, seed=3)
    found = draw(in_shards(machine_labels(), n_rows), IMAGES, VOCABULARY, options)
    pd.testing.assert_frame_equal(found, draw(lambda: [machine_labels()], IMAGES, VOCABULARY, options))


def test_the_labels_are_gone_through_twice_and_no_more() -> None:
    passes = []

    def shards() -> Iterator[pd.DataFrame]:
        passes.append(1)
        yield machine_labels()

    draw(shards, IMAGES, VOCABULARY, DrawOptions())
    assert len(passes) == 2


@pytest.mark.parametrize("n_cells", [30, 110])
def test_every_cell_is_drawn_as_often_as_its_probability_says(n_cells: int) -> None:
    """With few cells in each stratum, some of them certain, and so many draws that each cell's weight shows."""
    labels = machine_labels().query("concept_id == 'bad'").head(120).reset_index(drop=True)
    labels.loc[:5, "disagreement"] = 1.0
    weight = pd.Series(0.0, labels["image_id"])
    n_draws = 300
    for seed in range(n_draws):
        cells = draw(lambda: [labels], IMAGES, VOCABULARY, DrawOptions(n_cells=n_cells, seed=seed, even_share=0.5))
        assert len(cells) == n_cells
        weight[cells["image_id"]] += 1 / cells["inclusion_probability"].to_numpy()
    found = weight / n_draws
    # A weight of at most 8 has a standard error of 0.16 here.
    assert found.mean() == pytest.approx(1, abs=0.015)
    assert found.min() > 0.4
    assert found.max() < 1.6


def test_neighbours_in_the_table_are_drawn_together_as_chance_has_it() -> None:
    labels = machine_labels().query("concept_id == 'good'").assign(probability=0.1, disagreement=0.5)
    images = IMAGES.assign(label="one class", split="train")
    gaps = []
    for seed in range(30):
        cells = draw(lambda: [labels], images, VOCABULARY, DrawOptions(n_cells=90, seed=seed))
        at = np.sort(cells["image_id"].str[-4:].astype(int).to_numpy())
        gaps.append((np.diff(at) <= 2).mean())
    # A systematic draw along the table would never take two of ten neighbours.
    assert np.mean(gaps) == pytest.approx(1 - 0.9**2, abs=0.04)


def test_the_draw_has_the_asked_size_once_each_and_no_test_or_rejected_image() -> None:
    cells = drawn()
    assert list(cells.columns) == COLUMNS
    assert len(cells) == 200
    assert not cells.duplicated(["image_id", "concept_id"]).any()
    assert set(cells["image_id"]) <= set(IDS[:700])
    assert set(cells["answer"]) == {""}
    assert set(cells["definition"]) == {"Seen well.", "Seen badly."}


def test_the_draw_is_seeded() -> None:
    pd.testing.assert_frame_equal(drawn(), drawn())
    assert not drawn(seed=1)["image_id"].equals(drawn()["image_id"])


def test_inclusion_probabilities_stand_for_the_whole_population() -> None:
    totals = [(1 / drawn(seed=seed)["inclusion_probability"]).sum() for seed in range(20)]
    assert np.mean(totals) == pytest.approx(700 * 2, rel=0.02)


def test_the_sheet_shows_nothing_that_depends_on_the_machine() -> None:
    assert not set(SHEET_COLUMNS) & {"stratum", "inclusion_probability", "round"}
    assert set(COLUMNS) == set(SHEET_COLUMNS) | set(DESIGN_COLUMNS)


def test_no_cell_stands_for_more_than_the_even_share_allows() -> None:
    even = draw(lambda: [machine_labels()], IMAGES, VOCABULARY, DrawOptions(even_share=1))
    assert even.groupby("stratum")["inclusion_probability"].nunique().max() == 1
    labels = machine_labels().assign(disagreement=np.where(np.arange(2 * N) % 40 == 0, 1.0, 0.0), probability=0.01)
    n_of_concept = 700
    mixed = draw(lambda: [labels], IMAGES, VOCABULARY, DrawOptions(n_cells=100))
    n_drawn = mixed["concept_id"].map(mixed["concept_id"].value_counts())
    assert mixed["inclusion_probability"].nunique() > 1
    assert (1 / mixed["inclusion_probability"] <= 2 * n_of_concept / n_drawn + 1e-6).all()


def test_cells_whose_answer_changes_more_are_asked_more_often() -> None:
    n = 2000
    labels = pd.DataFrame(
        {
            "image_id": [f"i{i:04d}" for i in range(n)],
            "concept_id": "good",
            "probability": 0.2,
            "decided_by": "vlm",
            "disagreement": np.where(np.arange(n) < n // 2, 0.9, 0.0),
        }
    )
    images = labels[["image_id"]].assign(path="p", label="x", split="train", rejected=None)
    cells = draw(lambda: [labels], images, VOCABULARY, DrawOptions(n_cells=300))
    disputed = cells["image_id"].isin(labels["image_id"][: n // 2])
    assert disputed.mean() > 0.55
    weight = 1 / cells["inclusion_probability"]
    assert weight[disputed].sum() / weight.sum() == pytest.approx(0.5, abs=0.02)


def test_a_second_round_asks_new_cells_of_what_is_needed_only() -> None:
    first = drawn(100)
    more = draw(lambda: [machine_labels()], IMAGES, VOCABULARY, DrawOptions(n_cells=80), asked=first, need={"bad": 1.0})
    assert set(more["concept_id"]) == {"bad"}
    assert set(more["round"]) == {2}
    assert len(more) == 80
    assert more.merge(first, on=["image_id", "concept_id"]).empty
    assert not set(more["stratum"]) & set(first["stratum"])


def test_both_classes_and_every_stratum_are_asked() -> None:
    cells = drawn().merge(IMAGES[["image_id", "label"]], on="image_id")
    assert cells.groupby("stratum")["label"].nunique().min() == 2
    assert cells["concept_id"].value_counts().min() > 50


def test_asking_for_more_than_there_is_gives_everything() -> None:
    cells = drawn(10_000)
    assert len(cells) == 1400
    assert set(cells["inclusion_probability"]) == {1.0}


def test_cells_a_person_decided_are_not_asked_again() -> None:
    labels = machine_labels()
    labels.loc[:1399, "decided_by"] = np.where(np.arange(1400) % 2 == 0, "expert", "given")
    assert draw(lambda: [labels], IMAGES, VOCABULARY, DrawOptions()).empty
