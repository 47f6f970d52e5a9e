from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import SecretStr

from annotation.judge import Asking, SentImage, judge
from annotation.prompts import CONCEPTS_MARK, EXAMPLE_MARK, Example, Framing
from annotation.vlm.client import VlmClient
from annotation.vlm.journal import Journal
from annotation.vlm.questions import Question, questions_of
from annotation.vlm.schema import FaultCode, VlmRequest
from annotation.vlm.settings import VlmSettings
from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import BudgetReached, EndpointError
from data_contracts.tables import JUDGEMENTS, State

LARGE = Concept("large-lesion", "large lesion", "The lesion covers more than 12.0 % of the image.")
RED = Concept("reddish-colour", "reddish colour", "Red or pink covers more than 30.0 % of the lesion.")
ROUND, OVAL, KIDNEY = (Concept(i, i, "", "nucleus shape") for i in ("round", "oval", "kidney"))
SHAPE = "choice-nucleus-shape"
QUESTIONS = questions_of(Vocabulary.of([LARGE, RED]))
SKIN = Framing("skin")
IDS = ["large-1", "small-2", "large-3"]
Make = Callable[..., VlmClient]
Reply = Callable[[dict[str, Any]], Any]


def ask_for(*concepts: Concept) -> tuple[Question, ...]:
    return questions_of(Vocabulary.of(concepts))


def text_of(body: Mapping[str, Any]) -> str:
    return "\n".join(p["text"] for p in body["messages"][1]["content"] if p["type"] == "text")


def asked_in(body: Mapping[str, Any]) -> list[str]:
    """Names of the questions in a request, as the endpoint reads them."""
    if CONCEPTS_MARK in text_of(body):
        listed, _ = json.JSONDecoder().raw_decode(text_of(body).split(CONCEPTS_MARK)[1].lstrip())
        return [c["id"] for c in listed]
    return [re.findall(r'"id": "([^"]+)"', text_of(body))[-1]]


def images_in(body: Mapping[str, Any]) -> list[bytes]:
    urls = [p["image_url"]["url"] for p in body["messages"][1]["content"] if p["type"] == "image_url"]
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


def verdicts(**states: str) -> dict[str, Any]:
    return {k.replace("_", "-"): {"state": v, "probability": 0.8, "evidence": "e"} for k, v in states.items()}


def one_word(p_yes: float) -> dict[str, Any]:
    top = [{"token": "yes", "logprob": math.log(p_yes)}, {"token": "no", "logprob": math.log(1 - p_yes)}]
    return {"content": "yes" if p_yes > 0.5 else "no", "logprobs": {"content": [{"top_logprobs": top}]}}


class Endpoint:
    """An endpoint that answers `present` and `none` to everything, unless `reply` says otherwise."""

    def __init__(self, reply: Reply = lambda _: {}) -> None:
        self.reply = reply
        self.requests: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        body = json.loads(request.content)
        reply = self.reply(body)
        if isinstance(reply, httpx2.Response):
            return reply
        if isinstance(reply, str):
            reply = {"content": reply}
        if "content" not in reply:
            usual = {name: verdicts(x="present")["x"] | {"choice": "none"} for name in asked_in(body)}
            # A question that is answered with None is left out.
            reply = {"content": json.dumps({k: v for k, v in (usual | reply).items() if v is not None})}
        message = {"role": "assistant", "content": reply["content"], "refusal": reply.get("refusal")}
        choice = {"finish_reason": reply.get("finish_reason", "stop"), "message": message}
        choice["logprobs"] = reply.get("logprobs")
        usage = {"prompt_tokens": 7, "completion_tokens": 3}
        return httpx2.Response(200, json={"id": f"r-{len(self.requests)}", "choices": [choice], "usage": usage})

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(r.content) for r in self.requests]

    @property
    def asked(self) -> list[list[str]]:
        """What was asked since the last look."""
        found = [asked_in(body) for body in self.bodies]
        self.requests.clear()
        return found


@pytest.fixture
def client_of(tmp_path: Path) -> Callable[..., VlmClient]:
    """Clients of an endpoint, each with the journal of the one before, as it is found on the disk."""

    def make(endpoint: Endpoint, **changes: Any) -> VlmClient:
        usual = {"base_url": "http://endpoint.test/v1", "model": "m", "max_retries": 0, "concurrency": 1}
        settings = VlmSettings(**(usual | changes))
        transport = httpx2.MockTransport(endpoint)
        return VlmClient(settings, SecretStr("sk-x"), Journal(tmp_path / "other"), transport=transport)

    return make


@pytest.fixture
def judged_by(client_of: Make, read: Any) -> Callable[..., Any]:
    """Judge some images with a fresh client of an endpoint; keyword arguments are settings."""

    async def judged(
        endpoint: Endpoint,
        questions: Sequence[Question] = QUESTIONS,
        image_ids: Sequence[str] = ("large-1",),
        framing: Framing = SKIN,
        **settings: Any,
    ) -> Any:
        options = {k: settings.pop(k) for k in ("advance", "journal_only") if k in settings}
        async with client_of(endpoint, **settings) as client:
            return await judge(image_ids, questions, read, client, framing, **options)

    return judged


def by_concept(judgements: pd.DataFrame, column: str = "state") -> dict[str, Any]:
    return dict(zip(judgements["concept_id"], judgements[column], strict=True))


# ---- the table ----------------------------------------------------------------------------------------------------


async def test_every_image_gets_a_row_per_concept_in_order(read: Any, make_embedded: Make) -> None:
    done: list[int] = []
    async with make_embedded() as client:
        judged = await judge(IDS, QUESTIONS, read, client, SKIN, advance=done.append)
    table = judged.judgements
    JUDGEMENTS.to_arrow(table, "test")
    assert list(table["image_id"]) == [i for i in IDS for _ in range(2)]
    assert list(table["concept_id"]) == ["large-lesion", "reddish-colour"] * 3
    assert list(table["state"][::2]) == ["present", "absent", "present"]
    assert set(table["probability_source"]) == {"measured"}
    assert (judged.failures, judged.n_from_journal, judged.n_requests, sum(done)) == ([], 0, 3, 3)


async def test_rows_say_who_was_asked_what_and_when(judged_by: Any) -> None:
    before = pd.Timestamp.now("UTC")
    judged = await judged_by(Endpoint(), (*QUESTIONS, *ask_for(ROUND, OVAL)))
    table = judged.judgements
    assert set(table["witness"]) == {"vlm"}
    assert set(table["witness_model"]) == {"m"}
    assert set(table["request_id"]) == {"r-1"}
    assert ((before <= table["created_at"]) & (table["created_at"] <= pd.Timestamp.now("UTC"))).all()
    # Two concepts on their own, and one choice between two values.
    assert table["prompt_sha256"].nunique() == 3
    assert (judged.usage.input_tokens, judged.usage.output_tokens) == (7, 3)


async def test_no_images_is_an_empty_table(judged_by: Any) -> None:
    judged = await judged_by(Endpoint(), image_ids=[])
    assert judged.judgements.empty
    JUDGEMENTS.to_arrow(judged.judgements, "test")


async def test_an_unreadable_image_is_a_failure_without_rows(read: Any, make_embedded: Make) -> None:
    done: list[int] = []
    async with make_embedded() as client:
        judged = await judge(["broken-1", "large-1"], QUESTIONS, read, client, SKIN, advance=done.append)
    assert judged.failures == [("broken-1", "truncated")]
    assert set(judged.judgements["image_id"]) == {"large-1"}
    assert sum(done) == 2


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
        await judge([f"large-{i}" for i in range(20)], QUESTIONS, counting, client, SKIN, advance=finished.append)
    assert most <= 3


# ---- what leaves --------------------------------------------------------------------------------------------------

_SENTINELS = ("zebrafoo", "quaggabar", "okapi", "tapir", "wombat")


async def test_the_bytes_sent_hold_nothing_of_class_path_name_or_patient(client_of: Make, tmp_path: Path) -> None:
    ids = ["wombat-train/zebrafoo/okapi-tapir_01.png", "wombat-test/quaggabar/okapi-tapir_02.png"]
    for number, image_id in enumerate(ids):
        path = tmp_path / "quaggabar-source" / image_id
        path.parent.mkdir(parents=True)
        notes = PngInfo()
        notes.add_text("Label", "zebrafoo of okapi")
        exif = Image.Exif()
        exif[270] = "quaggabar, patient tapir"
        pixels = np.full((60, 80, 3), (200, 90 + number, 60), np.uint8)
        Image.fromarray(pixels).save(path, pnginfo=notes, exif=exif)

    def from_disk(image_id: str) -> Any:
        with Image.open(tmp_path / "quaggabar-source" / image_id) as image:
            assert image.info["Label"]
            return np.asarray(image)

    endpoint = Endpoint()
    questions = (*QUESTIONS, *ask_for(ROUND, OVAL))
    async with client_of(endpoint, image_format="PNG") as client:
        judged = await judge(ids, questions, from_disk, client, Framing("dermoscopy"))
    assert (judged.failures, len(endpoint.requests)) == ([], 2)

    everything = [r.content + str(r.url).encode() + repr(r.headers.raw).encode() for r in endpoint.requests]
    everything += [image for body in endpoint.bodies for image in images_in(body)]
    for sentinel in (*_SENTINELS, str(tmp_path)):
        for sent in everything:
            assert sentinel.encode() not in sent


async def test_two_images_of_two_classes_are_asked_the_very_same_bytes_around_them(
    client_of: Make, read: Any, tmp_path: Path
) -> None:
    endpoint = Endpoint()
    ids = {"zebrafoo/large-1": "large-1", "quaggabar/small-1": "small-1"}
    async with client_of(endpoint) as client:
        await judge(list(ids), QUESTIONS, lambda i: read(ids[i]), client, SKIN)
    urls = [re.search(rb"data:image/jpeg;base64,[A-Za-z0-9+/=]+", r.content) for r in endpoint.requests]
    assert urls[0] is not None
    assert urls[1] is not None
    assert urls[0][0] != urls[1][0]
    around = [r.content.replace(u[0], b"IMAGE") for r, u in zip(endpoint.requests, urls, strict=True) if u]
    assert around[0] == around[1]
    assert b"IMAGE" in around[0]
    body = endpoint.bodies[0]
    assert set(body) == {"model", "messages", "response_format", "max_completion_tokens", "temperature", "seed"}
    first, second = (r.headers for r in endpoint.requests)
    assert {k for k in (*first, *second) if first.get(k) != second.get(k)} <= {"content-length", "idempotency-key"}


@pytest.mark.parametrize(
    ("changes", "kind", "size"),
    [
        ({}, "JPEG", (120, 120)),
        ({"image_side_px": 64}, "JPEG", (64, 64)),
        ({"image_format": "PNG", "image_side_px": 40}, "PNG", (40, 40)),
    ],
)
async def test_images_leave_re_encoded_within_the_configured_size_and_without_metadata(
    judged_by: Any, changes: dict[str, Any], kind: str, size: tuple[int, int]
) -> None:
    endpoint = Endpoint()
    await judged_by(endpoint, **changes)
    (image,) = images_in(endpoint.bodies[0])
    with Image.open(io.BytesIO(image)) as decoded:
        assert (decoded.format, decoded.size) == (kind, size)
        assert not decoded.getexif()
        # What remains is what the formats themselves demand.
        assert set(decoded.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    if kind == "PNG":
        assert re.findall(rb"IHDR|IDAT|IEND|tEXt|iTXt|zTXt|eXIf|tIME", image) == [b"IHDR", b"IDAT", b"IEND"]


async def test_in_process_images_are_lossless(read: Any, make_embedded: Make) -> None:
    async with make_embedded() as client:
        ((request, _), *_) = _missing("large-1", read, client)
    (image,) = (p for p in request.parts if isinstance(p, bytes))
    with Image.open(io.BytesIO(image)) as decoded:
        assert (decoded.format, decoded.info) == ("PNG", {})
        assert np.array_equal(np.asarray(decoded), read("large-1"))


# ---- nothing is asked twice ---------------------------------------------------------------------------------------


async def test_asking_again_sends_nothing_and_says_the_same(read: Any, make_embedded: Make) -> None:
    async with make_embedded() as client:
        first = await judge(IDS, QUESTIONS, read, client, SKIN)
    async with make_embedded() as client:
        again = await judge(IDS, QUESTIONS, read, client, SKIN)
    assert (again.n_requests, again.n_from_journal, again.usage.input_tokens) == (0, 3, 0)
    pd.testing.assert_frame_equal(again.judgements, first.judgements)


async def test_one_more_image_is_one_request_about_it(judged_by: Any) -> None:
    endpoint = Endpoint()
    await judged_by(endpoint, image_ids=IDS)
    assert len(endpoint.asked) == 3
    judged = await judged_by(endpoint, image_ids=[*IDS, "small-4"])
    assert (judged.n_requests, judged.n_from_journal, len(judged.judgements)) == (1, 3, 8)


async def test_the_same_pixels_under_another_name_are_not_asked_again(client_of: Make, read: Any) -> None:
    endpoint = Endpoint()
    async with client_of(endpoint) as client:
        await judge(["a", "b"], QUESTIONS, lambda _: read("large-1"), client, SKIN)
    assert len(endpoint.requests) == 1


async def test_a_changed_definition_asks_that_concept_and_no_other(judged_by: Any) -> None:
    endpoint = Endpoint()
    await judged_by(endpoint, image_ids=IDS)
    assert endpoint.asked == [["large-lesion", "reddish-colour"]] * 3
    changed = Concept(RED.concept_id, RED.name, "Any red at all.")
    judged = await judged_by(endpoint, ask_for(LARGE, changed), IDS)
    assert endpoint.asked == [["reddish-colour"]] * 3
    assert (judged.n_requests, judged.failures, len(judged.judgements)) == (3, [], 6)
    # And the old wording is still known.
    await judged_by(endpoint, image_ids=IDS)
    assert endpoint.asked == []


async def test_a_removed_and_added_concept_asks_nothing(judged_by: Any) -> None:
    endpoint = Endpoint()
    first = await judged_by(endpoint, image_ids=IDS)
    await judged_by(endpoint, ask_for(RED), IDS)
    again = await judged_by(endpoint, ask_for(RED, LARGE), IDS)
    assert endpoint.asked == [["large-lesion", "reddish-colour"]] * 3
    assert by_concept(again.judgements, "request_id") == by_concept(first.judgements, "request_id")


async def test_a_new_concept_is_asked_alone(judged_by: Any) -> None:
    endpoint = Endpoint()
    await judged_by(endpoint, ask_for(LARGE))
    judged = await judged_by(endpoint, ask_for(LARGE, RED, ROUND, OVAL))
    assert endpoint.asked == [["large-lesion"], ["reddish-colour", SHAPE]]
    assert by_concept(judged.judgements, "request_id")["large-lesion"] == "r-1"


@pytest.mark.parametrize(
    "change",
    [{"image_side_px": 64}, {"image_format": "PNG"}, {"temperature": 0.5}, {"seed": 1}, {"model": "n"}],
)
async def test_another_setting_that_bears_on_the_answer_asks_again_and_only_once(
    judged_by: Any, change: dict[str, Any]
) -> None:
    endpoint = Endpoint()
    await judged_by(endpoint)
    for _ in range(2):
        judged = await judged_by(endpoint, **change)
        await judged_by(endpoint)
    assert len(endpoint.asked) == 2
    assert judged.n_from_journal == 1


async def test_another_modality_asks_again(judged_by: Any) -> None:
    endpoint = Endpoint()
    await judged_by(endpoint)
    await judged_by(endpoint, framing=Framing("lung"))
    await judged_by(endpoint)
    assert len(endpoint.asked) == 2


@pytest.mark.parametrize("change", [{"concurrency": 4}, {"concepts_per_request": 1}, {"max_output_tokens": 500}])
async def test_other_settings_do_not(judged_by: Any, change: dict[str, Any]) -> None:
    endpoint = Endpoint()
    await judged_by(endpoint)
    await judged_by(endpoint, **change)
    assert len(endpoint.asked) == 1


async def test_after_a_kill_answers_are_found_although_the_questions_have_changed_meanwhile(
    read: Any, client_of: Make
) -> None:
    endpoint, killed = Endpoint(), client_of(Endpoint(), max_requests=2)
    with pytest.raises(BudgetReached):
        await judge(IDS, QUESTIONS, read, killed, SKIN)
    # Nothing was closed: what the journal holds is on the disk already.
    async with client_of(endpoint) as client:
        judged = await judge(IDS, ask_for(RED, ROUND, OVAL, LARGE), read, client, SKIN)
    assert endpoint.asked == [[SHAPE], [SHAPE], ["reddish-colour", SHAPE, "large-lesion"]]
    assert (judged.n_requests, judged.failures, len(judged.judgements)) == (3, [], 12)


async def test_the_cap_stops_and_the_same_command_goes_on(read: Any, make_embedded: Make) -> None:
    with pytest.raises(BudgetReached):
        async with make_embedded(max_requests=2) as client:
            await judge(IDS, QUESTIONS, read, client, SKIN)
    async with make_embedded(max_requests=2) as client:
        judged = await judge(IDS, QUESTIONS, read, client, SKIN)
    assert (judged.n_requests, judged.n_from_journal) == (1, 2)


# ---- answers that cannot be used ----------------------------------------------------------------------------------


async def test_a_concept_missing_in_a_good_answer_is_asked_again_alone_and_then_left(judged_by: Any) -> None:
    endpoint = Endpoint(lambda _: {"reddish-colour": None, "pneumonia": verdicts(x="present")["x"]})
    judged = await judged_by(endpoint)
    assert endpoint.asked == [["large-lesion", "reddish-colour"], ["reddish-colour"]]
    assert by_concept(judged.judgements) == {"large-lesion": "present", "reddish-colour": "not_assessed"}
    assert by_concept(judged.judgements, "evidence")["reddish-colour"] == "wrong_schema"
    assert judged.judgements["probability"].isna().tolist() == [False, True]
    assert judged.failures == [("large-1", "wrong_schema")]
    JUDGEMENTS.to_arrow(judged.judgements, "test")

    again = await judged_by(endpoint)
    assert endpoint.asked == []
    assert (again.n_from_journal, again.failures) == (1, judged.failures)


async def test_a_second_answer_heals_the_first(judged_by: Any) -> None:
    endpoint = Endpoint(lambda body: {"reddish-colour": None} if len(asked_in(body)) > 1 else {})
    judged = await judged_by(endpoint)
    assert endpoint.asked == [["large-lesion", "reddish-colour"], ["reddish-colour"]]
    assert by_concept(judged.judgements) == {"large-lesion": "present", "reddish-colour": "present"}
    assert by_concept(judged.judgements, "request_id") == {"large-lesion": "r-1", "reddish-colour": "r-2"}
    assert (judged.failures, judged.n_requests, judged.usage.input_tokens) == ([], 2, 14)


async def test_an_unusable_answer_leaves_its_image_not_assessed_with_the_reason(judged_by: Any) -> None:
    good: list[int] = []
    endpoint = Endpoint(lambda _: {} if len(good) == 0 and not good.append(1) else "I'd rather not.")
    judged = await judged_by(endpoint, image_ids=IDS)
    by_image = judged.judgements.groupby("image_id")["state"].unique().map(list)
    assert by_image["large-1"] == ["present"]
    assert by_image["small-2"] == ["not_assessed"]
    assert judged.failures == [("large-3", "invalid_json"), ("small-2", "invalid_json")]
    assert set(judged.judgements["evidence"]) == {"e", "invalid_json"}
    JUDGEMENTS.to_arrow(judged.judgements, "test")
    assert len(endpoint.requests) == 1 + 2 * 2


async def test_a_cut_off_answer_is_asked_again_with_more_room(judged_by: Any) -> None:
    cut = {"content": '{"large-le', "finish_reason": "length"}
    endpoint = Endpoint(lambda body: {} if body["max_completion_tokens"] > 400 else cut)
    judged = await judged_by(endpoint)
    limits = [body["max_completion_tokens"] for body in endpoint.bodies]
    assert (limits[1], judged.failures) == (2 * limits[0], [])


async def test_a_refusal_is_final(judged_by: Any) -> None:
    endpoint = Endpoint(lambda _: {"content": None, "refusal": "I cannot help with that."})
    for n_sent in (1, 1):
        judged = await judged_by(endpoint)
        assert len(endpoint.requests) == n_sent
        assert judged.failures == [("large-1", "refused")]
        assert set(judged.judgements["state"]) == {"not_assessed"}


async def test_a_request_that_failed_was_sent_and_is_sent_again_by_the_next_command(judged_by: Any) -> None:
    endpoint = Endpoint(lambda _: httpx2.Response(500, json={}))
    judged = await judged_by(endpoint)
    assert (judged.n_requests, judged.n_from_journal) == (1, 0)
    assert judged.failures == [("large-1", "server_error")]
    assert set(judged.judgements["evidence"]) == {"server_error"}
    assert judged.judgements["request_id"].isna().all()
    JUDGEMENTS.to_arrow(judged.judgements, "test")
    endpoint.reply = lambda _: {}
    assert (await judged_by(endpoint)).failures == []


async def test_a_dead_endpoint_stops_everything_and_keeps_what_came(read: Any, client_of: Make, tmp_path: Path) -> None:
    many = [f"large-{i}" for i in range(30)]
    endpoint = Endpoint(lambda _: {} if len(endpoint.requests) <= 5 else httpx2.Response(401, json={}))
    # Images with equal pixels are one question.
    numbered = {i: np.roll(read(i), k, axis=0) for k, i in enumerate(many)}
    async with client_of(endpoint, concurrency=2) as client:
        with pytest.raises(EndpointError):
            await judge(many, QUESTIONS, numbered.__getitem__, client, SKIN)
    assert len(endpoint.requests) <= 8
    assert len(Journal(tmp_path / "other")) == 5


# ---- many concepts ------------------------------------------------------------------------------------------------


async def test_more_concepts_than_fit_are_asked_in_equal_chunks(judged_by: Any) -> None:
    concepts = [Concept(f"c{i}", f"concept {i}") for i in range(5)]
    endpoint = Endpoint()
    judged = await judged_by(endpoint, ask_for(*concepts), concepts_per_request=2)
    asked = endpoint.asked
    assert [c for chunk in asked for c in chunk] == [c.concept_id for c in concepts]
    assert [len(chunk) for chunk in asked] in ([2, 1, 2], [2, 2, 1], [1, 2, 2])
    assert list(judged.judgements["concept_id"]) == [c.concept_id for c in concepts]
    assert judged.n_requests == 3


async def test_only_the_chunk_that_failed_is_asked_again(judged_by: Any) -> None:
    concepts = [Concept(f"c{i}", f"concept {i}") for i in range(4)]
    endpoint = Endpoint(lambda body: "no" if "c3" in asked_in(body) else {})
    judged = await judged_by(endpoint, ask_for(*concepts), concepts_per_request=2)
    assert endpoint.asked == [["c0", "c1"], ["c2", "c3"], ["c2", "c3"]]
    assert list(judged.judgements["state"]) == ["present", "present", "not_assessed", "not_assessed"]


# ---- groups -------------------------------------------------------------------------------------------------------


async def test_a_group_is_one_choice_and_a_row_for_every_value(judged_by: Any) -> None:
    endpoint = Endpoint(lambda _: {SHAPE: {"choice": "Oval", "probability": 0.7, "evidence": "longer"}})
    judged = await judged_by(endpoint, ask_for(ROUND, LARGE, OVAL, KIDNEY))
    table = judged.judgements
    assert endpoint.asked == [[SHAPE, "large-lesion"]]
    assert by_concept(table) == {"round": "absent", "oval": "present", "kidney": "absent", "large-lesion": "present"}
    assert by_concept(table, "probability") == pytest.approx(
        {"round": 0.15, "oval": 0.7, "kidney": 0.15, "large-lesion": 0.8}
    )
    assert by_concept(table, "probability_source") == {
        "round": "excluded",
        "oval": "stated",
        "kidney": "excluded",
        "large-lesion": "stated",
    }
    assert table.loc[table["concept_id"] != "large-lesion", "prompt_sha256"].nunique() == 1


@pytest.mark.parametrize(("choice", "state"), [("none", "absent"), ("uncertain", "uncertain")])
async def test_none_and_uncertain_hold_for_all_values(judged_by: Any, choice: str, state: str) -> None:
    endpoint = Endpoint(lambda _: {SHAPE: {"choice": choice, "probability": 0.9, "evidence": "e"}})
    judged = await judged_by(endpoint, ask_for(ROUND, OVAL))
    assert by_concept(judged.judgements) == {"round": state, "oval": state}


async def test_a_choice_that_is_no_choice_is_asked_again_alone(judged_by: Any) -> None:
    endpoint = Endpoint(lambda _: {SHAPE: {"choice": "square", "probability": 0.9}})
    judged = await judged_by(endpoint, ask_for(ROUND, OVAL, RED))
    assert endpoint.asked == [[SHAPE, "reddish-colour"], [SHAPE]]
    assert by_concept(judged.judgements) == {
        "round": "not_assessed",
        "oval": "not_assessed",
        "reddish-colour": "present",
    }


async def test_a_changed_value_asks_the_whole_group_and_nothing_else(judged_by: Any) -> None:
    endpoint = Endpoint()
    await judged_by(endpoint, ask_for(ROUND, OVAL, RED))
    await judged_by(endpoint, ask_for(ROUND, OVAL, KIDNEY, RED))
    assert endpoint.asked == [[SHAPE, "reddish-colour"], [SHAPE]]


async def test_values_left_over_by_a_measured_choice_were_not_measured(read: Any, make_embedded: Make) -> None:
    sizes = (
        Concept("large", "large lesion", "The lesion covers more than 12.0 % of the image.", "size"),
        Concept("small", "small lesion", "", "size"),
    )
    async with make_embedded() as client:
        judged = await judge(["large-1"], ask_for(*sizes), read, client, SKIN)
    assert by_concept(judged.judgements) == {"large": "present", "small": "absent"}
    assert by_concept(judged.judgements, "probability_source") == {"large": "measured", "small": "excluded"}


# ---- samples and log-probabilities --------------------------------------------------------------------------------


def sampled(*states: str) -> Endpoint:
    """Answers by seed: the first state to the first sample, and so on; concept `large-lesion` only."""
    return Endpoint(lambda body: verdicts(large_lesion=states[body["seed"]]) if states[body["seed"]] else "no")


async def test_the_share_of_samples_is_the_probability(judged_by: Any) -> None:
    endpoint = sampled("present", "absent", "present", "present", "uncertain")
    judged = await judged_by(endpoint, ask_for(LARGE), samples=5, temperature=0.7)
    assert sorted(body["seed"] for body in endpoint.bodies) == [0, 1, 2, 3, 4]
    assert {body["temperature"] for body in endpoint.bodies} == {0.7}
    (row,) = judged.judgements.to_dict("records")
    assert (row["state"], row["probability"], row["probability_source"]) == ("present", 0.7, "samples")
    assert judged.n_requests == 5
    again = await judged_by(endpoint, ask_for(LARGE), samples=5, temperature=0.7)
    assert again.n_requests == 0
    pd.testing.assert_frame_equal(again.judgements, judged.judgements)


@pytest.mark.parametrize(
    ("states", "state", "probability"),
    [
        (("present", "absent"), "uncertain", 0.5),
        (("absent", "absent", "present"), "absent", 1 / 3),
        (("present", "", "absent", "present"), "present", 2 / 3),
    ],
)
async def test_samples_agree_on_one_state_and_unusable_ones_do_not_count(
    judged_by: Any, states: tuple[str, ...], state: str, probability: float
) -> None:
    judged = await judged_by(sampled(*states), ask_for(LARGE), samples=len(states), temperature=1)
    (row,) = judged.judgements.to_dict("records")
    assert (row["state"], row["probability"]) == (state, pytest.approx(probability))


async def test_each_sample_is_asked_all_questions_at_once(judged_by: Any) -> None:
    endpoint = Endpoint()
    await judged_by(endpoint, samples=3, temperature=0.7)
    assert endpoint.asked == [["large-lesion", "reddish-colour"]] * 3


async def test_one_word_with_log_probabilities_per_concept(judged_by: Any) -> None:
    p = {"large-lesion": 0.95, "reddish-colour": 0.2}
    endpoint = Endpoint(lambda body: one_word(p[asked_in(body)[0]]))
    judged = await judged_by(endpoint, probability="logprobs")
    for body in endpoint.bodies:
        assert (body["logprobs"], body["top_logprobs"], "response_format" in body) == (True, 5, False)
    assert endpoint.asked == [["large-lesion"], ["reddish-colour"]]
    table = judged.judgements
    assert by_concept(table, "probability") == pytest.approx(p)
    assert by_concept(table) == {"large-lesion": "present", "reddish-colour": "absent"}
    assert set(table["probability_source"]) == {"logprobs"}
    JUDGEMENTS.to_arrow(table, "test")
    assert (await judged_by(endpoint, probability="logprobs")).n_requests == 0


async def test_a_word_without_log_probabilities_is_asked_again_and_then_left(judged_by: Any) -> None:
    endpoint = Endpoint(lambda body: {"content": "yes"} if asked_in(body) == ["reddish-colour"] else one_word(0.9))
    judged = await judged_by(endpoint, probability="logprobs")
    assert endpoint.asked == [["large-lesion"], ["reddish-colour"], ["reddish-colour"]]
    assert by_concept(judged.judgements) == {"large-lesion": "present", "reddish-colour": "not_assessed"}
    assert (await judged_by(endpoint, probability="logprobs")).n_requests == 0


@pytest.mark.parametrize("p", [(0.9, 0.8, 0.7), (0.3, 0.3, 0.2), (0.99, 0.01, 0.01), (0.1, 0.2, 0.95)])
async def test_values_that_exclude_each_other_never_add_up_to_more_than_one(
    judged_by: Any, p: tuple[float, ...]
) -> None:
    by_value = dict(zip(("round", "oval", "kidney"), p, strict=True))
    endpoint = Endpoint(lambda body: one_word(by_value[asked_in(body)[0]]))
    judged = await judged_by(endpoint, ask_for(ROUND, OVAL, KIDNEY), probability="logprobs")
    assert endpoint.asked == [["round"], ["oval"], ["kidney"]]
    found = by_concept(judged.judgements, "probability")
    assert sum(found.values()) <= 1 + 1e-9
    assert sorted(found, key=found.__getitem__) == sorted(by_value, key=by_value.__getitem__)
    present = [c for c, state in by_concept(judged.judgements).items() if state == "present"]
    # Three that are all likely leave none of them likely beside the others.
    assert present == ([max(by_value, key=by_value.__getitem__)] if max(p) / max(1, sum(p)) > 0.6 else [])
    if sum(p) <= 1:
        assert found == pytest.approx(by_value)


# ---- examples -----------------------------------------------------------------------------------------------------


async def test_examples_are_shown_before_the_image_with_what_the_expert_said_of_what_is_asked(judged_by: Any) -> None:
    shown = (
        Example(b"\xff\xd8\xff example one", {"large-lesion": State.PRESENT, "round": State.PRESENT}),
        Example(b"\xff\xd8\xff example two", {"reddish-colour": State.ABSENT}),
    )
    endpoint = Endpoint()
    await judged_by(endpoint, framing=Framing("skin", shown))
    (body,) = endpoint.bodies
    first, second, image = images_in(body)
    assert (first, second) == (shown[0].image, shown[1].image)
    assert image.startswith(b"\xff\xd8\xff")
    kinds = [p["type"] for p in body["messages"][1]["content"]]
    assert kinds == ["text", "text", "image_url", "text", "image_url", "text", "image_url"]
    told = [json.loads(line.removeprefix(EXAMPLE_MARK)) for line in text_of(body).splitlines() if EXAMPLE_MARK in line]
    assert told == [{"large-lesion": {"state": "present"}}, {"reddish-colour": {"state": "absent"}}]


async def test_other_examples_ask_again(judged_by: Any) -> None:
    endpoint = Endpoint()
    example = Example(b"\xff\xd8\xff one", {"large-lesion": State.PRESENT})
    for framing in (SKIN, Framing("skin", (example,)), Framing("skin", (example,)), SKIN):
        await judged_by(endpoint, framing=framing)
    assert len(endpoint.asked) == 2


# ---- in two halves: what is missing, and what the journal knows ---------------------------------------------------


async def test_from_the_journal_only_nothing_is_sent_and_the_open_ones_have_no_rows(judged_by: Any) -> None:
    endpoint = Endpoint()
    await judged_by(endpoint, ask_for(LARGE))
    endpoint.requests.clear()
    judged = await judged_by(endpoint, QUESTIONS, ["large-1", "small-2"], journal_only=True)
    assert endpoint.requests == []
    assert judged.n_requests == 0
    rows = list(zip(judged.judgements["image_id"], judged.judgements["concept_id"], strict=True))
    assert rows == [("large-1", "large-lesion")]
    assert judged.failures == [("large-1", "not_answered"), ("small-2", "not_answered")]


async def test_missing_requests_are_those_that_judging_sends_with_cells_to_find_their_answers(
    read: Any, client_of: Make
) -> None:
    endpoint = Endpoint(lambda body: {"reddish-colour": None} if len(asked_in(body)) > 1 else {})
    async with client_of(endpoint) as client:
        n_rounds = 0
        while found := _missing("large-1", read, client):
            n_rounds += 1
            for request, cells in found:
                assert not isinstance(await client.send(request, cells), FaultCode)
        assert n_rounds == 2
        collected = await judge(["large-1"], QUESTIONS, read, client, SKIN, journal_only=True)
    assert endpoint.asked == [["large-lesion", "reddish-colour"], ["reddish-colour"]]
    assert (collected.failures, len(collected.judgements)) == ([], 2)


def _missing(image_id: str, read: Any, client: VlmClient) -> list[tuple[VlmRequest, list[str]]]:
    return list(Asking(client, SKIN, QUESTIONS).missing(SentImage.of(read(image_id), client.settings)))


async def test_what_the_journal_knows_is_not_even_encoded(
    read: Any, make_embedded: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_embedded() as client:
        await judge(IDS, QUESTIONS, read, client, SKIN)
    monkeypatch.setattr("annotation.judge.encode", lambda *_args, **_options: pytest.fail("an image was encoded"))
    async with make_embedded() as client:
        assert (await judge(IDS, QUESTIONS, read, client, SKIN)).n_from_journal == len(IDS)
