from __future__ import annotations

import doctest
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import model
from data_contracts.errors import CheckpointRefused, ConfigurationError, ContractViolation, InputRefused
from model import api
from model.api import as_pixels
from model.calibration import fit_calibration, save_calibration
from model.checkpoint import save_run
from model.evaluate import outputs_of
from model.fit import TrainedRun
from model.predict import Classifier
from model.reject import Reject


@pytest.fixture(scope="module")
def folder(trained: dict[str, TrainedRun], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a calibration fitted to validation images."""
    run = trained["dcr"]
    path = tmp_path_factory.mktemp("model")
    save_run(path, run, {})
    rows = run.prepared.dataset.rows("val")
    outputs = outputs_of(run, run.best, rows)
    save_calibration(path, fit_calibration(outputs.class_probabilities, run.prepared.dataset.class_index()[rows]))
    return path


def test_the_example_of_the_docstring_works(folder: Path, squares) -> None:
    names = {"folder": folder, "image": squares("striped-2"), "concept": "stripes"}
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    (example,) = finder.find(sys.modules[api.__name__], globs=names)
    results = runner.run(example)
    assert results.attempted >= 6
    assert results.failed == 0


def test_probabilities_are_calibrated_and_the_class_stays(folder: Path, squares) -> None:
    loaded = model.load(folder)
    images = [squares(i) for i in ("striped-2", "red-1", "blue-0")]
    plain = replace(loaded.classifier, calibration=None).predict(images)
    found = loaded.predict(images)
    temperature = loaded.classifier.calibration.temperature
    for before, after in zip(plain, found, strict=True):
        assert before.class_name == after.class_name
        p = np.array(list(before.class_probabilities.values())) ** (1 / temperature)
        np.testing.assert_allclose(list(after.class_probabilities.values()), p / p.sum(), atol=1e-5)
        assert after.concept_probabilities == pytest.approx(before.concept_probabilities)


def test_more_images_than_a_batch_and_a_batch_of_one_give_the_same(folder: Path, squares) -> None:
    loaded = model.load(folder)
    images = [squares(squares.ids[n]) for n in range(40)]
    many = loaded.predict(images)
    assert len(many) == 40
    (one,) = loaded.predict(images[37:38])
    assert one.class_probabilities == pytest.approx(many[37].class_probabilities, abs=1e-5)
    assert loaded.predict([]) == []


def test_uncertain_images_are_rejected_with_a_reason(folder: Path, squares) -> None:
    loaded = model.load(folder)
    images = [squares(i) for i in squares.ids[:30]]
    found = loaded.predict(images, coverage=0.5)
    limit = np.median(loaded.classifier.calibration.confidences)
    assert all((p.rejected is None) == (p.confidence >= limit - 1e-6) for p in found)
    with pytest.raises(ConfigurationError, match="validation images"):
        loaded.predict(images, max_risk=0.0001)
    (kept,) = loaded.classifier.predict(images[:1], reject=Reject(0.0, ""))
    assert kept.rejected is None


def test_pictures_of_any_kind_become_the_same_pixels(squares) -> None:
    pixels = squares("red-1")
    np.testing.assert_array_equal(as_pixels(Image.fromarray(pixels)), pixels)
    np.testing.assert_array_equal(as_pixels(np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])), pixels)
    grey = as_pixels(pixels[..., 0])
    assert grey.shape == pixels.shape
    for wrong in (pixels / 255.0, pixels[None], pixels[..., :2], np.zeros((0, 3), np.uint8)):
        with pytest.raises(InputRefused, match="image 3"):
            as_pixels(wrong, 3)


def test_names_and_ids_of_concepts_are_understood_and_others_refused(folder: Path, squares) -> None:
    loaded = model.load(folder)
    by_name = loaded.intervene(squares("red-1"), {"colour: reddish": False})
    by_id = loaded.intervene(squares("red-1"), {"reddish": False})
    assert by_name.after.class_probabilities == by_id.after.class_probabilities
    with pytest.raises(ContractViolation, match="'wings' is unknown"):
        loaded.intervene(squares("red-1"), {"wings": True})
    assert loaded.concepts["reddish"] == "colour: reddish"


def test_a_tampered_model_is_refused_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    for name in ("weights.safetensors", "calibration.json", "vocabulary.json"):
        copy = tmp_path / name
        copy.mkdir()
        for path in folder.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(bytes(data))
        with pytest.raises(CheckpointRefused, match="nothing was loaded"):
            model.load(copy)


def test_what_a_system_lacks_is_left_out(folder: Path) -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = model.nothing
    assert isinstance(model.load(folder).classifier, Classifier)
