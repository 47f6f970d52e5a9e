from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import TrainConfig
from model.evaluate import evaluate, outputs_of, outputs_with_side, side_metrics
from model.fit import TrainedRun, fit, prepare_for
from model.outputs import Side, embeddings_of


def test_the_side_share_is_the_part_of_the_variation_that_passes_the_concepts_by() -> None:
    rng = np.random.default_rng(0)
    side, concepts = rng.normal(size=(5000, 3)), 2 * rng.normal(size=(5000, 3))
    offsets = rng.normal(size=(5000, 1)) + np.array([5.0, 0.0, -5.0])  # decide nothing: equal for all classes or images
    assert Side(side + concepts + offsets, side + offsets).share == pytest.approx(1 / 5, abs=0.02)
    assert Side(side, side).share == pytest.approx(1)
    assert Side(concepts, np.zeros_like(side)).share == 0
    assert np.isnan(Side(np.ones((4, 3)), np.zeros((4, 3))).share)


def test_metrics_tell_how_the_concepts_decide_alone(trained: dict[str, TrainedRun]) -> None:
    run = trained["paper"]
    rows = run.prepared.dataset.rows("test")
    y = run.prepared.dataset.class_index()[rows]
    outputs, side = outputs_with_side(run, run.seeds[0], rows)
    assert side is not None
    np.testing.assert_array_equal(side.logits.argmax(1), outputs.predicted)
    without = (side.logits - side.side_logits).argmax(1)
    metrics = evaluate(run).of(run.seeds[0].seed).metrics
    assert metrics["concepts_only_accuracy"] == pytest.approx((without == y).mean())
    assert metrics["side_share"] == pytest.approx(side.share)
    assert side_metrics(y, None) == {}


@pytest.mark.parametrize(("fusion", "has_side"), [("bottleneck", False), ("residual", True)])
def test_the_fusion_decides_what_passes_the_concepts_by(squares, cache_dir: Path, fusion: str, has_side: bool) -> None:
    config = TrainConfig(fusion=fusion, epochs=20, seeds=(0,), image_size_px=64)
    prepared, backbone = prepare_for([config], squares.dataset(), squares, cache_dir=cache_dir)
    run = fit(prepared, backbone, config)
    metrics = evaluate(run).evaluations[0].metrics
    assert metrics["accuracy"] > 0.8
    assert ("side_share" in metrics) == has_side
    if has_side:
        assert metrics["concepts_only_accuracy"] > 0.8  # concepts explain first
        assert metrics["side_share"] < 0.5


def test_embeddings_are_those_of_the_network_in_the_order_of_the_rows(trained: dict[str, TrainedRun]) -> None:
    run = trained["dcr"]
    rows = run.prepared.dataset.rows("test")[::-1].copy()
    found = embeddings_of(run.best.network, run.prepared.inputs, rows, torch.device("cpu"))
    with torch.no_grad():
        (features,) = run.prepared.inputs.batches([rows])
        expected = run.best.network(features).concepts.embeddings
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert outputs_of(run, run.best, rows[:0]).class_probabilities.shape == (0, 3)
