from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
import pytest
from starlette.testclient import TestClient

from data_contracts.errors import CheckpointRefused
from data_contracts.files import write_bytes, write_text
from data_contracts.store import RunFolder
from pipeline.report.plots import heatmap_png
from pipeline.review.app import create_app
from pipeline.review.ports import Ports, Predicted
from tests.pipeline.review.samples import EVIL, HOST, IDS, expert_rows, post, read


def predicted(concepts: Mapping[str, float]) -> Predicted:
    p = concepts["red"]
    name = EVIL if p > 0.5 else "x"
    return Predicted(
        name,
        {EVIL: p, "x": 1 - p},
        concepts,
        rule=f"{name} ← {'red' if p > 0.5 else '¬red'}",
        rule_holds=True,
        class_map=np.eye(4, dtype=np.float32),
    )


def predict(_image_id: str) -> Predicted:
    return predicted({"red": 0.9, "gone": 0.1})


def intervene(image_id: str, concepts: Mapping[str, bool]) -> tuple[Predicted, Predicted]:
    before = predict(image_id)
    return before, predicted({**before.concept_probabilities, **{c: float(v) for c, v in concepts.items()}})


@pytest.fixture
def client(run: RunFolder) -> Iterator[TestClient]:
    ports = Ports(predict=predict, intervene=intervene)
    with TestClient(create_app(run, read, "t", ports=ports), base_url=HOST) as client:
        client.get("/?token=t")
        yield client


def test_the_models_class_rule_and_map(client: TestClient) -> None:
    html = client.get(f"/prediction/{IDS[0]}").text
    assert "← red" in html
    assert "90 %" in html
    assert EVIL not in html
    assert "&lt;script&gt;" in html
    assert client.get(f"/saliency/{IDS[0]}").content.startswith(b"\x89PNG")
    assert f'data-load="/prediction/{IDS[0]}"' in client.get(f"/image/{IDS[0]}").text


def test_flipping_a_concept_changes_class_and_rule_and_writes_nothing(client: TestClient, run: RunFolder) -> None:
    before = sorted(path.name for path in run.judgements_dir.iterdir())
    html = client.get(f"/prediction/{IDS[0]}?set=absent:red&set=").text
    assert "The class changes from &lt;script&gt;alert(1)&lt;/script&gt; to x" in html
    assert re.search(r'<option value="absent:red" selected>', html)
    assert "← ¬red" in html
    assert sorted(path.name for path in run.judgements_dir.iterdir()) == before
    assert expert_rows(run).empty


def test_a_fragment_for_the_pages_script_has_no_frame(client: TestClient) -> None:
    answer = client.get(f"/prediction/{IDS[0]}", headers={"x-requested-with": "fetch"}).text
    assert "<html" not in answer
    assert "<h2>The trained model</h2>" in answer


def test_without_a_model_nothing_is_promised(run: RunFolder) -> None:
    with TestClient(create_app(run, read, "t"), base_url=HOST) as client:
        client.get("/?token=t")
        assert "data-load" not in client.get(f"/image/{IDS[0]}").text
        assert "medmicn train" in client.get(f"/prediction/{IDS[0]}").text
        assert client.get(f"/saliency/{IDS[0]}").status_code == 404


def test_a_model_that_cannot_be_read_costs_only_its_section(run: RunFolder) -> None:
    def broken(_image_id: str) -> Predicted:
        raise CheckpointRefused("model/weights.safetensors: its hash differs")

    with TestClient(create_app(run, read, "t", ports=Ports(predict=broken)), base_url=HOST) as client:
        client.get("/?token=t")
        answer = client.get(f"/prediction/{IDS[0]}")
        assert answer.status_code == 200
        assert "its hash differs" in answer.text


def test_maps_of_the_explain_step_are_shown_and_nothing_else_is_served(client: TestClient, run: RunFolder) -> None:
    png = heatmap_png(np.eye(3))
    write_bytes(run.explanations_dir / "maps" / "a.png", png)
    write_text(run.path / "secret.png", "secret")
    rows = [("class", "maps/a.png"), ("red", "../secret.png"), ("round", "../run.json"), ("gone", "maps/none.png")]
    table = pd.DataFrame([{"image_id": IDS[0], "target": t, "file": f, "caption": f"caption {EVIL}"} for t, f in rows])
    write_text(run.explanations_dir / "maps.csv", table.to_csv(index=False))
    html = client.get(f"/image/{IDS[0]}").text
    assert f"/explained/{IDS[0]}/class" in html
    assert EVIL not in html
    assert client.get(f"/explained/{IDS[0]}/class").content == png
    for target in ("red", "round", "gone", "..%2Fmaps%2Fa.png"):
        assert client.get(f"/explained/{IDS[0]}/{target}").status_code == 404
    assert client.get(f"/explained/{IDS[1]}/class").status_code == 404


def test_audit_mode_hides_the_model(client: TestClient) -> None:
    post(client, "/mode", hidden="yes")
    assert "90 %" not in client.get(f"/prediction/{IDS[0]}").text
    assert client.get(f"/saliency/{IDS[0]}").status_code == 403
    assert client.get(f"/explained/{IDS[0]}/class").status_code == 403
