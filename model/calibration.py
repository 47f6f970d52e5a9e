"""Probabilities that mean what they say: one temperature, fitted on validation images only, kept with the model.

Guo et al. (ICML 2017): softmax(z / T) with the T that gives the validation images' true classes the highest
likelihood. T never changes which class is said. `calibration.json` stands beside the checkpoint and names the
checkpoint it belongs to; with T it keeps the validation images' confidences, from which a reject option is chosen.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from data_contracts.errors import CheckpointRefused, InputRefused
from data_contracts.files import sha256_of_file, write_text
from model.metrics import expected_calibration_error, reliability

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

CALIBRATION = "calibration.json"
FORMAT = "medmicn-calibration/1"

_LOWEST, _HIGHEST = 0.05, 20.0
"""Bounds of T: where the classifier is always right on validation images, no T is low enough."""
_SMALLEST = 1e-12
"""Probabilities are kept this far from 0 before their logarithm is taken."""


@dataclass(frozen=True)
class Calibration:
    """A temperature and what it was fitted to."""

    temperature: float
    n_images: int
    """Validation images that it was fitted to."""
    nll_before: float
    """Mean negative log-likelihood of the true class on them."""
    nll_after: float
    ece_before: float
    """Expected calibration error on them; on test images it is measured elsewhere."""
    ece_after: float
    confidences: tuple[float, ...]
    """Calibrated confidence of each validation image, ascending."""
    right: tuple[bool, ...]
    """Whether that image's class was right, in the same order."""

    def __call__(self, probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """(N, C) class probabilities at this temperature."""
        return at_temperature(probabilities, self.temperature).astype(np.float32)


def at_temperature(probabilities: Floats, temperature: float) -> Floats:
    """(N, C) softmax of log p / T, which is softmax(z / T) for the logits z that gave p."""
    scaled = np.log(np.maximum(probabilities, _SMALLEST, dtype=np.float64)) / temperature
    scaled -= scaled.max(1, keepdims=True)
    exponentials = np.exp(scaled)
    return exponentials / exponentials.sum(1, keepdims=True)


def negative_log_likelihood(y: Ints, probabilities: Floats) -> float:
    """Mean −log p of the true class; NaN for no image."""
    if not len(y):
        return float("nan")
    return float(-np.log(np.maximum(probabilities[np.arange(len(y)), y], _SMALLEST)).mean())


def fit_calibration(probabilities: Floats, y: Ints) -> Calibration:
    """The temperature for these validation images, (N, C) and (N,); raises `InputRefused` for none, or NaN."""
    if not len(y):
        raise InputRefused("calibration: expected validation images, got none; probabilities stay as they are.")
    if not np.isfinite(probabilities).all():
        raise InputRefused("calibration: expected finite probabilities, some are NaN; nothing was fitted.")

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(y, at_temperature(probabilities, float(np.exp(log_temperature))))

    found = minimize_scalar(loss, bounds=(np.log(_LOWEST), np.log(_HIGHEST)), method="bounded")
    temperature = float(np.exp(found.x))
    # As precise as predictions are, so that a threshold taken from these numbers means the same there.
    calibrated = at_temperature(probabilities, temperature).astype(np.float32)
    order = np.argsort(calibrated.max(1), kind="stable")
    return Calibration(
        temperature,
        len(y),
        negative_log_likelihood(y, probabilities),
        negative_log_likelihood(y, calibrated),
        expected_calibration_error(reliability(y, probabilities)),
        expected_calibration_error(reliability(y, calibrated)),
        tuple(float(c) for c in calibrated.max(1)[order]),
        tuple(bool(r) for r in (calibrated.argmax(1) == y)[order]),
    )


def save_calibration(folder: Path, calibration: Calibration) -> Path:
    """Write `calibration.json` for the checkpoint in `folder`; returns its path."""
    content: dict[str, Any] = {"format": FORMAT, "model_sha256": _model_hash(folder), **asdict(calibration)}
    path = folder / CALIBRATION
    write_text(path, json.dumps({**content, "sha256": _hash_of(content)}, indent=1, allow_nan=False))
    return path


def load_calibration(folder: Path) -> Calibration | None:
    """What `save_calibration` wrote; None where nothing was fitted. Raises `CheckpointRefused` if it was altered."""
    path = folder / CALIBRATION
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        stored, kind, model = content.pop("sha256"), content.pop("format"), content.pop("model_sha256")
        holds = stored == _hash_of({"format": kind, "model_sha256": model, **content})
        content |= {name: tuple(content[name]) for name in ("confidences", "right")}
        calibration = Calibration(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refused(path, f"expected a calibration as JSON ({str(error)[:120]})") from error
    if not holds or kind != FORMAT:
        raise _refused(path, "its own sha256 does not hold, or it is of another format")
    if model != _model_hash(folder):
        raise _refused(path, "it was fitted for another model than the one beside it")
    return calibration


def _model_hash(folder: Path) -> str:
    # config.json holds the hash of the weights, so its own hash names the whole checkpoint.
    return sha256_of_file(folder / "config.json")


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _refused(path: Path, what: str) -> CheckpointRefused:
    return CheckpointRefused(
        f"{path}: {what}; nothing was loaded.",
        remedy="Train again with `medmicn train`, or delete this file: probabilities are then not calibrated.",
    )
