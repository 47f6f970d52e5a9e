from __future__ import annotations

import io

import numpy as np
import pandas as pd
from PIL import Image

from pipeline.report.evidence_plots import intervention_curves_png, knock_out_png


def curves(orders: tuple[str, ...]) -> pd.DataFrame:
    rows = [
        (order, kind, n, 0.8 + sign * 0.02 * n, 0.7, 0.9)
        for order in orders
        for kind, sign in (("right", 1), ("wrong", -1))
        for n in range(5)
    ]
    return pd.DataFrame(rows, columns=["order", "corrections", "n_corrected", "accuracy", "low", "high"])


def losses(n: int) -> pd.DataFrame:
    drop = np.linspace(0.1, -0.01, n)
    return pd.DataFrame(
        {
            "concept": [f"a concept with quite a long name, number {k}" for k in range(n)],
            "drop": drop,
            "low": drop - 0.02,
            "high": drop + 0.02,
            "control": drop[::-1],
        }
    )


def size(png: bytes) -> tuple[int, int]:
    image = Image.open(io.BytesIO(png))
    assert np.asarray(image.convert("L")).std() > 1
    return image.size


def test_each_order_has_its_panel() -> None:
    one, three = (intervention_curves_png(curves(o)) for o in (("random",), ("random", "uncertainty", "utility")))
    assert size(three)[0] > 2 * size(one)[0]
    assert one == intervention_curves_png(curves(("random",)))  # the same numbers, the same bytes


def test_many_concepts_are_cut_to_the_largest_and_missing_intervals_are_left_out() -> None:
    assert size(knock_out_png(losses(25))) == size(knock_out_png(losses(80)))
    assert size(knock_out_png(losses(3)))[1] < size(knock_out_png(losses(25)))[1]
    assert knock_out_png(losses(3).assign(low=np.nan, high=np.nan)) != knock_out_png(losses(3))
