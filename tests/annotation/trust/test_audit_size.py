from __future__ import annotations

import numpy as np
import pytest

from annotation.trust.agreement import kappa_interval
from annotation.trust.audit_size import cells_to_settle


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
def test_so_many_cells_part_a_kappa_of_seven_tenths_from_four(share: float) -> None:
    n = cells_to_settle(np.array([share]))
    chance = share**2 + (1 - share) ** 2
    wrong = 0.3 * (1 - chance) / 2
    table = np.array([share - wrong, wrong, wrong, 1 - share - wrong])
    assert kappa_interval(*(table * n)).low >= 0.4
    assert kappa_interval(*(table * (n - 11))).low < 0.4


def test_concepts_add_up_and_unlabelled_ones_ask_for_nothing() -> None:
    one = cells_to_settle(np.array([0.5]))
    assert cells_to_settle(np.array([0.5, np.nan])) == one
    assert 5 * one - 50 <= cells_to_settle(np.full(5, 0.5)) <= 5 * one
    assert cells_to_settle(np.array([0.01])) == cells_to_settle(np.array([0.1]))
