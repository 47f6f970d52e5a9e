from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient

from data_contracts.files import write_text
from data_contracts.store import RunFolder
from tests.pipeline.review.samples import EVIL, post

AT = "2026-11-25T01:00:00+00:00"


@pytest.fixture
def question(run: RunFolder) -> RunFolder:
    asked = {
        "raised_at": AT,
        "sentence": f"Images are darker {EVIL}.",
        "tests": [{"name": "brightness", "p": 0.001}, "a sentence"],
        "n_images": 12,
    }
    write_text(run.path / "drift" / "pending.json", json.dumps(asked))
    return run


def test_a_drift_pause_asks_on_every_page_and_the_answer_is_written(client: TestClient, question: RunFolder) -> None:
    for path in ("/", "/concepts", "/overview"):
        html = client.get(path).text
        assert "Images are darker" in html
        assert EVIL not in html
        assert "12 images" in html
    post(client, "/drift", decision="approve", raised_at=AT)
    answer = json.loads((question.path / "drift" / "decision.json").read_text())
    assert (answer["decision"], answer["by"]) == ("approve", "Dr A")
    assert answer["at"].startswith("20")
    assert "Images are darker" not in client.get("/").text


@pytest.mark.parametrize(
    "form", [{"decision": "maybe", "raised_at": AT}, {"decision": "approve", "raised_at": "other"}]
)
def test_an_answer_to_another_question_is_refused(
    client: TestClient, question: RunFolder, form: dict[str, str]
) -> None:
    assert post(client, "/drift", **form).status_code == 400
    assert not (question.path / "drift" / "decision.json").exists()


def test_without_a_question_there_is_none(client: TestClient, run: RunFolder) -> None:
    assert 'action="/drift"' not in client.get("/").text
    write_text(run.path / "drift" / "pending.json", "{half")
    assert 'action="/drift"' not in client.get("/").text
    assert post(client, "/drift", decision="approve", raised_at=AT).status_code == 400
