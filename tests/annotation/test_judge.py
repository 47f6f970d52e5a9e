from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pandas as pd
import pytest
from PIL import Image

from annotation.judge import judge
from annotation.vlm.client import VlmClient
from annotation.vlm.journal import Journal
from annotation.vlm.settings import VlmSettings
from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import BudgetReached, EndpointError
from data_contracts.tables import JUDGEMENTS

LARGE = Concept("large-lesion", "large lesion", "The lesion covers more than 12.0 % of the image.")
RED = Concept("reddish-colour", "reddish colour", "Red or pink covers more than 30.0 % of the lesion.")
VOCABULARY = Vocabulary.of([LARGE, RED])
IDS = ["large-1", "small-2", "large-3"]
Make = Callable[..., VlmClient]


def endpoint(tmp_path: Path, answer: Callable[[int], httpx2.Response], **changes: Any) -> tuple[VlmClient, list[bytes]]:
    sent: list[bytes] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        sent.append(request.content)
        return answer(len(sent))

    settings = VlmSettings(**({"base_url": "http://endpoint.test/v1", "model": "m", "max_retries": 0} | changes))
    return VlmClient(settings, None, Journal(tmp_path / "other"), transport=httpx2.MockTransport(handler)), sent


def completion(content: str) -> httpx2.Response:
    choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return httpx2.Response(200, json={"id": "r-1", "choices": [choice], "usage": usage})


def verdicts(**states: str) -> str:
    return json.dumps(
        {k.replace("_", "-"): {"state": v, "probability": 0.8, "evidence": "e"} for k, v in states.items()}
    )


async def test_every_image_gets_a_row_per_concept_in_order(read: Any, make_embedded: Make) -> None:
    done: list[int] = []
    async with make_embedded() as client:
        judged = await judge(IDS, VOCABULARY, read, client, "skin", advance=done.append)
    table = judged.judgements
    JUDGEMENTS.to_arrow(table, "test")
    assert list(table["image_id"]) == [i for i in IDS for _ in VOCABULARY]
    assert list(table["concept_id"]) == list(VOCABULARY.ids) * 3
    assert list(table["state"][::2]) == ["present", "absent", "present"]
    assert (judged.failures, judged.n_from_journal, judged.n_requests, sum(done)) == ([], 0, 3, 3)


async def test_asking_again_sends_nothing_and_says_the_same(read: Any, make_embedded: Make) -> None:
    async with make_embedded() as client:
        first = await judge(IDS, VOCABULARY, read, client, "skin")
    async with make_embedded() as client:
        again = await judge(IDS, VOCABULARY, read, client, "skin")
    assert (again.n_requests, again.n_from_journal) == (0, 3)
    pd.testing.assert_frame_equal(again.judgements, first.judgements)


async def test_one_more_image_is_one_request_and_another_concept_asks_again(read: Any, make_embedded: Make) -> None:
    async with make_embedded() as client:
        await judge(IDS, VOCABULARY, read, client, "skin")
    async with make_embedded() as client:
        assert (await judge([*IDS, "small-4"], VOCABULARY, read, client, "skin")).n_requests == 1
        assert (await judge(IDS, Vocabulary.of([LARGE]), read, client, "skin")).n_requests == 3


async def test_the_bytes_sent_hold_no_class_no_label_and_no_file_name(read: Any, tmp_path: Path) -> None:
    secret_ids = ["large-7", "small-8"]
    client, sent = endpoint(tmp_path, lambda _: completion(verdicts(large_lesion="present", reddish_colour="absent")))

    def with_metadata(image_id: str) -> Any:
        return read(image_id)

    async with client:
        await judge(secret_ids, VOCABULARY, with_metadata, client, "dermoscopy")
    for body in sent:
        content = json.loads(body)
        words = json.dumps([content["messages"][0], content["messages"][1]["content"][0], content["response_format"]])
        for secret in (
            "basophil",
            "malignant",
            "large-7",
            "small-8",
            "large_",
            "label",
            "train",
            "test",
            str(tmp_path),
        ):
            assert secret not in words
        assert set(content) == {"model", "messages", "response_format", "max_completion_tokens", "temperature", "seed"}
        (image,) = (p for p in content["messages"][1]["content"] if p["type"] == "image_url")
        decoded = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].split(",")[1])))
        assert decoded.info == {}
        assert max(decoded.size) <= 512


async def test_two_images_of_different_classes_are_asked_the_same_words(read: Any, tmp_path: Path) -> None:
    client, sent = endpoint(tmp_path, lambda _: completion(verdicts(large_lesion="present", reddish_colour="absent")))
    async with client:
        await judge(["large-1", "small-1"], VOCABULARY, read, client, "skin")
    bodies = [json.loads(body) for body in sent]
    for body in bodies:
        del body["messages"][1]["content"][1]
    assert bodies[0] == bodies[1]


async def test_an_unusable_answer_leaves_its_image_not_assessed_with_the_reason(read: Any, tmp_path: Path) -> None:
    good = completion(verdicts(large_lesion="present", reddish_colour="absent"))
    client, _ = endpoint(tmp_path, lambda n: good if n == 1 else completion("I'd rather not."), concurrency=1)
    async with client:
        judged = await judge(IDS, VOCABULARY, read, client, "skin")
    by_image = judged.judgements.groupby("image_id")["state"].unique().map(list)
    assert by_image["large-1"] == ["present", "absent"]
    assert by_image["small-2"] == ["not_assessed"]
    assert judged.failures == [("large-3", "invalid_json"), ("small-2", "invalid_json")]
    assert set(judged.judgements["evidence"]) == {"e", "invalid_json"}
    JUDGEMENTS.to_arrow(judged.judgements, "test")


async def test_missing_concepts_are_not_assessed_and_unasked_ones_do_not_appear(read: Any, tmp_path: Path) -> None:
    client, _ = endpoint(tmp_path, lambda _: completion(verdicts(large_lesion="present", pneumonia="present")))
    async with client:
        table = (await judge(["large-1"], VOCABULARY, read, client, "skin")).judgements
    assert dict(zip(table["concept_id"], table["state"], strict=True)) == {
        "large-lesion": "present",
        "reddish-colour": "not_assessed",
    }
    assert table["probability"].isna().tolist() == [False, True]


async def test_an_unreadable_image_is_a_failure_without_rows(read: Any, make_embedded: Make) -> None:
    done: list[int] = []
    async with make_embedded() as client:
        judged = await judge(["broken-1", "large-1"], VOCABULARY, read, client, "skin", advance=done.append)
    assert judged.failures == [("broken-1", "truncated")]
    assert set(judged.judgements["image_id"]) == {"large-1"}
    assert sum(done) == 2


async def test_a_dead_endpoint_stops_everything_and_keeps_what_came(read: Any, tmp_path: Path) -> None:
    good = completion(verdicts(large_lesion="present", reddish_colour="absent"))
    many = [f"large-{i}" for i in range(30)]
    client, sent = endpoint(tmp_path, lambda n: good if n <= 5 else httpx2.Response(401, json={}), concurrency=2)
    async with client:
        with pytest.raises(EndpointError):
            await judge(many, VOCABULARY, read, client, "skin")
    assert len(sent) <= 8
    assert len(Journal(tmp_path / "other")) == 5


async def test_the_cap_stops_and_the_same_command_goes_on(read: Any, make_embedded: Make) -> None:
    with pytest.raises(BudgetReached):
        async with make_embedded(max_requests=2) as client:
            await judge(IDS, VOCABULARY, read, client, "skin")
    async with make_embedded(max_requests=2) as client:
        judged = await judge(IDS, VOCABULARY, read, client, "skin")
    assert (judged.n_requests, judged.n_from_journal) == (1, 2)


async def test_each_image_is_handed_over_as_it_comes(read: Any, make_embedded: Make) -> None:
    frames: list[pd.DataFrame] = []
    async with make_embedded() as client:
        await judge(IDS, VOCABULARY, read, client, "skin", on_answer=frames.append)
    assert sorted(f["image_id"].iloc[0] for f in frames) == sorted(IDS)
    assert all(len(f) == len(VOCABULARY) for f in frames)


async def test_no_images_is_an_empty_table(read: Any, make_embedded: Make) -> None:
    async with make_embedded() as client:
        judged = await judge([], VOCABULARY, read, client, "skin")
    assert judged.judgements.empty
    JUDGEMENTS.to_arrow(judged.judgements, "test")


async def test_few_images_are_in_memory_at_once(read: Any, make_embedded: Make) -> None:
    started = 0
    finished: list[int] = []
    most = 0

    def counting(image_id: str) -> Any:
        nonlocal started, most
        started += 1
        most = max(most, started - sum(finished))
        return read(image_id)

    async with make_embedded(concurrency=3) as client:
        await judge([f"large-{i}" for i in range(20)], VOCABULARY, counting, client, "skin", advance=finished.append)
    assert most <= 3
