from __future__ import annotations

import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from data_contracts.store import RunFolder
from pipeline.review.app import create_app
from pipeline.review.filters import Filters
from tests.pipeline.review.samples import EVIL, HOST, IDS, N_IMAGES, cards, images, read


def following(client: TestClient, html: str, direction: str = "next") -> str:
    """The page behind (or in front of) this one."""
    link = re.search(rf'<a rel="{direction}"[^>]*href="([^"]+)"', html)
    assert link is not None
    return client.get(link[1].replace("&amp;", "&")).text


def test_grid_pages_through_every_accepted_image_once(client: TestClient) -> None:
    first = client.get("/").text
    second = following(client, first)
    assert len(cards(first)) == 60
    assert sorted(cards(first) + cards(second)) == list(range(N_IMAGES))
    assert f"of {N_IMAGES} images" in first
    assert "61–70 of 70" in second
    assert cards(following(client, second, "prev")) == cards(first)
    assert 'rel="next"' not in second


def test_filters_combine(client: TestClient) -> None:
    assert cards(client.get("/?label=x&split=test").text) == [k for k in range(40, N_IMAGES) if k % 2 == 0]
    assert cards(client.get("/?concept=red&state=uncertain").text) == [3]
    assert cards(client.get("/?concept=red&state=present&split=train").text) == list(range(0, 40, 2))
    assert "No image passes these filters" in client.get("/?label=none").text


def test_most_uncertain_and_most_disputed_come_first(client: TestClient) -> None:
    uncertain = cards(client.get("/?sort=uncertain").text)
    # Image 3 abstains; then come those with a probability of one half.
    assert uncertain[0] == 3
    assert set(uncertain[1:8]) == {k for k in range(N_IMAGES) if k % 10 == 5}
    assert cards(client.get("/?sort=disputed&concept=red").text)[0] == 8


def test_image_page_shows_what_each_witness_said(client: TestClient) -> None:
    html = client.get(f"/image/{IDS[4]}").text
    assert "vlm: present" in html
    assert "40 %" in html
    assert 'data-heatmap="/heatmap/' in html


def test_previous_and_next_follow_the_filters(client: TestClient) -> None:
    html = client.get(f"/image/{IDS[2]}?label=x").text
    found = dict(re.findall(r'rel="(prev|next)"[^>]*href="/image/([^"?]+)\?label=x', html))
    assert found == {"prev": IDS[0], "next": IDS[4]}


def test_an_id_with_a_hash_sign_works_everywhere(client: TestClient) -> None:
    html = following(client, client.get("/").text)
    assert "/pixels/dicom%237?size=thumb" in html
    assert client.get("/image/dicom%237").status_code == 200
    assert client.get("/pixels/dicom%237").status_code == 200


def test_pixels_are_re_encoded(client: TestClient) -> None:
    assert client.get(f"/pixels/{IDS[0]}").content.startswith(b"\x89PNG")
    assert client.get(f"/pixels/{IDS[0]}?size=thumb").content.startswith(b"\xff\xd8")


def test_an_unreadable_image_costs_only_its_picture(client: TestClient) -> None:
    assert client.get(f"/pixels/{IDS[5]}").status_code == 404
    assert client.get(f"/image/{IDS[5]}").status_code == 200


def test_heatmaps(client: TestClient) -> None:
    assert client.get(f"/heatmap/{IDS[45]}/red").content.startswith(b"\x89PNG")
    assert client.get(f"/heatmap/{IDS[45]}/round").status_code == 404


def test_a_run_that_has_only_images_can_be_looked_at(tmp_path: Path) -> None:
    bare = RunFolder(tmp_path / "bare")
    bare.write_images(images())
    with TestClient(create_app(bare, read, "t"), base_url=HOST) as client:
        assert client.get("/?token=t").status_code == 200
        assert "no concepts yet" in client.get(f"/image/{IDS[0]}").text
        assert client.get("/audit").status_code == 404


def test_synthetic_images_are_named_as_such(client: TestClient, run: RunFolder) -> None:
    assert "Synthetic images" not in client.get("/").text
    run.write_manifest(run.read_manifest().model_copy(update={"synthetic": True}))
    with TestClient(create_app(run, read, "t"), base_url=HOST) as fresh:
        assert "Synthetic images" in fresh.get("/?token=t").text


def test_filters_make_shareable_addresses() -> None:
    assert Filters().query() == ""
    assert Filters(label="a b&c", after="60").query() == "?label=a+b%26c&after=60"
    assert Filters(label="x", after="60").within(sort="uncertain") == "?label=x&sort=uncertain"


def test_probability_range_is_of_the_concept(client: TestClient) -> None:
    assert cards(client.get("/?concept=red&low=20&high=30").text) == [k for k in range(N_IMAGES) if k % 10 in (2, 3)]
    # Without a concept, or with nonsense, it narrows nothing.
    for query in ("/?low=20&high=30", "/?concept=red&low=nan&high=x", "/?concept=red&low=-4"):
        assert f"of {N_IMAGES} images" in client.get(query).text


def test_words_are_found_in_path_class_and_evidence(client: TestClient) -> None:
    assert cards(client.get("/?text=folder/12.").text) == [12]
    assert cards(client.get("/?text=SCRIPT&split=test").text) == [k for k in range(40, N_IMAGES) if k % 2]
    assert cards(client.get("/?text=notches").text) == [9]
    assert cards(client.get("/?text=jag+folder/9").text) == [9]
    assert cards(client.get("/?text=otches").text) == []
    assert cards(client.get("/?text=notches+absent").text) == []
    assert client.get("/", params={"text": "x' OR '1'='1 %_"}).status_code == 200


def test_disputes_of_witnesses(client: TestClient) -> None:
    assert cards(client.get("/?dispute=witnesses").text) == [8]
    assert cards(client.get("/?dispute=witnesses&concept=round").text) == [8]


@pytest.mark.parametrize(
    "query",
    [
        "?state=maybe",
        "?sort=paths",
        "?dispute=all",
        "?expert=maybe",
        "?after=-1",
        "?before=x",
        "?concept=none&state=present",
    ],
)
def test_unknown_choices_do_no_harm(client: TestClient, query: str) -> None:
    assert client.get(f"/{query}").status_code == 200


def test_counts_and_prevalence(client: TestClient) -> None:
    html = client.get("/overview?concept=red").text
    # Class x: images 0, 2, … all present. The other class: images 1, 5, 7, … absent, image 3 is open.
    assert "100 % of 35" in html
    assert "0 % of 34" in html
    assert EVIL not in html
    assert "<svg" in html
    assert "x, train: 20" in html
    filtered = client.get("/overview?concept=red&split=test").text
    assert "30 images" in filtered
    assert "100 % of 15" in filtered


def test_history_tells_who_said_what_and_when(client: TestClient) -> None:
    html = client.get(f"/history/{IDS[9]}/round").text
    assert "Jagged notches, left" in html
    assert "2026-01-01" in html
    assert client.get(f"/history/{'f' * 64}/round").status_code == 404
