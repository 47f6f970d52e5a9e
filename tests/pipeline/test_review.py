from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import uvicorn
from starlette.testclient import TestClient

from data_contracts.errors import ImageRejected, RejectReason
from data_contracts.manifest import RunManifest
from data_contracts.ports import Pixels
from data_contracts.store import RunFolder
from data_contracts.tables import JUDGEMENTS, State, Witness
from pipeline.review.app import create_app
from pipeline.review.ledger import Ledger
from pipeline.review.queries import Filters
from pipeline.review.tables import Tables

HOST = "http://127.0.0.1:8000"
EVIL = "<script>alert(1)</script>"
N_IMAGES = 70
IDS = [f"{k:064x}" for k in range(N_IMAGES - 1)] + ["dicom#7"]


def read(image_id: str) -> Pixels:
    if image_id == IDS[5]:
        raise ImageRejected(RejectReason.TRUNCATED, "image 5: the file ends too early")
    return np.full((30, 40, 3), IDS.index(image_id), np.uint8)


def images() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image_id": [*IDS, "f" * 64],
            "path": [f"folder/{k}.png" for k in range(N_IMAGES + 1)],
            "label": ["x", EVIL] * (N_IMAGES // 2) + ["x"],
            "split": ["train"] * 40 + ["test"] * (N_IMAGES - 39),
            "modality": "m",
            "width_px": 40,
            "height_px": 30,
            "rejected": [None] * N_IMAGES + ["truncated"],
        }
    )


def judgements(rows: list[tuple[str, str, str, str, str]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["image_id", "concept_id", "witness", "witness_model", "state"])
    frame["created_at"] = pd.Timestamp("2026-01-01", tz="UTC")
    frame["evidence"] = "it says <b>this</b>"
    return frame.reindex(columns=JUDGEMENTS.column_names)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "my run")
    run.write_manifest(RunManifest.new("my run", "source"))
    run.write_images(images())
    run.write_concepts(
        pd.DataFrame(
            {
                "concept_id": ["red", "round"],
                "name": ["red", f"round {EVIL}"],
                "definition": ["It is red.", ""],
                "proposed_for": [["x"], ["x"]],
                "origin": "vlm",
                "status": "kept",
                "position": [0, 1],
            }
        )
    )
    labels = pd.DataFrame(
        [
            (i, c, None if k == 3 else k % 2 == 0, (k % 10) / 10, 0.9 if k == 8 else 0.0)
            for k, i in enumerate(IDS)
            for c in ("red", "round")
        ],
        columns=["image_id", "concept_id", "present", "probability", "disagreement"],
    )
    labels["present"] = labels["present"].astype("boolean")
    run.write_labels(labels.assign(decided_by="vlm"), pd.DataFrame())
    run.append_judgements(judgements([(i, "red", "vlm", "some-vlm", "present") for i in IDS]))
    run.write_alignment([alignment(IDS[:30]), alignment(IDS[30:])])
    return run


def alignment(image_ids: list[str]) -> pa.Table:
    n = len(image_ids)
    heatmap = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    return pa.table(
        {
            "image_id": image_ids,
            "concept_id": ["red"] * n,
            "similarity": [0.5] * n,
            "null_similarity": [0.1] * n,
            "probability": [0.5] * n,
            "grid_h": [2] * n,
            "grid_w": [3] * n,
            "heatmap": pa.array([np.array(heatmap, np.float16)] * n, pa.list_(pa.float16())),
        }
    )


@pytest.fixture
def stranger(run: RunFolder) -> TestClient:
    return TestClient(create_app(run, read, "the-token", reviewer="Dr A"), base_url=HOST, follow_redirects=False)


@pytest.fixture
def client(stranger: TestClient) -> TestClient:
    assert stranger.get("/?token=the-token").status_code == 303
    return stranger


def post(client: TestClient, path: str, *, origin: str | None = HOST, **form: Any) -> httpx2.Response:
    headers = {} if origin is None else {"origin": origin}
    return client.post(path, data=form, headers=headers)


def say(client: TestClient, state: str, image_id: str = IDS[0], concept_id: str = "red") -> httpx2.Response:
    return post(client, "/judge", image_id=image_id, concept_id=concept_id, state=state, back=f"/image/{image_id}")


def expert_rows(run: RunFolder) -> pd.DataFrame:
    ledger = run.read_judgements()
    return ledger[ledger["witness"] == Witness.EXPERT].reset_index(drop=True)


def state_now(run: RunFolder, image_id: str = IDS[0], concept_id: str = "red") -> dict[str, Any]:
    return Tables(run, Ledger(run)).snapshot().concept_of(image_id, concept_id)


# ---- the door --------------------------------------------------------------------------------------------


def test_without_a_token_nothing_is_shown(stranger: TestClient) -> None:
    for path in ("/", f"/image/{IDS[0]}", f"/pixels/{IDS[0]}", "/audit", "/static/review.js", "/no/such/page"):
        assert stranger.get(path).status_code == 403
    assert say(stranger, "present").status_code == 403
    assert stranger.get("/?token=wrong").status_code == 403
    assert stranger.get("/?token=").status_code == 403


def test_a_token_opens_one_browser_and_leaves_the_address(stranger: TestClient) -> None:
    answer = stranger.get("/?sort=uncertain&token=the-token&label=x")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/?sort=uncertain&label=x"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "the-token" not in cookie
    assert stranger.get("/").status_code == 200
    # The same browser may follow the link again; another one may not.
    assert stranger.get("/?token=the-token").status_code == 303
    stranger.cookies.clear()
    assert stranger.get("/?token=the-token").status_code == 403


def test_a_forged_cookie_is_no_session(client: TestClient) -> None:
    name = next(iter(client.cookies.keys()))
    client.cookies.clear()
    client.cookies.set(name, "the-token")
    assert client.get("/").status_code == 403


def test_an_invitation_opens_one_more_browser(client: TestClient, run: RunFolder) -> None:
    link = re.search(r'value="(http://127[^"]+)"', post(client, "/invite").text)
    assert link is not None
    post(client, "/reviewer", name="Dr A")
    client.cookies.clear()
    assert client.get(link[1]).status_code == 303
    assert client.get("/").status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8000", "", "[::1", "10.0.0.1"]
)
def test_other_host_names_are_refused(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:1234", "LOCALHOST", "[::1]:9"])
def test_names_of_this_machine_are_accepted(client: TestClient, host: str) -> None:
    cookie = "; ".join(f"{k}={v}" for k, v in client.cookies.items())
    assert client.get("/", headers={"host": host, "cookie": cookie}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    [None, "null", "http://evil.example", "https://127.0.0.1:8000", "http://127.0.0.1:9", "http://localhost:8000"],
)
def test_posts_of_other_origins_are_refused(client: TestClient, run: RunFolder, origin: str | None) -> None:
    answer = post(client, "/judge", origin=origin, image_id=IDS[0], concept_id="red", state="absent")
    assert answer.status_code == 403
    assert expert_rows(run).empty


def test_oversized_posts_are_refused(client: TestClient, run: RunFolder) -> None:
    assert post(client, "/reviewer", name="x" * 100_000).status_code == 413

    def chunks() -> Iterator[bytes]:
        yield b"name=x"

    assert client.post("/reviewer", content=chunks(), headers={"origin": HOST}).status_code == 411


def test_every_answer_forbids_scripts_and_requests_from_elsewhere(client: TestClient) -> None:
    for path in ("/", f"/image/{IDS[0]}", f"/pixels/{IDS[0]}", "/no/such/page", "/image/none"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe-inline" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        # `no-referrer` would make a browser send `Origin: null` with our own forms.
        assert headers["referrer-policy"] == "same-origin"
    assert client.get("/").headers["cache-control"] == "no-store"


def test_the_pages_keep_their_own_policy(client: TestClient) -> None:
    for path in ("/", f"/image/{IDS[0]}"):
        html = client.get(path).text
        assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=|\sstyle=|<style", html)
        assert not re.search(r"""(?:src|href|action)=["'](?!/|\?|#main)""", html)


@pytest.mark.parametrize(
    "path",
    [
        "/pixels/..%2F..%2Frun.json",
        "/pixels/%2Fetc%2Fpasswd",
        "/static/..%2Fapp.py",
        "/static/../app.py",
        f"/pixels/{'f' * 64}",
    ],
)
def test_only_accepted_images_and_own_files_are_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    "back", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)", ""]
)
def test_redirects_stay_inside(client: TestClient, back: str) -> None:
    answer = post(client, "/judge", image_id=IDS[0], concept_id="red", state="absent", back=back)
    assert answer.headers["location"] == "/"


def test_a_path_that_looks_like_a_host_is_no_way_out(stranger: TestClient) -> None:
    location = stranger.get("//evil.example/?token=the-token").headers["location"]
    assert location.startswith("/")
    assert not location.startswith("//")


def test_names_from_data_are_text(client: TestClient) -> None:
    for path in ("/", f"/image/{IDS[1]}", "/?concept=round"):
        html = client.get(path).text
        assert EVIL not in html
        assert "&lt;script&gt;" in html
    assert "<b>this</b>" not in client.get(f"/image/{IDS[1]}").text


# ---- look ------------------------------------------------------------------------------------------------


def cards(html: str) -> list[int]:
    return [IDS.index(i.replace("%23", "#")) for i in re.findall(r'<li><a href="/image/([^"?]+)', html)]


def test_grid_pages_through_every_accepted_image_once(client: TestClient) -> None:
    first, second = client.get("/").text, client.get("/?page=2").text
    assert len(cards(first)) == 60
    assert sorted(cards(first) + cards(second)) == list(range(N_IMAGES))
    assert f"of {N_IMAGES} images" in first
    assert cards(client.get("/?page=99").text) == cards(second)


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
    html = client.get("/?page=2").text
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


# ---- correct ---------------------------------------------------------------------------------------------


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
    say(client, "uncertain")
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
    assert Tables(run, Ledger(run)).snapshot().uncertainty()[3].tolist() == [0, 0]


# ---- audit -----------------------------------------------------------------------------------------------


@pytest.fixture
def audit(run: RunFolder) -> pd.DataFrame:
    sheet = pd.DataFrame(
        {
            "image_id": [IDS[2], IDS[3], IDS[4]],
            "path": ["folder/2.png", "folder/3.png", "folder/4.png"],
            "concept_id": ["red", "red", "round"],
            "concept": ["red", "red", "round"],
            "answer": "",
            "stratum": ["s"] * 3,
        }
    )
    run.write_audit(sheet)
    return sheet


def test_audit_hides_what_the_machine_said(client: TestClient, audit: pd.DataFrame) -> None:
    html = client.get("/audit").text
    assert "It is red." in html
    for hidden in ("folder/2.png", "vlm", "20 %", "by an expert", 'aria-pressed="true"', "/heatmap/"):
        assert hidden not in html


def test_audit_answers_go_back_into_the_sheet_one_by_one(
    client: TestClient, run: RunFolder, audit: pd.DataFrame
) -> None:
    assert "Question 1 of 3" in client.get("/audit").text
    post(client, "/audit", number=0, image_id=IDS[2], concept_id="red", state="absent")
    assert "Question 2 of 3" in client.get("/audit").text
    post(client, "/audit", number=2, image_id=IDS[4], concept_id="round", state="present")
    sheet = run.read_audit()
    assert sheet["answer"].tolist() == ["absent", "", "present"]
    assert sheet.drop(columns="answer").equals(audit.drop(columns="answer").astype("str"))
    post(client, "/audit", number=0, image_id=IDS[2], concept_id="red", state="")
    assert run.read_audit()["answer"].tolist() == ["", "", "present"]
    assert expert_rows(run).empty


def test_audit_refuses_an_answer_to_a_cell_that_is_no_longer_there(
    client: TestClient, run: RunFolder, audit: pd.DataFrame
) -> None:
    run.write_audit(audit.iloc[::-1])
    assert post(client, "/audit", number=0, image_id=IDS[2], concept_id="red", state="absent").status_code == 400
    assert post(client, "/audit", number=9, image_id=IDS[2], concept_id="red", state="absent").status_code == 400
    assert post(client, "/audit", number=0, image_id=IDS[4], concept_id="round", state="maybe").status_code == 400
    assert (run.read_audit()["answer"] == "").all()


# ---- over a real socket ----------------------------------------------------------------------------------


def test_over_real_http(run: RunFolder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(create_app(run, read, "t"), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            base = f"http://127.0.0.1:{port}"
            with httpx2.Client(base_url=base, follow_redirects=True, trust_env=False) as browser:
                assert browser.get("/").status_code == 403
                assert browser.get("/?token=t").status_code == 200
                form = {"image_id": IDS[0], "concept_id": "red", "state": "absent", "back": f"/image/{IDS[0]}"}
                assert browser.post("/judge", data=form, headers={"origin": base}).status_code == 200
                assert browser.get("/static/review.css").headers["content-type"].startswith("text/css")
        finally:
            server.should_exit = True
            thread.join()
    assert expert_rows(run)["state"].tolist() == [State.ABSENT]


def test_filters_make_shareable_addresses() -> None:
    assert Filters().query() == ""
    assert Filters(label="a b&c", page=3).query() == "?label=a+b%26c&page=3"
    assert Filters(label="x", page=3).query(page=1) == "?label=x"
