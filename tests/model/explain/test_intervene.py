from __future__ import annotations

import numpy as np
import pytest

from data_contracts.errors import ContractViolation, InputRefused
from model.config import TrainConfig
from model.explain.intervene import intervene, with_implied
from model.fit import TrainedRun, train
from model.predict import Classifier


def test_a_correction_replaces_the_concept_and_all_follows_from_it(squares, trained: dict[str, TrainedRun]) -> None:
    classifier = Classifier.of(trained["dcr"])
    pixels = squares("blue-0")
    found = intervene(classifier, pixels, {"stripes": True, "reddish": True})
    assert found.before == classifier.predict([pixels])[0]
    assert found.corrections == {"stripes": True, "reddish": True, "bluish": False}
    said = found.after.concept_probabilities
    assert (said["stripes"], said["reddish"], said["bluish"]) == (1, 1, 0)
    assert said["bright"] == found.before.concept_probabilities["bright"]
    truths = {t.concept_id: t.truth for t in found.after.rule.terms}
    assert {truths[c] for c in truths if c != "bright"} <= {0.0, 1.0}
    assert found.after.class_probabilities != found.before.class_probabilities
    assert found.changes_class == (found.before.class_name != found.after.class_name)


def test_no_correction_changes_nothing(squares, trained: dict[str, TrainedRun]) -> None:
    found = intervene(Classifier.of(trained["paper"]), squares("red-1"), {})
    assert found.after == found.before
    assert found.corrections == {}


def test_naming_the_absence_of_a_value_implies_nothing_of_the_others(trained: dict[str, TrainedRun]) -> None:
    vocabulary = trained["dcr"].vocabulary
    assert with_implied({"reddish": False}, vocabulary) == {"reddish": False}
    assert with_implied({"stripes": True}, vocabulary) == {"stripes": True}


def test_contradictions_and_unknown_concepts_are_refused(squares, trained: dict[str, TrainedRun]) -> None:
    classifier, pixels = Classifier.of(trained["dcr"]), squares("red-1")
    with pytest.raises(InputRefused, match="colour: bluish and colour: reddish"):
        intervene(classifier, pixels, {"bluish": True, "reddish": True})
    with pytest.raises(ContractViolation, match="'sparkle' is unknown"):
        intervene(classifier, pixels, {"sparkle": True})


def test_a_system_without_concepts_says_that_there_is_nothing_to_correct(squares, cache_dir) -> None:
    config = TrainConfig(family="black-box", epochs=2, seeds=(0,), image_size_px=64)
    classifier = Classifier.of(train(squares.dataset(), squares, config, cache_dir=cache_dir))
    with pytest.raises(InputRefused, match="none to correct"):
        intervene(classifier, squares("red-1"), {"stripes": True})


def test_corrections_leave_the_classifier_as_it_was(squares, trained: dict[str, TrainedRun]) -> None:
    classifier, pixels = Classifier.of(trained["dcr"]), squares("red-1")
    before = classifier.predict([pixels])[0]
    intervene(classifier, pixels, {"stripes": True})
    assert classifier.predict([pixels])[0] == before
    assert np.isfinite(list(before.class_probabilities.values())).all()
