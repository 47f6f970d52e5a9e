from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator

import httpx2
import pytest
import uvicorn
from starlette.testclient import TestClient

from data_contracts.store import RunFolder
from data_contracts.tables import State
from pipeline.review.app import create_app
from tests.pipeline.review.samples import EVIL, HOST, IDS, expert_rows, post, read, say


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


def test_names_in_forms_and_addresses_are_text(client: TestClient) -> None:
    post(client, "/reviewer", name=f'"{EVIL}"')
    say(client, "absent")
    for path in (f"/image/{IDS[0]}", "/", f"/history/{IDS[0]}/red", "/concepts", "/overview", "/disagreements"):
        html = client.get(path, params={"text": EVIL, "label": EVIL, "low": EVIL, "edit": EVIL}).text
        assert EVIL not in html
    refused = client.get("/concepts/change", params={"action": EVIL})
    assert refused.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize("path", ["/bulk", "/undo", "/undo-action", "/mode", "/drift", "/concepts/change", "/invite"])
def test_every_form_refuses_other_sites_and_big_bodies(client: TestClient, path: str) -> None:
    assert post(client, path, origin="http://evil.example", hidden="yes").status_code == 403
    assert post(client, path, name="x" * 70_000).status_code == 413


def test_uploads_are_refused(client: TestClient, run: RunFolder) -> None:
    answer = client.post("/judge", files={"image_id": b"x" * 60_000}, headers={"origin": HOST})
    assert answer.status_code == 422
    assert expert_rows(run).empty


def test_the_page_answers_to_known_methods_only(client: TestClient) -> None:
    for method in ("PUT", "DELETE", "PATCH"):
        assert client.request(method, "/judge", headers={"origin": HOST, "content-length": "0"}).status_code == 405


def test_an_error_is_a_page_for_people_and_a_sentence_for_scripts(client: TestClient) -> None:
    page = client.get("/concepts/change", params={"action": EVIL}, headers={"accept": "text/html"})
    assert page.status_code == 400
    assert EVIL not in page.text
    assert "<h1>This is not possible</h1>" in page.text
    assert "nothing was changed" in page.text
