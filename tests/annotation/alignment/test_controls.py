"""Controls: what the honesty and leak tests look at."""

from __future__ import annotations

import numpy as np
import pytest

from annotation.alignment.adapt import cross_fit, fold_of
from annotation.alignment.controls import Controls, fitted_controls
from annotation.alignment.nulls import NullKind
from annotation.trust.honesty import Verdict, count_nulls, honesty_table, verdicts
from annotation.votes import Votes

N, N_FEATURES = 1200, 20
IDS = [f"i{i}" for i in range(N)]
RNG = np.random.default_rng(0)
CLASS = RNG.integers(0, 3, N)
FEATURES = RNG.standard_normal((N, N_FEATURES)) + 2 * np.eye(3, N_FEATURES)[CLASS]
FOLDS = fold_of(IDS, 5, 0)


def votes() -> Votes:
    """A visible concept answered with a quarter of errors, one answered at random, one from the class."""
    visible = (FEATURES[:, 5] > 0) ^ (RNG.random(N) < 0.25)
    columns = np.stack([visible, RNG.random(N) < 0.4, CLASS == 1], 1).astype(np.float32)
    return Votes(columns, np.ones_like(columns))


@pytest.fixture(scope="module")
def found() -> Controls:
    labels = dict(zip(IDS, np.array(["x", "y", "z"])[CLASS], strict=True))
    return fitted_controls(IDS, FEATURES, votes(), FOLDS, 5, labels=labels)


def test_a_concept_answered_at_random_fails_and_visible_ones_pass(found: Controls) -> None:
    counts = count_nulls(found.own, found.answers, found.nulls, strata=found.folds)
    table = honesty_table(counts, ["visible", "random", "from_class"])
    assert verdicts(table) == {
        "visible": Verdict.PASSES,
        "random": Verdict.FAILS,
        "from_class": Verdict.PASSES,  # it is visible: that it is the class is the leak test's matter
    }
    permuted = table[table["null"] == NullKind.PERMUTATION]
    assert permuted["null_auroc"].between(0.47, 0.53).all()


def test_heads_that_could_memorise_random_answers_pass_nothing() -> None:
    # Few images, many directions: a head passes for any answers on what it was fitted to, and so does its null.
    rng = np.random.default_rng(1)
    features, said = rng.standard_normal((300, 250)), (rng.random((300, 2)) < 0.5).astype(np.float32)
    ids = [f"j{i}" for i in range(300)]
    controls = fitted_controls(ids, features, Votes(said, np.ones_like(said)), fold_of(ids, 5, 0), 5)
    table = honesty_table(
        count_nulls(controls.own, controls.answers, controls.nulls, strata=controls.folds), ["a", "b"]
    )
    assert Verdict.PASSES not in verdicts(table).values()


def test_own_scores_are_those_of_the_cross_fit(found: Controls) -> None:
    again = cross_fit(FEATURES, Votes(found.answers.astype(np.float32), np.ones((N, 3), np.float32)), FOLDS, 5)
    assert np.corrcoef(again.held_out[:, 0], found.own[:, 0])[0, 1] == pytest.approx(1, abs=1e-6)


def test_the_class_score_is_the_rate_of_the_class_as_it_looks(found: Controls) -> None:
    assert found.class_score is not None
    score = found.class_score[:, 2]
    assert score[CLASS == 1].mean() - score[CLASS != 1].mean() > 0.5
    assert np.ptp(found.class_score[:, 1]) < 0.2  # random answers differ between no classes
    assert fitted_controls(IDS, FEATURES, votes(), FOLDS, 5, n_permutations=0).class_score is None
