from __future__ import annotations

import pytest
import torch

from model.config import TrainConfig
from model.losses import Targets
from model.training_interventions import drawn_intervention


def targets(n: int = 400) -> Targets:
    torch.manual_seed(0)
    return Targets(torch.zeros(n, dtype=torch.int64), torch.rand(n, 10).round(), torch.rand(n, 10) < 0.7)


def test_randint_tells_known_labels_with_the_probability_asked_for() -> None:
    known = targets()
    drawn = drawn_intervention(known, TrainConfig(randint_probability=0.25))
    assert drawn is not None
    assert not (drawn.where & ~known.mask).any()
    assert torch.equal(drawn.values[drawn.where], known.concepts[drawn.where])
    assert drawn.where[known.mask].float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_concept_dropout_hides_any_concept_and_says_nothing() -> None:
    known = targets()
    drawn = drawn_intervention(known, TrainConfig(concept_dropout=0.4))
    assert drawn is not None
    assert (drawn.values[drawn.where] == 0.5).all()
    assert drawn.where.float().mean().item() == pytest.approx(0.4, abs=0.03)


def test_both_together_never_meet() -> None:
    known = targets()
    drawn = drawn_intervention(known, TrainConfig(randint_probability=0.5, concept_dropout=0.5))
    assert drawn is not None
    told = drawn.where & (drawn.values != 0.5)
    assert torch.equal(drawn.values[told], known.concepts[told])
    assert told[known.mask].float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert drawn.where[known.mask].all()


def test_where_both_are_off_nothing_is_drawn() -> None:
    known = targets()
    before = torch.get_rng_state()
    assert drawn_intervention(known, TrainConfig()) is None
    assert torch.equal(torch.get_rng_state(), before)
