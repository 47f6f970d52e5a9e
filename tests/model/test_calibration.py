from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import log_loss

from data_contracts.errors import CheckpointRefused, ConfigurationError, InputRefused
from model.calibration import (
    Calibration,
    at_temperature,
    fit_calibration,
    load_calibration,
    negative_log_likelihood,
    save_calibration,
)
from model.reject import (
    area_under_risk,
    at_threshold,
    choose_reject,
    coverage_risk,
    threshold_for_coverage,
    threshold_for_risk,
)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def overconfident() -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from softmax(z), predictions softmax(3 z): the right temperature is 3."""
    rng = np.random.default_rng(0)
    z = rng.normal(0, 1.5, (6000, 4))
    y = np.array([rng.choice(4, p=p) for p in softmax(z)])
    return softmax(3 * z), y


def test_the_temperature_that_made_probabilities_wrong_is_found(overconfident) -> None:
    p, y = overconfident
    found = fit_calibration(p, y)
    assert found.temperature == pytest.approx(3, rel=0.06)
    assert found.ece_after < 0.03
    assert found.ece_before > 0.1
    assert found.nll_before == pytest.approx(log_loss(y, p), rel=1e-6)
    assert found.nll_after == pytest.approx(log_loss(y, found(p)), rel=1e-5)
    assert found.nll_after < found.nll_before


def test_a_temperature_divides_the_logits_and_keeps_the_class() -> None:
    z = np.random.default_rng(1).normal(0, 4, (50, 3))
    np.testing.assert_allclose(at_temperature(softmax(z), 2.5), softmax(z / 2.5), atol=1e-9)
    sure = np.array([[1.0, 0.0]])
    assert np.isfinite(at_temperature(sure, 3)).all()


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(InputRefused, match="got none"):
        fit_calibration(np.zeros((0, 2)), np.zeros(0, np.int64))
    with pytest.raises(InputRefused, match="NaN"):
        fit_calibration(np.array([[np.nan, 1.0]]), np.array([0]))
    assert np.isnan(negative_log_likelihood(np.zeros(0, np.int64), np.zeros((0, 2))))


@pytest.fixture
def folder(tmp_path: Path, overconfident) -> Path:
    (tmp_path / "config.json").write_text("{}")
    save_calibration(tmp_path, fit_calibration(overconfident[0][:100], overconfident[1][:100]))
    return tmp_path


def test_it_comes_back_as_it_was_stored(folder: Path, overconfident) -> None:
    assert load_calibration(folder) == fit_calibration(overconfident[0][:100], overconfident[1][:100])
    (folder / "calibration.json").unlink()
    assert load_calibration(folder) is None


def test_a_tampered_file_is_refused(folder: Path) -> None:
    path = folder / "calibration.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"temperature": 0.5}))
    with pytest.raises(CheckpointRefused, match="sha256 does not hold"):
        load_calibration(folder)
    path.write_text("[1, 2]")
    with pytest.raises(CheckpointRefused, match="as JSON"):
        load_calibration(folder)


def test_it_is_not_used_for_another_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"seed": 1}')
    with pytest.raises(CheckpointRefused, match="another model"):
        load_calibration(folder)


# ---- reject ----------------------------------------------------------------------------------------------------


def calibration_of(confidences: np.ndarray, right: np.ndarray) -> Calibration:
    order = np.argsort(confidences)
    return Calibration(1.0, len(right), 1, 1, 0, 0, tuple(confidences[order].tolist()), tuple(right[order].tolist()))


def test_the_threshold_for_a_coverage_keeps_that_share() -> None:
    confidences = np.linspace(0.5, 0.99, 50)
    for coverage in (0.02, 0.5, 0.9, 1.0):
        kept = (confidences >= threshold_for_coverage(confidences, coverage)).mean()
        assert kept == pytest.approx(coverage)


def test_a_promised_risk_is_kept_on_new_images() -> None:
    rng = np.random.default_rng(3)
    broken = 0
    for _ in range(100):
        confidences = rng.random(400)
        right = rng.random(400) < confidences
        try:
            threshold = threshold_for_risk(confidences, right, 0.2)
        except ConfigurationError:
            continue
        true_risk = 1 - (1 + threshold) / 2  # E[1 − c | c ≥ t] for c uniform
        broken += true_risk > 0.2
    assert broken <= 10  # 5 % are promised


def test_a_risk_that_cannot_be_shown_is_said() -> None:
    right = np.arange(30) % 3 > 0
    with pytest.raises(ConfigurationError, match="30 validation images"):
        threshold_for_risk(np.linspace(0.4, 0.9, 30), right, 0.01)


def test_an_image_below_the_threshold_says_why() -> None:
    calibration = calibration_of(np.linspace(0.5, 0.99, 50), np.ones(50, bool))
    reject = choose_reject(calibration, coverage=0.8)
    assert reject is not None
    assert reject.says(0.95) is None
    assert "too uncertain: confidence 0.51" in str(reject.says(0.51))
    assert choose_reject(calibration) is None
    with pytest.raises(ConfigurationError, match="one of them"):
        choose_reject(calibration, coverage=0.8, max_risk=0.1)
    with pytest.raises(ConfigurationError, match=r"calibration\.json"):
        choose_reject(None, coverage=0.8)


def test_the_curve_runs_from_all_images_to_the_surest() -> None:
    confidences = np.array([0.9, 0.8, 0.7, 0.6])
    right = np.array([True, True, False, False])
    curve = coverage_risk(confidences, right, "test")
    assert curve["coverage"].tolist() == [1.0, 0.75, 0.5, 0.25]
    assert curve["risk"].tolist() == pytest.approx([0.5, 1 / 3, 0, 0])
    assert area_under_risk(confidences, right) == pytest.approx((0 + 0 + 1 / 3 + 0.5) / 4)
    assert at_threshold(confidences, right, 0.75, "test")["n_accepted"].item() == 2
