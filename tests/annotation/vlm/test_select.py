from __future__ import annotations

import numpy as np
import pytest

from annotation.vlm.measure import Measurements
from annotation.vlm.select import select_concepts


def images(n: int, seed: int, **means: float) -> list[Measurements]:
    random = np.random.default_rng(seed)
    return [{name: float(random.normal(mean, 1.0)) for name, mean in means.items()} for _ in range(n)]


def test_what_tells_the_class_apart_is_chosen_with_a_cut_between_the_groups() -> None:
    own = images(12, 0, area_percent=25, red_share_percent=40)
    others = images(24, 1, area_percent=8, red_share_percent=40)
    best = select_concepts(own, others)[0]
    assert best.attribute.quantity == "area_percent"
    assert best.is_telling
    assert best.cut == pytest.approx(16.5, abs=4)


def test_the_cut_does_not_depend_on_which_class_asks() -> None:
    own, others = images(12, 0, area_percent=25, grain=2), images(12, 1, area_percent=8, grain=9)
    cuts = {c.attribute.quantity: c.cut for c in (*select_concepts(own, others), *select_concepts(others, own))}
    assert set(cuts) == {"area_percent", "grain"}
    assert cuts["area_percent"] == select_concepts(own, others)[0].cut


def test_of_two_that_say_the_same_the_plainer_is_chosen() -> None:
    own, others = images(12, 0, area_percent=25), images(24, 1, area_percent=8)
    for image in (*own, *others):
        image["blueness"] = 2 * image["area_percent"]
    assert [c.attribute.quantity for c in select_concepts(own, others)] == ["area_percent"]


def test_the_image_as_a_whole_never_comes_before_what_is_in_it() -> None:
    own = images(12, 0, image_lightness=70, area_percent=14)
    others = images(24, 1, image_lightness=40, area_percent=11)
    assert select_concepts(own, others)[0].attribute.quantity == "area_percent"


def test_what_most_images_do_not_have_is_not_proposed() -> None:
    own, others = images(12, 0, area_percent=25), images(24, 1, area_percent=8)
    for image in others[:12]:
        del image["area_percent"]
    assert select_concepts(own, others) == []


def test_a_constant_is_not_proposed() -> None:
    assert select_concepts([{"area_percent": 10.0}] * 10, [{"area_percent": 10.0}] * 10) == []


def test_without_others_what_varies_is_proposed() -> None:
    mixed = images(10, 0, area_percent=25, grain=3) + images(10, 1, area_percent=8, grain=3)
    chosen = select_concepts(mixed, [])
    assert chosen[0].attribute.quantity == "area_percent"


def test_no_more_than_asked() -> None:
    names = ["area_percent", "length_over_width", "outline_gap_percent", "spots", "edge_softness", "grain"]
    own = images(12, 0, **dict.fromkeys(names, 20.0))
    others = images(24, 1, **dict.fromkeys(names, 5.0))
    assert len(select_concepts(own, others, 1)) == 1
