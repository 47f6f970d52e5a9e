from __future__ import annotations

import pandas as pd
from starlette.testclient import TestClient

from data_contracts.store import RunFolder
from tests.pipeline.review.samples import IDS, expert_rows, post


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
