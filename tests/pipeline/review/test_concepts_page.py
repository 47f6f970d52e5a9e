from __future__ import annotations

import html as html_module
import re
from collections.abc import Iterator

import pandas as pd
import pytest
from starlette.testclient import TestClient

from data_contracts.errors import ConfigurationError
from data_contracts.store import RunFolder
from pipeline.review.app import create_app
from pipeline.review.ports import Cost, Ports
from tests.pipeline.review.samples import EVIL, HOST, IDS, expert_rows, post, read, say, state_now


def cost(concepts: pd.DataFrame) -> Cost:
    n_kept = int((concepts["status"] == "kept").sum())
    return Cost(70 * n_kept, 70, f"{n_kept}.00 USD (a list)", {"never asked": 70 * n_kept})


@pytest.fixture
def client(run: RunFolder) -> Iterator[TestClient]:
    app = create_app(run, read, "t", reviewer="Dr A", ports=Ports(cost=cost))
    with TestClient(app, base_url=HOST, follow_redirects=False) as client:
        client.get("/?token=t")
        yield client


def hidden_fields(html: str) -> dict[str, str]:
    form = html[html.index('action="/concepts/change"') :]
    fields = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', form)
    return {name: html_module.unescape(value) for name, value in fields}


def test_kept_and_dropped_with_reasons(client: TestClient) -> None:
    html = client.get("/concepts").text
    assert html.index("<h2>Kept") < html.index("It is red.") < html.index("<h2>Dropped") < html.index("shiny")
    assert "cannot be seen in an image" in html
    assert EVIL not in html


def test_the_cost_is_shown_before_anything_is_changed(client: TestClient, run: RunFolder) -> None:
    before = (run.path / "concepts.parquet").read_bytes()
    html = client.get("/concepts/change?action=add&name=blue").text
    assert "210 questions in 70 requests" in html
    assert "3.00 USD (a list)" in html
    assert "140 questions of them open already" in html
    assert (run.path / "concepts.parquet").read_bytes() == before


def test_a_confirmed_change_is_made_and_says_what_to_do_next(client: TestClient, run: RunFolder) -> None:
    form = hidden_fields(client.get("/concepts/change?action=rename&concept=red&name=reddish&definition=x").text)
    assert post(client, "/concepts/change", **form).headers["location"] == "/concepts"
    concepts = run.read_concepts().set_index("concept_id")
    assert concepts.loc["red", "name"] == "reddish"
    assert "Dr A" in concepts.loc["red", "provenance"][-1]
    page = client.get("/concepts").text
    assert f"medmicn judge --run {run.path}" in page
    assert "reddish" in client.get("/?concept=red").text


def test_a_change_that_was_previewed_for_other_concepts_is_refused(client: TestClient, run: RunFolder) -> None:
    form = hidden_fields(client.get("/concepts/change?action=drop&concept=red").text)
    other = hidden_fields(client.get("/concepts/change?action=rename&concept=round&name=oval").text)
    assert post(client, "/concepts/change", **other).status_code == 303
    refused = post(client, "/concepts/change", **form)
    assert refused.status_code == 400
    assert "look again" in refused.text
    assert set(run.vocabulary().ids) == {"red", "round"}


def test_a_split_carries_absence_and_deletes_nothing(client: TestClient, run: RunFolder) -> None:
    say(client, "absent", IDS[0])
    say(client, "present", IDS[2])
    preview = client.get("/concepts/change?action=split&concept=red&parts=dark+red%0Alight+red").text
    assert "2 words of experts about it stay in the ledger" in preview
    assert "dark-red absent, light-red absent" in preview
    post(client, "/concepts/change", **hidden_fields(preview))
    said = expert_rows(run)
    carried = said[said["concept_id"].isin(["dark-red", "light-red"])]
    assert carried[["image_id", "state", "witness_model"]].drop_duplicates().to_numpy().tolist() == [
        [IDS[0], "absent", "Dr A"]
    ]
    assert len(said) == 4
    assert state_now(run, IDS[0], "dark-red")["state"] == "absent"


def test_a_merge_carries_presence_where_the_reviewer_said_nothing(client: TestClient, run: RunFolder) -> None:
    say(client, "present", IDS[1], "red")
    say(client, "present", IDS[3], "red")
    say(client, "absent", IDS[3], "round")
    form = hidden_fields(client.get("/concepts/change?action=merge&concept=red&into=round").text)
    post(client, "/concepts/change", **form)
    assert state_now(run, IDS[1], "round")["state"] == "present"
    assert state_now(run, IDS[3], "round")["state"] == "absent"


def test_a_price_that_cannot_be_told_does_not_hide_the_page(run: RunFolder) -> None:
    def unknown(_concepts: pd.DataFrame) -> Cost:
        raise ConfigurationError("vlm.base_url: is not set.")

    with TestClient(create_app(run, read, "t", ports=Ports(cost=unknown)), base_url=HOST) as client:
        client.get("/?token=t")
        assert "vlm.base_url: is not set." in client.get("/concepts/change?action=drop&concept=red").text


def test_a_run_that_is_at_work_is_not_changed(client: TestClient, run: RunFolder) -> None:
    form = hidden_fields(client.get("/concepts/change?action=drop&concept=red").text)
    with run.lock():
        refused = post(client, "/concepts/change", **form)
    assert refused.status_code == 409
    assert "red" in run.vocabulary()
