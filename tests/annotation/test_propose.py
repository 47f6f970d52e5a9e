from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from annotation.propose import ProposeOptions, propose
from annotation.vlm.client import VlmClient
from annotation.vlm.journal import Journal
from annotation.vlm.settings import VlmSettings
from data_contracts.errors import StepFailed
from data_contracts.tables import CONCEPTS, vocabulary_of

SAMPLES = {"red spots": [f"large-{i}" for i in range(6)], "plain": [f"small-{i}" for i in range(6)]}
Make = Callable[..., VlmClient]


def endpoint(tmp_path: Path, answers: Callable[[dict[str, Any]], str]) -> tuple[VlmClient, list[dict[str, Any]]]:
    """A client of an endpoint that answers with a function of the request, and what it was sent."""
    sent: list[dict[str, Any]] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        sent.append(json.loads(request.content))
        message = {"role": "assistant", "content": answers(sent[-1])}
        return httpx2.Response(200, json={"id": "1", "choices": [{"finish_reason": "stop", "message": message}]})

    settings = VlmSettings(base_url="http://endpoint.test/v1", model="m", max_retries=0)
    client = VlmClient(settings, None, Journal(tmp_path / "other"), transport=httpx2.MockTransport(handler))
    return client, sent


def concepts(*names: str, definition: str = "d") -> str:
    return json.dumps({"concepts": [{"name": n, "definition": definition, "group": None} for n in names]})


async def test_the_embedded_endpoint_proposes_a_valid_table(read: Any, make_embedded: Make) -> None:
    async with make_embedded() as client:
        table = await propose(SAMPLES, read, client, "skin lesions")
    CONCEPTS.to_arrow(table, "test")
    assert set(table["origin"]) == {"embedded"}
    assert "large-lesion" in set(table["concept_id"])
    assert vocabulary_of(table).ids == tuple(table["concept_id"])


async def test_asking_again_sends_nothing(read: Any, make_embedded: Make) -> None:
    async with make_embedded() as client:
        first = await propose(SAMPLES, read, client, "skin")
    async with make_embedded(max_requests=1) as client:
        again = await propose(SAMPLES, read, client, "skin")
        assert client.budget.n_requests == 0
    assert again.equals(first)


async def test_the_same_concept_from_two_classes_is_one_row(read: Any, tmp_path: Path) -> None:
    client, sent = endpoint(tmp_path, lambda _: concepts("Dark Centre", "dark centre!", "halo"))
    async with client:
        table = await propose(SAMPLES, read, client, "skin")
    assert list(table["concept_id"]) == ["dark-centre", "halo"]
    assert list(table["proposed_for"]) == [["red spots", "plain"]] * 2
    assert set(table["origin"]) == {"vlm"}
    assert len(sent) == 2


async def test_each_class_is_asked_with_its_own_images_before_those_of_others(read: Any, tmp_path: Path) -> None:
    client, sent = endpoint(tmp_path, lambda _: concepts("x"))
    async with client:
        await propose(SAMPLES, read, client, "skin", ProposeOptions(n_per_class=3, max_images_per_request=5))
    for body in sent:
        parts = body["messages"][1]["content"]
        kinds = ["image" if p["type"] == "image_url" else "text" for p in parts]
        assert kinds == ["text", "text", "image", "image", "image", "text", "image", "image"]


async def test_neither_ids_nor_other_class_names_are_sent(read: Any, tmp_path: Path) -> None:
    client, sent = endpoint(tmp_path, lambda _: concepts("x"))
    async with client:
        await propose(SAMPLES, read, client, "skin")
    texts = [json.dumps([p for p in b["messages"][1]["content"] if p["type"] == "text"]) for b in sent]
    assert sum("red spots" in t for t in texts) == sum('plain\\"' in t for t in texts) == 1
    assert not any("large-" in t or "small-" in t for t in texts)


async def test_an_unlabelled_folder_is_one_group(read: Any, make_embedded: Make) -> None:
    mixed = {"images": [f"{kind}-{i}" for i in range(5) for kind in ("large", "small")]}
    async with make_embedded() as client:
        table = await propose(mixed, read, client, "skin")
    assert "large-lesion" in set(table["concept_id"])


async def test_a_class_without_an_answer_is_left_out_and_said(
    read: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client, _ = endpoint(tmp_path, lambda b: concepts("x") if "red spots" in json.dumps(b) else "sorry")
    async with client:
        table = await propose(SAMPLES, read, client, "skin")
    assert list(table["proposed_for"]) == [["red spots"]]
    assert "'plain'" in caplog.text


async def test_no_answer_at_all_is_a_failure(read: Any, tmp_path: Path) -> None:
    client, _ = endpoint(tmp_path, lambda _: "sorry")
    async with client:
        with pytest.raises(StepFailed, match="invalid_json"):
            await propose(SAMPLES, read, client, "skin")


async def test_an_unreadable_sample_is_passed_over(read: Any, make_embedded: Make) -> None:
    samples = {"a": ["broken-1", *SAMPLES["red spots"]], "b": SAMPLES["plain"]}
    async with make_embedded() as client:
        assert len(await propose(samples, read, client, "skin"))


async def test_classes_take_turns_so_that_none_comes_last(read: Any, tmp_path: Path) -> None:
    client, _ = endpoint(
        tmp_path, lambda b: concepts("r1", "r2") if "red spots" in json.dumps(b) else concepts("p1", "p2")
    )
    async with client:
        table = await propose(SAMPLES, read, client, "skin")
    assert list(table["concept_id"]) == ["r1", "p1", "r2", "p2"]
