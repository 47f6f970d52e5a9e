from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from model.evaluate import measure
from model.outputs import Outputs
from model.resampling import clusters_of, metrics_of, resamples, strata_of, values_of


@pytest.fixture
def said(squares) -> Outputs:
    """Answers with ties, some wrong."""
    rng = np.random.default_rng(1)
    dataset = squares.dataset()
    n, k, c = len(dataset), len(dataset.vocabulary), 3
    classes = rng.random((n, c)) + np.eye(c)[dataset.class_index()]
    rules = rng.random((n, c)).round(1) + np.eye(c)[dataset.class_index()]
    concepts = (0.6 * dataset.concepts + 0.4 * rng.random((n, k))).round(1)
    classes = (classes / classes.sum(1, keepdims=True)).astype(np.float32)
    return Outputs(classes, concepts.astype(np.float32), np.zeros((n, k, c)), np.zeros((n, k, c)), rules / 2)


def test_every_metric_of_every_resample_is_what_the_evaluation_gives_of_its_images(squares, said: Outputs) -> None:
    dataset = squares.dataset()
    metrics = metrics_of(dataset, said)
    weights = np.concatenate(list(resamples(clusters_of(dataset), dataset.class_index(), 3)))
    for drawn in [np.ones(len(dataset)), *weights]:
        rows = np.repeat(np.arange(len(dataset)), drawn.astype(int))
        expected = measure(dataset.take(rows), Outputs(*(part[rows] for part in said)), 0, "").metrics
        for name, metric in metrics.items():
            found = values_of(metric, drawn[None])[0]
            assert found == pytest.approx(expected[name], abs=1e-6), name
    assert {"concept_macro_f1", "rule_agreement", "brier"} <= set(metrics)


def test_resamples_keep_patients_together_and_classes_as_large(squares) -> None:
    dataset = squares.dataset()
    patients = np.array([f"patient {n // 9}-{j}" for n, j in enumerate(dataset.class_index())])
    grouped = replace(dataset, frame=dataset.frame.assign(group_id=patients))
    clusters, y = clusters_of(grouped), grouped.class_index()
    assert clusters.max() + 1 == 30
    weights = np.concatenate(list(resamples(clusters, y, 50)))
    for drawn in weights:
        for name in np.unique(patients):
            assert len(set(drawn[patients == name])) == 1
        assert np.bincount(y, drawn).tolist() == np.bincount(y).tolist()
    assert weights.std() > 0


def test_images_without_a_patient_are_clusters_of_their_own(squares) -> None:
    dataset = squares.dataset()
    some = np.where(np.arange(len(dataset)) < 6, "p", None)
    clusters = clusters_of(replace(dataset, frame=dataset.frame.assign(group_id=some)))
    assert clusters.max() + 1 == len(dataset) - 5
    assert len(set(clusters[:6])) == 1


def test_a_patient_of_two_classes_counts_to_the_one_it_has_more_of() -> None:
    assert strata_of(np.array([0, 0, 0, 1]), np.array([1, 1, 0, 0])).tolist() == [1, 0]
