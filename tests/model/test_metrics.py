from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.functional.classification import multiclass_calibration_error

from model import metrics as m


@pytest.fixture
def said() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    y = rng.integers(0, 4, 500)
    scores = rng.normal(size=(500, 4)) + 1.5 * np.eye(4)[y]
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    return y, probabilities.round(2) / probabilities.round(2).sum(1, keepdims=True)  # rounding makes ties


def test_counts_agree_with_scikit_learn(said: tuple[np.ndarray, np.ndarray]) -> None:
    y, probabilities = said
    predicted = probabilities.argmax(1)
    confusion = m.confusion_matrix(y, predicted, 4)
    scores = m.per_class(confusion)
    precision, recall, f1, support = sk.precision_recall_fscore_support(y, predicted)
    assert (confusion == sk.confusion_matrix(y, predicted)).all()
    assert m.accuracy(confusion) == pytest.approx(sk.accuracy_score(y, predicted))
    for ours, theirs in zip(scores, (precision, recall, f1, support), strict=True):
        np.testing.assert_allclose(ours, theirs)
    assert m.mean_defined(scores.f1) == pytest.approx(sk.f1_score(y, predicted, average="macro"))


def test_auroc_agrees_with_scikit_learn_ties_included(said: tuple[np.ndarray, np.ndarray]) -> None:
    y, probabilities = said
    ours = m.class_auroc(y, probabilities)
    assert ours.mean() == pytest.approx(sk.roc_auc_score(y, probabilities, multi_class="ovr"))


def test_calibration_agrees_with_torchmetrics_and_scikit_learn(said: tuple[np.ndarray, np.ndarray]) -> None:
    y, probabilities = said
    theirs = multiclass_calibration_error(torch.tensor(probabilities), torch.tensor(y), num_classes=4, n_bins=m.N_BINS)
    assert m.expected_calibration_error(m.reliability(y, probabilities)) == pytest.approx(theirs.item(), abs=1e-6)
    assert m.brier(y, probabilities) == pytest.approx(sk.brier_score_loss(y, probabilities, scale_by_half=False))


def test_concept_metrics_agree_with_scikit_learn_on_the_usable_cells() -> None:
    rng = np.random.default_rng(5)
    c = rng.random((200, 6))
    mask = rng.random((200, 6)) < 0.7
    probabilities = np.clip(c + rng.normal(0, 0.4, c.shape), 0, 1)
    auroc, f1, accuracy = (f(c, mask, probabilities) for f in (m.concept_auroc, m.concept_f1, m.concept_accuracy))
    for k in range(6):
        truth, score = c[mask[:, k], k] >= 0.5, probabilities[mask[:, k], k]
        assert auroc[k] == pytest.approx(sk.roc_auc_score(truth, score))
        assert f1[k] == pytest.approx(sk.f1_score(truth, score >= 0.5))
        assert accuracy[k] == pytest.approx(sk.accuracy_score(truth, score >= 0.5))


def test_attribute_macro_f1_is_scikit_learns_over_the_values_of_each_attribute() -> None:
    rng = np.random.default_rng(7)
    values = rng.integers(0, 3, 300)
    c = np.concatenate([np.eye(3)[values], rng.integers(0, 2, (300, 1))], axis=1)
    mask = np.ones_like(c, dtype=bool)
    mask[:40, 1] = False
    c[40:60, :3] = 0  # no value of the attribute is true: not judged
    said = 0.5 * c + 0.5 * rng.random(c.shape)
    ours = m.attribute_macro_f1(c, mask, said, [[0, 1, 2], [3]])
    judged = slice(60, None)
    assert ours[0] == pytest.approx(sk.f1_score(values[judged], said[judged, :3].argmax(1), average="macro"))
    assert ours[1] == pytest.approx(sk.f1_score(c[:, 3], said[:, 3] >= 0.5, average="macro"))
    assert np.isnan(m.attribute_macro_f1(c, np.zeros_like(mask), said, [[0, 1, 2], [3]])).all()


def test_a_class_missing_from_the_split_is_null_and_leaves_the_macro_average() -> None:
    y, predicted = np.array([0, 0, 1, 1]), np.array([0, 2, 1, 1])
    scores = m.per_class(m.confusion_matrix(y, predicted, 3))
    assert np.isnan([scores.precision[2], scores.recall[2], scores.f1[2]]).all()
    assert m.mean_defined(scores.f1) == pytest.approx((2 / 3 + 1) / 2)
    assert np.isnan(m.class_auroc(y, np.eye(3)[predicted])[2])


def test_a_class_never_predicted_has_zero_precision() -> None:
    scores = m.per_class(m.confusion_matrix(np.array([0, 1]), np.array([0, 0]), 2))
    assert (scores.precision[1], scores.recall[1], scores.f1[1]) == (0, 0, 0)


def test_constant_and_fully_masked_concepts_are_null() -> None:
    c = np.array([[1.0, 0.0], [1.0, 1.0]])
    mask = np.array([[True, False], [True, False]])
    assert np.isnan(m.concept_auroc(c, mask, c)).all()
    assert np.isnan(m.concept_f1(c, mask, c)[1])
    assert np.isnan(m.concept_accuracy(c, mask, c)[1])


def test_an_empty_split_is_null_everywhere() -> None:
    y, probabilities = np.zeros(0, dtype=np.int64), np.zeros((0, 3))
    assert np.isnan(m.accuracy(m.confusion_matrix(y, y, 3)))
    assert np.isnan(m.brier(y, probabilities))
    assert np.isnan(m.expected_calibration_error(m.reliability(y, probabilities)))
    assert np.isnan(m.mean_defined(np.array([])))
