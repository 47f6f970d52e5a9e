from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import numpy as np
import openai
import pytest
import uvicorn

from annotation.prompts import EXAMPLE_MARK, Example, Framing, judging_request
from annotation.proposal_prompts import proposing_request
from annotation.vlm.client import VlmClient
from annotation.vlm.embedded import create_app
from annotation.vlm.journal import Journal
from annotation.vlm.questions import questions_of
from annotation.vlm.schema import FaultCode, VlmRequest, judgement_schema, parse_judgements, parse_proposals
from annotation.vlm.settings import EMBEDDED_MODEL, VlmSettings
from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import EndpointError
from data_contracts.pixels import encode
from data_contracts.tables import State

VOCABULARY = Vocabulary.of(
    [
        Concept("large-lesion", "large lesion", "The lesion covers more than 12.0 % of the image."),
        Concept("erythema", "erythema", "Redness of the skin."),
        Concept("auer-rods", "Auer rods", "Needle-shaped inclusions."),
    ]
)


def disc(radius_px: int, colour: tuple[int, int, int]) -> bytes:
    y, x = np.ogrid[0:120, 0:120]
    pixels = np.full((120, 120, 3), (225, 185, 165), np.uint8)
    pixels[np.hypot(x - 60, y - 60) <= radius_px] = colour
    return encode(pixels, 256)


LARGE_RED, SMALL_BROWN = disc(38, (190, 60, 60)), disc(12, (110, 75, 55))


QUESTIONS = questions_of(VOCABULARY)
FRAMING = Framing("dermoscopy")


@pytest.fixture
def client(tmp_path: Path) -> VlmClient:
    return VlmClient(VlmSettings(), None, Journal(tmp_path / "journal"))


async def judged(
    client: VlmClient, image: bytes, vocabulary: Vocabulary = VOCABULARY, framing: Framing = FRAMING
) -> dict[str, State]:
    questions = questions_of(vocabulary)
    answer = await client.ask(
        judging_request(image, questions, framing, None), lambda text: parse_judgements(text, questions)
    )
    assert answer.record is not None
    jsonschema.validate(json.loads(answer.record.text or ""), judgement_schema(questions))
    assert answer.value is not None
    return {concept_id: verdict.state for concept_id, verdict in answer.value.items()}


async def test_it_judges_what_it_can_measure_and_is_uncertain_of_the_rest(client: VlmClient) -> None:
    async with client:
        large_red, small_brown = await judged(client, LARGE_RED), await judged(client, SMALL_BROWN)
    assert large_red == {"large-lesion": State.PRESENT, "erythema": State.PRESENT, "auer-rods": State.UNCERTAIN}
    assert small_brown == {"large-lesion": State.ABSENT, "erythema": State.ABSENT, "auer-rods": State.UNCERTAIN}


async def test_of_values_that_exclude_each_other_it_chooses_the_measured_one(client: VlmClient) -> None:
    sizes = (
        Concept("large", "large lesion", "The lesion covers more than 12.0 % of the image.", "size"),
        Concept("small", "small lesion", "", "size"),
    )
    unmeasured = (
        Concept("auer-rods", "Auer rods", "", "inclusions"),
        Concept("bodies", "Döhle bodies", "", "inclusions"),
    )
    async with client:
        states = await judged(client, LARGE_RED, Vocabulary.of([*sizes, *unmeasured]))
    assert states["large"] is State.PRESENT
    assert states["small"] is State.ABSENT
    assert {states["auer-rods"], states["bodies"]} == {State.UNCERTAIN}


async def test_it_judges_the_image_and_not_the_examples_before_it(client: VlmClient) -> None:
    shown = Framing("dermoscopy", (Example(LARGE_RED, {"large-lesion": State.PRESENT}),))
    request = judging_request(SMALL_BROWN, QUESTIONS, shown, None)
    assert any(isinstance(part, str) and part.startswith(EXAMPLE_MARK) for part in request.parts)
    async with client:
        assert await judged(client, SMALL_BROWN, framing=shown) == await judged(client, SMALL_BROWN)


async def test_it_proposes_definitions_that_it_can_judge(client: VlmClient) -> None:
    own = [disc(36 + k % 3, (190, 60 + 3 * k, 60)) for k in range(8)]
    others = [disc(12 + k % 3, (110, 75 - 3 * k, 55)) for k in range(8)]
    request = proposing_request(
        "anything", own, others, "skin", n_concepts=8, name_characters=30, max_output_tokens=None
    )
    async with client:
        proposed = (await client.ask(request, parse_proposals)).value
        assert proposed
        names = [p.name for p in proposed]
        assert {"large lesion", "reddish colour"} <= set(names)
        vocabulary = Vocabulary.of(Concept(p.name, p.name, p.definition) for p in proposed)
        states = await judged(client, own[0], vocabulary)
    assert states["large lesion"] is State.PRESENT


async def test_the_class_name_has_no_influence_on_proposals(client: VlmClient) -> None:
    own, others = [LARGE_RED] * 4, [SMALL_BROWN] * 4
    async with client:
        answers = [
            await client.ask(
                proposing_request(name, own, others, "skin", n_concepts=8, name_characters=30, max_output_tokens=None),
                parse_proposals,
            )
            for name in ("melanoma", "erythema large blue")
        ]
    assert answers[0].value == answers[1].value


async def test_tokens_are_counted_and_the_answer_is_signed(client: VlmClient) -> None:
    request = judging_request(LARGE_RED, QUESTIONS, FRAMING, None)
    async with client:
        answer = await client.ask(request, parse_proposals)
    assert answer.usage.input_tokens > 300
    assert answer.usage.output_tokens > 10
    assert client.settings.model == EMBEDDED_MODEL


async def test_an_answer_over_the_limit_is_cut_off(client: VlmClient) -> None:
    request = judging_request(LARGE_RED, QUESTIONS, FRAMING, 16)
    async with client:
        answer = await client.ask(request, lambda text: parse_judgements(text, QUESTIONS))
    assert answer.fault is FaultCode.CUT_OFF


async def test_a_wrong_model_is_a_404(server: str, tmp_path: Path) -> None:
    async with VlmClient(VlmSettings(base_url=server, model="gpt-nonsense"), None, Journal(tmp_path)) as client:
        with pytest.raises(EndpointError, match="gpt-nonsense"):
            await client.ask(judging_request(LARGE_RED, QUESTIONS, FRAMING, None), parse_proposals)


@pytest.mark.parametrize(
    "change",
    [
        {"messages": "hello"},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,!!"}}]}
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}
            ]
        },
        {"messages": None},
        {"stream": True, "messages": []},
    ],
)
async def test_requests_that_make_no_sense_are_400(change: dict[str, Any]) -> None:
    transport = httpx2.ASGITransport(create_app(1))
    async with httpx2.AsyncClient(transport=transport, base_url="http://embedded") as http:
        response = await http.post("/v1/chat/completions", json={"model": EMBEDDED_MODEL, "messages": []} | change)
        assert response.status_code == 400
        assert "message" in response.json()["error"]
        assert (await http.post("/v1/chat/completions", content=b"{")).status_code == 400


async def test_a_question_without_an_image_still_gets_valid_json() -> None:
    transport = httpx2.ASGITransport(create_app(1))
    body = {"model": EMBEDDED_MODEL, "messages": [{"role": "user", "content": "What is a basophil?"}]}
    async with httpx2.AsyncClient(transport=transport, base_url="http://embedded") as http:
        response = await http.post("/v1/chat/completions", json=body)
    assert json.loads(response.json()["choices"][0]["message"]["content"]) == {"concepts": []}


async def test_measuring_does_not_block_the_event_loop(client: VlmClient) -> None:
    longest_s = 0.0

    async def watch() -> None:
        nonlocal longest_s
        while True:
            start_s = time.monotonic()
            await asyncio.sleep(0.005)
            longest_s = max(longest_s, time.monotonic() - start_s)

    watcher = asyncio.create_task(watch())
    requests = [VlmRequest("s", (str(i), LARGE_RED), "concept_proposal", {}, 5000) for i in range(12)]
    async with client:
        await asyncio.gather(*(client.ask(r, parse_proposals) for r in requests))
    watcher.cancel()
    assert longest_s < 0.5


@pytest.fixture
def server() -> Iterator[str]:
    """The embedded endpoint over real HTTP, on a free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listening = uvicorn.Server(uvicorn.Config(create_app(), log_level="warning"))
        thread = threading.Thread(target=listening.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not listening.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        listening.should_exit = True
        thread.join()


async def test_over_http_it_answers_the_same(server: str, client: VlmClient, tmp_path: Path) -> None:
    settings = VlmSettings(base_url=server, model=EMBEDDED_MODEL)
    async with client, VlmClient(settings, None, Journal(tmp_path / "remote")) as remote:
        assert await judged(remote, LARGE_RED) == await judged(client, LARGE_RED)
        assert await remote.model_names() == [EMBEDDED_MODEL]


async def test_any_openai_client_can_talk_to_it(server: str) -> None:
    url = "data:image/png;base64," + base64.b64encode(LARGE_RED).decode()
    content: Any = [{"type": "text", "text": "Propose."}, {"type": "image_url", "image_url": {"url": url}}]
    async with openai.AsyncOpenAI(base_url=server, api_key="any") as client:
        answer = await client.chat.completions.create(
            model=EMBEDDED_MODEL, messages=[{"role": "user", "content": content}]
        )
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].finish_reason == "stop"
