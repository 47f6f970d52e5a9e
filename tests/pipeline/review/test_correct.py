from __future__ import annotations

import re
import threading
from typing import Any

import httpx2
import pandas as pd
import pytest
from starlette.testclient import TestClient

from annotation.trust.fuse import FuseOptions, fuse
from data_contracts.store import RunFolder
from pipeline.review.ledger import BLIND
from tests.pipeline.review.samples import HOST, IDS, cards, expert_rows, post, say, state_now


def test_a_correction_is_one_row_of_the_ledger_and_shows_at_once(client: TestClient, run: RunFolder) -> None:
    assert state_now(run)["state"] == "present"
    answer = say(client, "absent")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/image/{IDS[0]}")
    rows = expert_rows(run)
    assert rows[["image_id", "concept_id", "witness_model", "state"]].to_numpy().tolist() == [
        [IDS[0], "red", "Dr A", "absent"]
    ]
    assert 0 in cards(client.get("/?concept=red&state=absent").text)
    assert re.search(
        r'value="absent" aria-pressed="true" aria-label="red: absent"', client.get(f"/image/{IDS[0]}").text
    )


def test_undo_goes_back_one_step_at_a_time_and_only_appends(client: TestClient, run: RunFolder) -> None:
    seen = []
    for act in ("absent", "uncertain", "undo", "undo", "undo"):
        if act == "undo":
            post(client, "/undo", image_id=IDS[0], concept_id="red")
        else:
            say(client, act)
        now = state_now(run)
        seen.append((now["state"], now["by_expert"]))
    assert seen == [("absent", True), ("uncertain", True), ("absent", True), ("present", False), ("present", False)]
    rows = expert_rows(run)
    # Two corrections and two undos; the third undo had nothing to take back.
    assert rows["state"].tolist() == ["absent", "uncertain", "absent", "not_assessed"]
    assert rows["supersedes"].tolist()[1:] == rows["request_id"].iloc[[0, 1, 0]].tolist()


def test_after_an_undo_one_can_say_something_else(client: TestClient, run: RunFolder) -> None:
    for act in ("/judge", "/undo", "/judge"):
        post(client, act, image_id=IDS[0], concept_id="red", state="absent")
    assert state_now(run)["state"] == "absent"
    post(client, "/undo", image_id=IDS[0], concept_id="red")
    assert not state_now(run)["by_expert"]


def test_reviewers_undo_only_their_own_word(client: TestClient, run: RunFolder) -> None:
    say(client, "absent")
    post(client, "/reviewer", name="  Dr   B ")
    post(client, "/undo", image_id=IDS[0], concept_id="red")
    assert state_now(run)["state"] == "absent"
    say(client, "present")
    assert expert_rows(run)["witness_model"].tolist() == ["Dr A", "Dr B"]
    assert state_now(run)["state"] == "uncertain"
    post(client, "/undo", image_id=IDS[0], concept_id="red")
    assert state_now(run)["state"] == "absent"


def test_the_pages_script_gets_the_changed_row(client: TestClient) -> None:
    form = {"image_id": IDS[0], "concept_id": "red", "state": "absent"}
    answer = client.post("/judge", data=form, headers={"origin": HOST, "x-requested-with": "fetch"})
    assert answer.status_code == 200
    assert answer.text.strip().startswith('<li class="concept absent" id="c-red"')
    assert "by an expert" in answer.text


@pytest.mark.parametrize(
    ("form", "status"),
    [
        ({"state": "maybe"}, 400),
        ({"state": "not_assessed"}, 400),
        ({"state": ""}, 400),
        ({"concept_id": "blue", "state": "present"}, 400),
        ({"image_id": "f" * 64, "state": "present"}, 404),
    ],
)
def test_what_cannot_be_said_is_not_written(
    client: TestClient, run: RunFolder, form: dict[str, str], status: int
) -> None:
    answer = post(client, "/judge", **({"image_id": IDS[0], "concept_id": "red"} | form))
    assert answer.status_code == status
    assert expert_rows(run).empty


def test_corrections_at_the_same_time_lose_nothing(client: TestClient, run: RunFolder) -> None:
    states = [("present", "absent", "uncertain")[k % 3] for k in range(24)]
    threads = [threading.Thread(target=say, args=(client, s, IDS[k])) for k, s in enumerate(states)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = expert_rows(run).set_index("image_id")
    assert [rows.loc[IDS[k], "state"] for k in range(24)] == states


def test_an_experts_word_settles_the_doubt(client: TestClient, run: RunFolder) -> None:
    for concept_id in ("red", "round"):
        say(client, "present", IDS[3], concept_id)
    assert cards(client.get("/?sort=uncertain").text)[0] != 3


def bulk(client: TestClient, images: list[int], state: str = "absent", concept_id: str = "red") -> httpx2.Response:
    form = {"image_id": [IDS[k] for k in images], "concept_id": concept_id, "state": state, "back": "/?sort=uncertain"}
    return post(client, "/bulk", **form)


def undo_button(html: str) -> str | None:
    found = re.search(r'action="/undo-action"><input type="hidden" name="action" value="(\w+)"', html)
    return found and found[1]


def test_bulk_is_one_part_of_the_ledger_and_undone_by_one_click(client: TestClient, run: RunFolder) -> None:
    n_parts = len(list(run.judgements_dir.iterdir()))
    assert bulk(client, [0, 2, 4]).headers["location"] == "/?sort=uncertain"
    assert len(list(run.judgements_dir.iterdir())) == n_parts + 1
    html = client.get("/?concept=red&state=absent").text
    assert {0, 2, 4} <= set(cards(html))
    assert "in 3 images, says Dr A" in html
    # The sentence is said once.
    assert undo_button(client.get("/").text) is None
    say(client, "uncertain", IDS[2])
    post(client, "/undo-action", action=undo_button(html))
    states = [state_now(run, IDS[k]) for k in (0, 2, 4)]
    # What was said again since stays.
    assert [(row["state"], row["by_expert"]) for row in states] == [
        ("present", False),
        ("uncertain", True),
        ("present", False),
    ]


def test_nobody_undoes_the_bulk_of_another(client: TestClient, run: RunFolder) -> None:
    bulk(client, [0, 2])
    action = undo_button(client.get("/").text)
    post(client, "/reviewer", name="Dr B")
    post(client, "/undo-action", action=action)
    assert state_now(run)["state"] == "absent"


@pytest.mark.parametrize(
    "form",
    [
        {"image_id": [], "concept_id": "red", "state": "absent"},
        {"image_id": [IDS[0], "f" * 64], "concept_id": "red", "state": "absent"},
        {"image_id": [IDS[0]], "concept_id": "blue", "state": "absent"},
        {"image_id": [IDS[0]], "concept_id": "", "state": "absent"},
        {"image_id": [IDS[0]], "concept_id": "red", "state": "maybe"},
        {"image_id": IDS * 8, "concept_id": "red", "state": "absent"},
    ],
)
def test_a_bulk_that_is_not_whole_writes_nothing(client: TestClient, run: RunFolder, form: dict[str, Any]) -> None:
    assert post(client, "/bulk", **form).status_code in {400, 404}
    assert expert_rows(run).empty


def test_what_reviewers_disagree_on_is_listed_until_they_agree(client: TestClient) -> None:
    say(client, "absent")
    assert "None" in client.get("/disagreements").text
    post(client, "/reviewer", name="Dr B")
    say(client, "present")
    html = client.get("/disagreements").text
    assert "Dr A: absent" in html
    assert "Dr B: present" in html
    assert cards(client.get("/?dispute=reviewers").text) == [0]
    assert "reviewers differ" in client.get(f"/image/{IDS[0]}").text
    say(client, "absent")
    assert "Dr A: absent" not in client.get("/disagreements").text
    assert cards(client.get("/?dispute=reviewers").text) == []


def test_images_an_expert_saw_can_be_told_from_the_others(client: TestClient) -> None:
    say(client, "absent", IDS[6])
    assert cards(client.get("/?expert=yes").text) == [6]
    assert cards(client.get("/?expert=yes&concept=round").text) == []
    assert len(cards(client.get("/?expert=no&split=train").text)) == 39


def test_history_shows_undoing_as_what_it_is(client: TestClient) -> None:
    say(client, "absent")
    post(client, "/undo", image_id=IDS[0], concept_id="red")
    html = client.get(f"/history/{IDS[0]}/red").text.split("<tbody>")[1]
    assert html.index("some-vlm") < html.index("Dr A") < html.index("took the last word back")


# ---- audit mode ------------------------------------------------------------------------------------------


def test_audit_mode_hides_every_answer_but_ones_own(client: TestClient, run: RunFolder) -> None:
    post(client, "/reviewer", name="Dr B")
    say(client, "uncertain", IDS[4])
    post(client, "/reviewer", name="Dr A")
    say(client, "absent", IDS[4], "round")
    post(client, "/mode", hidden="yes")
    html = client.get(f"/image/{IDS[4]}").text
    for hidden in ("vlm", "40 %", "folder/4.png", "Dr B", "/heatmap/", "it says", "by an expert", "<meter"):
        assert hidden not in html
    assert re.findall(r'value="(\w+)" aria-pressed="true"', html) == ["absent"]
    grid = client.get("/?concept=red&state=present&label=x").text
    assert len(cards(grid)) == 60
    for hidden in ("folder/", "present</span>", "40 %", "Most", "label"):
        assert hidden not in grid.split('<ul class="grid">')[1].split("</ul>")[0].replace("<label", "").replace(
            "</label", ""
        )
    for path in ("/overview", "/disagreements", "/concepts", f"/history/{IDS[4]}/red"):
        assert "Hidden in audit mode" in client.get(path).text
    assert client.get(f"/heatmap/{IDS[4]}/red").status_code == 403


def test_what_is_said_in_audit_mode_is_marked_as_blind(client: TestClient, run: RunFolder) -> None:
    post(client, "/mode", hidden="yes")
    say(client, "absent")
    post(client, "/mode", hidden="no")
    say(client, "present", IDS[1])
    assert expert_rows(run)["evidence"].fillna("").tolist() == [BLIND, ""]
    assert "some-vlm" in client.get(f"/history/{IDS[1]}/red").text


@pytest.mark.parametrize(
    "words",
    [
        ("absent",),
        ("uncertain",),
        ("present", "absent"),
        ("absent", "uncertain"),
        ("uncertain", "present"),
        ("present", "present", "absent"),
        ("present", "present", "absent", "absent", "absent"),
    ],
)
def test_the_page_shows_what_fusion_will_make_of_several_words(
    client: TestClient, run: RunFolder, words: tuple[str, ...]
) -> None:
    for number, state in enumerate(words):
        post(client, "/reviewer", name=f"Dr {number}")
        say(client, state)
    labels = fuse(run.read_judgements(), None, run.vocabulary(), FuseOptions()).set_index(["image_id", "concept_id"])
    present = labels.loc[(IDS[0], "red"), "present"]
    expected = "uncertain" if pd.isna(present) else "present" if present else "absent"
    assert state_now(run)["state"] == expected
