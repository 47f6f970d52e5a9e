from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from data_contracts.dataset import AlignedDataset
from data_contracts.errors import ImageRejected, RejectReason
from model.attacks import PixelNetwork, fgsm, pgd, uniform_noise
from model.backbones import Preprocessing
from model.corruptions import CORRUPTIONS, N_SEVERITIES
from model.fit import TrainedRun
from model.network import NetworkOutput
from model.predict import Classifier
from model.robustness import COLUMNS, all_perturbations, robustness
from model.subgroups import subgroup_metrics
from tests.model.conftest import VOCABULARY

PREPROCESS = Preprocessing(4, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Linear(48, 3)

    def forward(self, x: torch.Tensor) -> NetworkOutput:
        return NetworkOutput(self.weight(x.flatten(1)))


@pytest.fixture
def network() -> PixelNetwork:
    return PixelNetwork(Linear(), PREPROCESS)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def test_pixels_are_standardised_as_in_preprocessing(network: PixelNetwork) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    unit = torch.from_numpy(pixels).permute(2, 0, 1).float()[None] / 255
    torch.testing.assert_close(network.standardised(unit)[0], PREPROCESS(pixels))


def test_fgsm_moves_every_pixel_by_epsilon_against_the_class(network: PixelNetwork, x: torch.Tensor) -> None:
    y = torch.tensor([0, 1, 2, 0, 1])
    epsilon = 8 / 255
    moved = fgsm(network, x, y, epsilon)
    inside = (x > epsilon) & (x < 1 - epsilon)
    torch.testing.assert_close((moved - x).abs()[inside], torch.full_like(x, epsilon)[inside], rtol=0, atol=1e-6)
    assert moved.min() >= 0
    assert moved.max() <= 1
    # By hand for a linear network: the gradient of the loss is Wᵀ(p − onehot) / std.
    logits = network(x)
    error = logits.softmax(1) - torch.eye(3)[y]
    gradient = (error @ network.network.weight.weight).view_as(x) / network.std
    torch.testing.assert_close((moved - x).sign()[inside], gradient.sign()[inside])


def test_pgd_stays_in_the_cube_and_does_at_least_as_much_harm(network: PixelNetwork, x: torch.Tensor) -> None:
    y = torch.tensor([0, 1, 2, 0, 1])
    epsilon = 10 / 255
    moved = pgd(network, x, y, epsilon, generator=torch.Generator().manual_seed(0))
    assert (moved - x).abs().max() <= epsilon + 1e-6
    assert 0 <= moved.min() <= moved.max() <= 1
    loss = nn.functional.cross_entropy
    assert loss(network(moved), y) >= loss(network(fgsm(network, x, y, epsilon)), y) - 1e-3
    assert loss(network(moved), y) > loss(network(x), y)


def test_noise_of_radius_0_changes_nothing(x: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(uniform_noise(x, 0.0, generator=generator), x)
    assert 0.9 * 0.04 < (uniform_noise(x, 0.04, generator=generator) - x).abs().max() <= 0.04 + 1e-6


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_corruptions_grow_with_their_severity(name: str) -> None:
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:224, :224]
    pixels = (120 + 60 * np.sin(rows / 3)[..., None] + 50 * np.cos(columns / 5)[..., None] * [1, 0.5, 0.2]).clip(0, 255)
    image = pixels.astype(np.uint8)
    changed = [CORRUPTIONS[name](image, severity, rng) for severity in range(1, N_SEVERITIES + 1)]
    assert all(one.shape == image.shape and one.dtype == np.uint8 for one in changed)
    harm = [np.abs(one.astype(float) - image).mean() for one in changed]
    assert harm[0] > 0
    assert harm[-1] > harm[0]


def test_the_papers_strengths_are_all_there() -> None:
    found = {(p.name, p.strength) for p in all_perturbations() if p.name in {"fgsm", "pgd"}}
    assert found == {(name, n) for name in ("fgsm", "pgd") for n in (4, 6, 8, 10, 12)}
    assert [p.strength for p in all_perturbations() if p.name == "uniform noise"] == [0, 2, 4, 6, 8, 10]


def test_a_trained_classifier_is_measured_under_changes(squares, trained: dict[str, TrainedRun]) -> None:
    classifier, dataset = Classifier.of(trained["paper"]), squares.dataset()
    rows = dataset.rows("test")[:8]
    lost = dataset.image_ids[rows[3]]

    def read(image_id: str) -> np.ndarray:
        if image_id == lost:
            raise ImageRejected(RejectReason.TRUNCATED, "gone")
        return squares(image_id)

    chosen = [p for p in all_perturbations() if (p.name, p.strength) in {("fgsm", 8), ("pgd", 8)}]
    chosen += [p for p in all_perturbations() if p.name == "uniform noise"][:1]
    n_seen: list[int] = []
    table = robustness(classifier, dataset, read, rows, perturbations=chosen, advance=n_seen.append)
    assert list(table.columns) == list(COLUMNS)
    assert table["n"].eq(7).all()
    assert sum(n_seen) == 7 * 4
    by_name = table.set_index("perturbation")
    usable = np.array([r for r in rows if dataset.image_ids[r] != lost])
    expected = classifier.outputs([squares(dataset.image_ids[r]) for r in usable])
    assert by_name.loc["none", "accuracy"] == (expected.predicted == dataset.class_index()[usable]).mean()
    assert by_name.loc["none", ["same_class", "same_concepts", "map_correlation"]].tolist() == pytest.approx([1, 1, 1])
    assert by_name.loc["uniform noise", "concept_change"] == pytest.approx(0, abs=1e-6)
    assert by_name.loc["pgd", "accuracy"] <= by_name.loc["none", "accuracy"]
    assert by_name.loc["fgsm", "concept_change"] > 0
    again = robustness(classifier, dataset, read, rows, perturbations=chosen)
    pd.testing.assert_frame_equal(table, again)


def test_no_image_gives_an_empty_table(squares, trained: dict[str, TrainedRun]) -> None:
    table = robustness(Classifier.of(trained["paper"]), squares.dataset(), squares, np.zeros(0, np.int64))
    assert table.empty


# ---- subgroups -------------------------------------------------------------------------------------------------


class Said:
    """Outputs of N images that are right where told."""

    has_concepts = False

    def __init__(self, predicted: np.ndarray) -> None:
        self.predicted = predicted


def dataset_of(y: np.ndarray, groups: list[str | None] | None = None) -> AlignedDataset:
    n = len(y)
    frame = pd.DataFrame(
        {
            "image_id": [f"i{k}" for k in range(n)],
            "path": "x",
            "label": np.array(["a", "b"])[y],
            "split": "test",
            "group_id": groups or [None] * n,
        }
    )
    return AlignedDataset(frame, np.zeros((n, 4), np.float32), np.zeros((n, 4), bool), VOCABULARY, ("a", "b"))


def test_a_group_that_is_served_worse_is_found_and_others_are_not() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    dark = np.arange(400) < 100
    right = np.where(dark, rng.random(400) < 0.6, rng.random(400) < 0.95)
    columns = pd.DataFrame({"skin": np.where(dark, "dark", "light"), "site": np.where(np.arange(400) % 2, "x", "y")})
    found = subgroup_metrics(dataset_of(y), Said(np.where(right, y, 1 - y)), columns)
    table = found.table.set_index(["column", "value", "metric"])
    worse = table.loc["skin", "dark", "accuracy"]
    assert worse["estimate"] == pytest.approx(right[dark].mean())
    assert worse["difference"] == pytest.approx(right[dark].mean() - right[~dark].mean())
    assert worse["difference_high"] < 0
    assert worse["p_holm"] < 0.02
    assert worse["p"] <= worse["p_holm"]
    assert table.loc["site", "x", "accuracy"]["p_holm"] > 0.05


def test_a_small_group_is_shown_and_said_to_be_too_small() -> None:
    y = np.arange(60) % 2
    columns = pd.DataFrame({"site": ["a"] * 5 + ["b"] * 55, "empty": [None] * 60, "id": [f"p{n}" for n in range(60)]})
    found = subgroup_metrics(dataset_of(y), Said(y), columns)
    row = found.table.set_index(["value", "metric"]).loc["a", "accuracy"]
    assert row["estimate"] == 1
    assert "too small: 5 images" in row["note"]
    assert np.isnan(row["p"])
    assert [("empty" in w, "id" in w) for w in found.warnings] == [(True, False), (False, True)]


def test_numbers_are_cut_into_quarters_and_patients_stay_whole() -> None:
    y = np.arange(200) % 2
    ages = pd.DataFrame({"age": np.repeat(np.linspace(20, 90, 50), 4)})
    patients = [f"p{n // 4}" for n in range(200)]
    found = subgroup_metrics(dataset_of(y, patients), Said(y), ages)
    assert found.table["value"].nunique() == 4
    assert found.table["n_groups"].between(11, 14).all()
    assert found.table.loc[found.table["metric"] == "accuracy", "p"].eq(1).all()
