"""The simulated endpoint keeps OpenAI's protocol, errs as told, and serves each fault as it says."""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from PIL import Image, ImageDraw

from benchmarks.simulated_endpoint import (
    DEFAULT_MODEL,
    FAULTS,
    FaultPlan,
    Noise,
    RateLimiter,
    Sight,
    Simulator,
    Witness,
    answer,
    discs,
    read_question,
    read_truth,
    said_of_concept,
)

COLOURS = {"red": (210, 30, 40), "green": (30, 170, 60), "blue": (40, 60, 210), "yellow": (235, 210, 40)}
IMAGE = b"\x89PNG no picture, and nobody minds"
MODEL = "any-model"

Change = Callable[[dict[str, object]], None]


def verdict_schema() -> dict[str, Any]:
    fields = {
        "state": {"type": "string", "enum": ["present", "absent", "uncertain"]},
        "probability": {"type": "number", "minimum": 0, "maximum": 1},
        "evidence": {"type": "string"},
    }
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def choice_schema(*members: str) -> dict[str, Any]:
    fields = {"choice": {"type": "string", "enum": [*members, "none", "uncertain"]}}
    return {
        "type": "object",
        "properties": {**fields, "probability": {"type": "number"}, "evidence": {"type": "string"}},
    }


def judging_schema(concepts: tuple[str, ...] = ("dark", "large"), **choices: tuple[str, ...]) -> dict[str, Any]:
    properties: dict[str, Any] = {concept: {"$ref": "#/$defs/verdict"} for concept in concepts}
    properties |= {name: choice_schema(*members) for name, members in choices.items()}
    return {"type": "object", "properties": properties, "$defs": {"verdict": verdict_schema()}}


SCHEMA = judging_schema(("dark", "large", "granular"), **{"choice-shape": ("round", "lobed", "oval")})


def body(
    schema: dict[str, Any] | None = SCHEMA, *images: bytes, text: str = "Judge the image.", **changes: Any
) -> dict[str, Any]:
    """A request as the product sends it."""
    urls = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images or (IMAGE,)]
    parts = [{"type": "text", "text": text}, *({"type": "image_url", "image_url": {"url": u}} for u in urls)]
    form = {"type": "json_schema", "json_schema": {"name": "judgements", "strict": True, "schema": schema}}
    messages = [{"role": "system", "content": "You observe."}, {"role": "user", "content": parts}]
    request = {"model": MODEL, "messages": messages, "temperature": 0}
    return request | ({} if schema is None else {"response_format": form}) | changes


def picture(colour: str, n_discs: int, image_format: str = "PNG") -> bytes:
    image = Image.new("RGB", (256, 256), (128, 128, 128))
    places = [(64, 64), (192, 64), (64, 192), (192, 192)] if n_discs == 4 else [(128, 128)]
    for x, y in places:
        ImageDraw.Draw(image).ellipse((x - 40, y - 40, x + 40, y + 40), COLOURS[colour])
    stream = io.BytesIO()
    image.save(stream, image_format)
    return stream.getvalue()


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    with Simulator("--batch-seconds", 0.4, "--batch-failure-share", 0.3, "--stop-after-s", 120) as running:
        yield running


@pytest.fixture
def faults(simulator: Simulator) -> Iterator[Change]:
    yield simulator.set_faults
    simulator.set_faults({})


@pytest.fixture(scope="module")
def client(simulator: Simulator) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=simulator.base_url, api_key="x", max_retries=0, timeout=10) as opened:
        yield opened


def content_of(client: openai.OpenAI, request: dict[str, Any] | None = None) -> Any:
    completion = client.chat.completions.create(**(request or body()))
    return json.loads(completion.choices[0].message.content or "")


class Received(NamedTuple):
    """A response as it came, with what an OpenAI client hides."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def post(simulator: Simulator, *, timeout_s: float = 5, n_bytes: int | None = None) -> Received:
    """The response to one request, or its first bytes."""
    connection = http.client.HTTPConnection(simulator.base_url.split("/")[2], timeout=timeout_s)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body()), {"connection": "close"})
        with connection.getresponse() as response:
            return Received(response.status, response.headers, response.read(n_bytes))
    finally:
        connection.close()


class TestAnswers:
    def test_a_completion_has_the_shape_that_the_openai_package_knows(self, client: openai.OpenAI) -> None:
        completion = client.chat.completions.create(**body())
        [choice] = completion.choices
        assert (completion.object, completion.model, choice.finish_reason) == ("chat.completion", MODEL, "stop")
        assert choice.message.refusal is None
        content = json.loads(choice.message.content or "")
        assert list(content) == ["dark", "large", "granular", "choice-shape"]
        assert set(content["dark"]) == {"state", "probability", "evidence"}
        assert content["dark"]["state"] in {"present", "absent"}
        assert content["choice-shape"]["choice"] in {"round", "lobed", "oval"}
        assert completion.usage is not None
        assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
        assert [model.id for model in client.models.list().data] == [DEFAULT_MODEL]

    def test_asking_again_and_asking_alone_give_the_same_answer(self, client: openai.OpenAI) -> None:
        first = content_of(client)
        assert content_of(client) == first
        alone = content_of(client, body(judging_schema(("large",))))
        assert alone["large"] == first["large"]
        other = content_of(client, body(SCHEMA, b"another image"))
        assert other != first
        # Examples come first: the last image is the one in question.
        assert content_of(client, body(SCHEMA, b"another image", IMAGE)) == first

    def test_errors_have_the_given_rates_and_the_probability_tells_their_side(self) -> None:
        witness = Witness(noise=Noise(sensitivity=0.9, specificity=0.7), noise_of={"noisy": Noise(0.5, 0.5)})
        sights = [Sight.of(str(n).encode()) for n in range(1200)]
        hits: dict[tuple[str, bool], list[bool]] = {}
        for sight in sights:
            for concept in ("dark", "noisy"):
                said = said_of_concept(concept, sight, witness)
                is_there = witness.is_there(sight.sha256, concept)
                assert (said.word == "present") == (said.probability > 0.5)
                hits.setdefault((concept, is_there), []).append((said.word == "present") == is_there)
        rates = {key: sum(found) / len(found) for key, found in hits.items()}
        assert rates["dark", True] == pytest.approx(0.9, abs=0.05)
        assert rates["dark", False] == pytest.approx(0.7, abs=0.05)
        assert rates["noisy", True] == pytest.approx(0.5, abs=0.08)
        assert len(hits["dark", True]) / len(sights) == pytest.approx(witness.prevalence, abs=0.05)

    def test_choices_are_right_as_often_as_the_sensitivity_says_and_never_doubtful_unasked(self) -> None:
        witness = Witness(noise=Noise(0.8, 0.8), noise_of={"lobed": Noise(1.0, 1.0)})
        members = ("round", "lobed", "oval")
        hits: dict[str, list[bool]] = {m: [] for m in members}
        for n in range(900):
            sight = Sight.of(str(n).encode())
            true = witness.true_choice(sight.sha256, members)
            said = answer(judging_schema((), shape=members), sight, witness)["shape"]["choice"]
            hits[true].append(said == true)
            assert said != "uncertain"
        assert all(hits["lobed"])
        for member in ("round", "oval"):
            assert sum(hits[member]) / len(hits[member]) == pytest.approx(0.8, abs=0.08)

    def test_given_truth_is_told_by_a_perfect_witness_and_errors_are_the_seeds(self) -> None:
        truth = {Sight.of(IMAGE).sha256: {"dark": True, "large": False, "round": False, "lobed": True, "oval": False}}
        perfect = Witness(noise=Noise(1.0, 1.0), truth=truth)
        told = answer(SCHEMA, Sight.of(IMAGE), perfect)
        assert (told["dark"]["state"], told["large"]["state"]) == ("present", "absent")
        assert told["choice-shape"]["choice"] == "lobed"
        nothing = {Sight.of(IMAGE).sha256: dict.fromkeys(("round", "lobed", "oval"), False)}
        told = answer(SCHEMA, Sight.of(IMAGE), Witness(noise=Noise(1.0, 1.0), truth=nothing))
        assert told["choice-shape"]["choice"] == "none"
        sights = [Sight.of(str(n).encode()) for n in range(50)]
        said = [[said_of_concept("dark", s, Witness(seed=seed)).word for s in sights] for seed in (1, 2)]
        there = [[Witness(seed=seed).is_there(s.sha256, "dark") for s in sights] for seed in (1, 2)]
        assert there[0] == there[1]
        assert said[0] != said[1]

    def test_uncertain_and_wavering_shares(self) -> None:
        sights = [Sight.of(str(n).encode()) for n in range(400)]
        unsure = Witness(uncertain_share=0.3)
        words = [said_of_concept("dark", sight, unsure).word for sight in sights]
        assert words.count("uncertain") / len(words) == pytest.approx(0.3, abs=0.07)
        wavering = Witness(noise=Noise(0.5, 0.5), wavering_share=0.4)
        changed = [
            said_of_concept("dark", s, wavering, "1") != said_of_concept("dark", s, wavering, "2") for s in sights
        ]
        assert sum(changed) / len(changed) == pytest.approx(0.4, abs=0.08)

    def test_a_blind_witness_says_the_same_of_every_image(self) -> None:
        blind = Witness(is_blind=True)
        answers = [answer(SCHEMA, Sight.of(str(n).encode()), blind) for n in range(20)]
        assert all(found == answers[0] for found in answers)
        probes = judging_schema(("probe-several",), **{"probe-colour": ("disc-red", "disc-blue")})
        pictures = [picture("red", 1), picture("blue", 4)]
        assert answer(probes, Sight.of(pictures[0]), blind) == answer(probes, Sight.of(pictures[1]), blind)

    def test_other_shapes_are_filled_as_their_schema_says(self, client: openai.OpenAI) -> None:
        text = {"type": "string"}
        row = {"name": text, "definition": text, "group": {"type": ["string", "null"]}, "synonyms": {"type": "array"}}
        schema = {"properties": {"concepts": {"type": "array", "items": {"type": "object", "properties": row}}}}
        concepts = content_of(client, body(schema))["concepts"]
        assert len(concepts) >= 5
        assert all(set(c) == set(row) and c["name"] and c["definition"] and c["synonyms"] == [] for c in concepts)
        others = {"a": {"type": "boolean"}, "b": {"type": "number"}, "c": {"anyOf": [{"type": "null"}, {"const": 3}]}}
        found = content_of(client, body({"properties": others}))
        assert (type(found["a"]), type(found["b"]), found["c"]) == (bool, float, 3)

    def test_without_a_schema_the_list_of_questions_is_found(self, client: openai.OpenAI) -> None:
        questions = [{"id": "dark", "name": "dark"}, {"id": "shape", "choice_of": [{"id": "round"}, {"id": "oval"}]}]
        found = content_of(client, body(None, text=f"As JSON:\n{json.dumps(questions)}"))
        assert found["dark"]["state"] in {"present", "absent"}
        assert found["shape"]["choice"] in {"round", "oval"}

    @pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
    @pytest.mark.parametrize("n_discs", [1, 4])
    def test_probes_are_answered_from_the_pixels(self, client: openai.OpenAI, n_discs: int, image_format: str) -> None:
        members = tuple(f"probe-{colour}" for colour in COLOURS)
        schema = judging_schema(("probe-several",), **{"probe-colour": members})
        for colour in COLOURS:
            image = picture(colour, n_discs, image_format)
            assert discs(image) == (colour, n_discs)
            found = content_of(client, body(schema, image))
            assert found["probe-colour"]["choice"] == f"probe-{colour}"
            assert found["probe-several"]["state"] == ("present" if n_discs > 1 else "absent")

    def test_yes_and_no_come_with_log_probabilities_that_fit_the_answer(self, client: openai.OpenAI) -> None:
        words = set()
        for n in range(12):
            text = 'Can this be seen? Answer with one word: yes or no.\n\n{"id": "dark", "name": "dark"}'
            request = body(None, str(n).encode(), text=text, logprobs=True, top_logprobs=5, max_completion_tokens=16)
            [choice] = client.chat.completions.create(**request).choices
            assert choice.logprobs is not None
            [token] = choice.logprobs.content or []
            assert token.token == choice.message.content
            top = {entry.token: math.exp(entry.logprob) for entry in token.top_logprobs}
            assert len(top) == 5
            assert sum(top.values()) <= 1
            yes, no = top["yes"] + top.get("Yes", 0), top["no"] + top.get("No", 0)
            said = said_of_concept("dark", Sight.of(str(n).encode()), Witness())
            assert yes / (yes + no) == pytest.approx(said.probability, abs=0.01)
            words.add(choice.message.content)
        assert words == {"yes", "no"}

    def test_several_samples_come_as_several_choices(self, client: openai.OpenAI) -> None:
        completion = client.chat.completions.create(**body(n=3, temperature=0.7))
        assert [choice.index for choice in completion.choices] == [0, 1, 2]

    def test_tokens_are_counted_as_openai_does(self, client: openai.OpenAI) -> None:
        def prompt_tokens(*images: bytes, text: str = "x" * 400) -> int:
            usage = client.chat.completions.create(**body(None, *images, text=text)).usage
            assert usage is not None
            return usage.prompt_tokens

        small, large = picture("red", 1), io.BytesIO()
        Image.new("RGB", (1024, 1024)).save(large, "JPEG")
        assert prompt_tokens(small, small) - prompt_tokens(small) == 85 + 170
        # 1024 pixels are scaled to 768: two tiles by two.
        assert prompt_tokens(large.getvalue()) - prompt_tokens(small) == 3 * 170
        assert prompt_tokens(small, text="x" * 800) - prompt_tokens(small) == 100

    def test_an_answer_longer_than_the_limit_is_cut_off(self, client: openai.OpenAI) -> None:
        completion = client.chat.completions.create(**body(max_completion_tokens=16))
        assert completion.choices[0].finish_reason == "length"
        assert len(completion.choices[0].message.content or "") == 64

    @pytest.mark.parametrize(
        "request_body", [{}, body(top_logprobs=3), body(logprobs=True, top_logprobs=21), {"model": 1, "messages": [1]}]
    )
    def test_what_is_no_request_is_refused(self, request_body: dict[str, Any]) -> None:
        with pytest.raises(Exception, match="could not be understood") as raised:
            read_question(request_body)
        assert getattr(raised.value, "status", None) == 400


class TestFlags:
    def test_key_model_and_what_is_left_out(self) -> None:
        flags = ("--api-key", "right", "--model", "known", "--no-schema", "--no-usage", "--no-logprobs", "--blind")
        with Simulator(*flags, "--stop-after-s", 60) as simulator:
            wrong = openai.OpenAI(base_url=simulator.base_url, api_key="wrong", max_retries=0)
            with wrong, pytest.raises(openai.AuthenticationError) as refused:
                wrong.models.list()
            assert refused.value.code == "invalid_api_key"
            with openai.OpenAI(base_url=simulator.base_url, api_key="right", max_retries=0) as client:
                assert [model.id for model in client.models.list().data] == ["known"]
                with pytest.raises(openai.NotFoundError) as unknown:
                    client.chat.completions.create(**body())
                assert unknown.value.code == "model_not_found"
                completion = client.chat.completions.create(**body(model="known"))
                question = "Answer with one word: yes or no."
                word = client.chat.completions.create(**body(None, model="known", text=question, logprobs=True))
        assert completion.usage is None
        text = completion.choices[0].message.content or ""
        before, fenced, after = text.split("```")
        assert before.strip()
        assert after.strip()
        assert set(json.loads(fenced.removeprefix("json"))) == set(SCHEMA["properties"])
        assert word.choices[0].message.content in {"yes", "no"}
        assert word.choices[0].logprobs is None

    def test_truth_comes_from_a_file_and_unknown_images_are_counted(self, tmp_path: Path) -> None:
        path = tmp_path / "truth.json"
        noise = {"large": {"sensitivity": 1.0, "specificity": 0.0}}
        path.write_text(json.dumps({sha256(IMAGE).hexdigest(): {"dark": True, "large": False}, "noise": noise}))
        flags = ("--truth", path, "--sensitivity", 1, "--specificity", 1, "--stop-after-s", 60)
        with Simulator(*flags) as simulator, openai.OpenAI(base_url=simulator.base_url, api_key="x") as client:
            found = content_of(client)
            assert found["dark"]["state"] == "present"
            assert found["large"]["state"] == "present"
            assert simulator.state()["answers_without_truth"] == 0
            content_of(client, body(SCHEMA, b"not in the file"))
            assert simulator.state()["answers_without_truth"] == 1
        path.write_text(json.dumps({"file-name.png": {"dark": True}}))
        with pytest.raises(ValueError, match="expected {sha256"):
            read_truth(path)

    def test_latency_holds_for_many_requests_at_once(self) -> None:
        with Simulator("--latency-s", 0.3, "--latency-jitter-s", 0.1, "--stop-after-s", 60) as simulator:
            started = time.monotonic()
            with ThreadPoolExecutor(20) as pool:
                statuses = list(pool.map(lambda _: post(simulator).status, range(20)))
            assert statuses == [200] * 20
            assert 0.2 <= time.monotonic() - started < 2
            assert simulator.state()["max_concurrency"] >= 10


class TestItEnds:
    def test_after_its_time(self) -> None:
        with Simulator("--stop-after-s", 0.3) as simulator:
            assert simulator.wait(5) == 0

    def test_with_its_parent(self) -> None:
        with Simulator("--stop-after-s", 60) as simulator:
            assert simulator.is_running
            simulator.close_stdin()
            assert simulator.wait(5) == 0

    def test_with_the_block_even_in_the_middle_of_an_answer(self, capfd: pytest.CaptureFixture[str]) -> None:
        with Simulator("--latency-s", 30, "--stop-after-s", 60) as simulator:
            host, port = simulator.base_url.split("/")[2].split(":")
            request = json.dumps(body()).encode()
            with socket.create_connection((host, int(port))) as connection:
                head = f"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: {len(request)}\r\n\r\n".encode()
                connection.sendall(head + request)
                while not simulator.state()["concurrency"]:
                    time.sleep(0.01)
                simulator.stop()
        assert not simulator.is_running
        assert capfd.readouterr().err == ""

    def test_hard_after_so_many_answers(self, tmp_path: Path) -> None:
        with Simulator("--fault", "die_after=2", "--stop-after-s", 60) as simulator:
            assert [json.loads(post(simulator).body)["object"] for _ in range(2)] == ["chat.completion"] * 2
            assert simulator.wait(5) == 1
            with pytest.raises(ConnectionError):
                post(simulator)

    def test_a_plan_that_cannot_be_read_is_told_at_start(self) -> None:
        simulator = Simulator("--fault", "earthquake=1")
        with pytest.raises(RuntimeError, match="no address"):
            simulator.__enter__()


class TestFaultsOfTheAnswer:
    def test_missing_extra_wrong_and_wild(self, client: openai.OpenAI, faults: Change) -> None:
        right = content_of(client)
        faults({"missing_concepts": 1})
        missing = content_of(client)
        assert set(missing) < set(right)
        faults({"extra_concepts": 1})
        assert set(content_of(client)) > set(right)
        faults({"wrong_types": 1})
        wrong = content_of(client)
        assert all(not isinstance(v, dict) or v["probability"] == "high" for v in wrong.values())
        faults({"nan_probability": 1})
        wild = [value["probability"] for value in content_of(client).values()]
        assert sum(math.isnan(p) for p in wild) == 1
        assert sum(not 0 <= p <= 1 for p in wild) == 4

    def test_text_that_is_no_clean_json(self, client: openai.OpenAI, faults: Change) -> None:
        def text(fault: str) -> str:
            faults({fault: 1})
            return client.chat.completions.create(**body()).choices[0].message.content or ""

        right = json.dumps(content_of(client))
        assert text("duplicate_keys").count('"dark": ') == 2
        json.loads(text("duplicate_keys"))
        assert right.startswith(text("truncated_json"))
        assert json.loads(text("fenced_json").removeprefix("```json\n").removesuffix("\n```")) == json.loads(right)
        assert "{" not in text("prose")

    def test_messages_without_an_answer(self, client: openai.OpenAI, faults: Change) -> None:
        faults({"refusal": 1})
        [choice] = client.chat.completions.create(**body()).choices
        assert choice.message.content is None
        assert choice.message.refusal
        faults({"empty_content": 1})
        found = {client.chat.completions.create(**body()).choices[0].message.content for _ in range(12)}
        assert found == {None, ""}
        faults({"cut_off": 1})
        [choice] = client.chat.completions.create(**body()).choices
        assert choice.finish_reason == "length"

    def test_several_at_once(self, client: openai.OpenAI, faults: Change) -> None:
        faults({"extra_concepts": 1, "fenced_json": 1})
        text = client.chat.completions.create(**body()).choices[0].message.content or ""
        assert text.startswith("```json")
        assert "simulated-extra-concept" in text


class TestFaultsBeforeTheAnswer:
    def test_a_storm_hits_everyone_and_passes(self, client: openai.OpenAI, faults: Change) -> None:
        faults({"storm": 1.0})
        for call in (client.models.list, lambda: content_of(client), client.batches.list):
            with pytest.raises(openai.RateLimitError) as told:
                call()
            assert told.value.response.headers["retry-after"] == "1"
            assert told.value.code == "rate_limit_exceeded"
        time.sleep(1.0)
        assert content_of(client)

    def test_the_time_to_come_back_can_be_long(self, client: openai.OpenAI, faults: Change) -> None:
        faults({"storm": 5, "retry_after_s": 3600})
        with pytest.raises(openai.RateLimitError) as told:
            content_of(client)
        assert told.value.response.headers["retry-after"] == "3600"

    def test_errors_of_server_quota_and_model(self, client: openai.OpenAI, faults: Change) -> None:
        faults({"burst_5xx": 1})
        statuses = set()
        for _ in range(20):
            with pytest.raises(openai.InternalServerError) as failed:
                content_of(client)
            statuses.add(failed.value.status_code)
        assert statuses == {500, 502, 503}
        faults({"insufficient_quota": 1})
        with pytest.raises(openai.RateLimitError) as spent:
            content_of(client)
        assert spent.value.code == "insufficient_quota"
        assert "retry-after" not in spent.value.response.headers
        faults({"unknown_model": 1})
        with pytest.raises(openai.NotFoundError) as unknown:
            content_of(client)
        assert unknown.value.code == "model_not_found"

    def test_a_rate_of_requests_is_limited_and_flows_back(self, client: openai.OpenAI, faults: Change) -> None:
        faults({"rate_limit": {"requests_per_minute": 120, "burst_s": 2.5}})
        for _ in range(5):
            headers = client.chat.completions.with_raw_response.create(**body()).headers
        assert headers["x-ratelimit-limit-requests"] == "120"
        assert headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(openai.RateLimitError) as limited:
            content_of(client)
        assert limited.value.response.headers["retry-after"] == "1"
        wait_s = float(limited.value.response.headers["retry-after-ms"]) / 1000
        assert 0 < wait_s <= 0.5
        time.sleep(wait_s + 0.02)
        assert content_of(client)

    def test_a_rate_of_tokens_is_limited(self) -> None:
        limiter = RateLimiter(requests_per_minute=math.inf, tokens_per_minute=6000, burst_s=60)
        assert limiter.take(4000) is None
        held = limiter.take(4000)
        assert held is not None
        assert held[0] == "tokens"
        assert held[1] == pytest.approx(20, abs=0.5)
        assert limiter.take(1900) is None
        assert limiter.headers()["x-ratelimit-remaining-tokens"] == "100"
        assert "x-ratelimit-limit-requests" not in limiter.headers()

    def test_who_is_hit_depends_on_seed_and_counter_alone(self) -> None:
        def hit(seed: int) -> list[bool]:
            plan = FaultPlan({"reset": 0.3}, seed)
            return [plan.hit("reset") is not None for _ in range(400)]

        assert hit(1) == hit(1)
        assert hit(1) != hit(2)
        assert sum(hit(1)) / 400 == pytest.approx(0.3, abs=0.07)

    def test_windows_first_ones_and_paths(self) -> None:
        plan = FaultPlan({"reset": {"first": 2}, "html_page": {"from_s": 60}, "prose": {"on": "/v1/files"}}, 0)
        assert [plan.hit("reset") is not None for _ in range(4)] == [True, True, False, False]
        assert plan.hit("html_page") is None
        assert plan.hit("prose") is None
        assert plan.hit("prose", "/v1/files/x") is not None

    @pytest.mark.parametrize(
        ("plan", "words"),
        [
            ({"earthquake": 1}, "'earthquake': expected one of"),
            ({"reset": 1.5}, "share from 0 to 1, got 1.5"),
            ({"reset": {"shre": 1}}, "got 'shre'"),
            ({"reset": {"share": "all"}}, "for share, got 'all'"),
        ],
    )
    def test_a_plan_that_cannot_be_read_changes_nothing(
        self, simulator: Simulator, client: openai.OpenAI, plan: dict[str, object], words: str
    ) -> None:
        with pytest.raises(ValueError, match=words):
            simulator.set_faults(plan)
        assert content_of(client)

    def test_every_fault_is_described(self) -> None:
        from benchmarks import simulated_endpoint

        assert all(name in (simulated_endpoint.__doc__ or "") for name in FAULTS)


class TestFaultsOnTheWire:
    def test_a_reset_before_the_answer(self, simulator: Simulator, faults: Change) -> None:
        faults({"reset": {"when": "before"}})
        with pytest.raises(ConnectionResetError):
            post(simulator)

    def test_a_reset_in_the_middle(self, simulator: Simulator, faults: Change) -> None:
        faults({"reset": {"when": "middle"}})
        billed = simulator.state()["prompt_tokens_billed"]
        with pytest.raises(ConnectionResetError):
            post(simulator)
        assert simulator.state()["prompt_tokens_billed"] > billed

    def test_a_body_that_ends_too_early(self, simulator: Simulator, faults: Change) -> None:
        faults({"truncated_body": 1})
        with pytest.raises(http.client.IncompleteRead) as early:
            post(simulator)
        assert early.value.expected is not None
        assert len(early.value.partial) == pytest.approx(early.value.expected, abs=1)

    def test_a_body_that_never_ends(self, simulator: Simulator, faults: Change) -> None:
        n_bytes = len(post(simulator).body)
        faults({"slow_loris": {"interval_s": 0.001}})
        started = time.monotonic()
        found = post(simulator, n_bytes=n_bytes + 50).body
        assert time.monotonic() - started > 0.001 * n_bytes
        assert found.startswith(b'{"id": "chatcmpl-')
        assert found.endswith(b" " * 50)

    def test_a_page_instead_of_json(self, simulator: Simulator, faults: Change) -> None:
        faults({"html_page": 1})
        response = post(simulator)
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/html")
        assert response.body.startswith(b"<!DOCTYPE html>")

    def test_a_huge_body(self, simulator: Simulator, faults: Change) -> None:
        faults({"huge_body": {"megabytes": 30}})
        text = json.loads(post(simulator).body)["choices"][0]["message"]["content"]
        assert len(text) > 30 * 2**20

    def test_faults_leave_other_requests_alone(
        self, simulator: Simulator, client: openai.OpenAI, faults: Change
    ) -> None:
        faults({"reset": {"when": "before", "first": 1}})
        with pytest.raises(openai.APIConnectionError):
            content_of(client)
        assert content_of(client)
        assert simulator.state()["faults_served"]["reset"] >= 1


class TestBatches:
    @staticmethod
    def upload(client: openai.OpenAI, lines: list[dict[str, Any]]) -> str:
        data = "\n".join(json.dumps(line) for line in lines).encode()
        return client.files.create(file=("requests.jsonl", data), purpose="batch").id

    @staticmethod
    def line(n: int, **changes: Any) -> dict[str, Any]:
        request = body(SCHEMA, str(n).encode())
        return {"custom_id": f"q{n}", "method": "POST", "url": "/v1/chat/completions", "body": request} | changes

    @staticmethod
    def create(client: openai.OpenAI, file_id: str, **metadata: str) -> Any:
        return client.batches.create(
            input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h", metadata=metadata
        )

    @staticmethod
    def ended(client: openai.OpenAI, batch: Any, seen: set[str] | None = None) -> Any:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            batch = client.batches.retrieve(batch.id)
            if seen is not None:
                seen.add(batch.status)
            if batch.status in {"completed", "failed", "expired", "cancelled"}:
                return batch
            time.sleep(0.03)
        raise AssertionError(f"still {batch.status}")

    @staticmethod
    def rows(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
        assert file_id is not None
        rows = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
        return {row["custom_id"]: row for row in rows}

    def test_answers_and_failures_come_in_two_files(self, simulator: Simulator, client: openai.OpenAI) -> None:
        before = simulator.state()
        batch = self.create(client, self.upload(client, [self.line(n) for n in range(40)]), run="r1")
        assert batch.status == "validating"
        seen: set[str] = set()
        batch = self.ended(client, batch, seen)
        assert "in_progress" in seen
        assert batch.status == "completed"
        assert batch.metadata == {"run": "r1"}
        done, lost = self.rows(client, batch.output_file_id), self.rows(client, batch.error_file_id)
        assert done.keys() | lost.keys() == {f"q{n}" for n in range(40)}
        counts = (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed)
        assert counts == (40, len(done), len(lost))
        assert 4 <= len(lost) <= 20
        for n in range(40):
            if (row := done.get(f"q{n}")) is not None:
                assert (row["error"], row["response"]["status_code"]) == (None, 200)
                text = row["response"]["body"]["choices"][0]["message"]["content"]
                assert json.loads(text) == answer(SCHEMA, Sight.of(str(n).encode()), Witness())
            else:
                assert lost[f"q{n}"]["response"]["status_code"] in {400, 500}
                assert lost[f"q{n}"]["response"]["body"]["error"]["message"]
        after = simulator.state()
        assert after["batch_answers"] - before["batch_answers"] == len(done)
        assert after["batch_prompt_tokens_billed"] > before["batch_prompt_tokens_billed"]
        assert after["completed_answers"] == before["completed_answers"]

    def test_faults_of_the_answer_reach_the_lines(self, client: openai.OpenAI, faults: Change) -> None:
        faults({"refusal": 1})
        batch = self.ended(client, self.create(client, self.upload(client, [self.line(n) for n in range(100, 110)])))
        rows = self.rows(client, batch.output_file_id).values()
        assert all(row["response"]["body"]["choices"][0]["message"]["refusal"] for row in rows)

    @pytest.mark.parametrize(
        ("lines", "code"),
        [
            ([], "empty_file"),
            ([{"custom_id": "a"}], "invalid_json_line"),
            ([("twice",), ("twice",)], "duplicate_custom_id"),
            ([("a", "/v1/embeddings")], "invalid_url"),
            ([("a", "/v1/chat/completions", "one"), ("b", "/v1/chat/completions", "two")], "mismatched_model"),
        ],
    )
    def test_a_file_that_cannot_be_worked_off_fails(self, client: openai.OpenAI, lines: list[Any], code: str) -> None:
        def full(line: Any) -> dict[str, Any]:
            if isinstance(line, dict):
                return line
            custom_id, url, model = (*line, *("", "/v1/chat/completions", MODEL)[len(line) :])
            return self.line(0, custom_id=custom_id, url=url, body=body(model=model))

        batch = self.ended(client, self.create(client, self.upload(client, [full(line) for line in lines])))
        assert batch.status == "failed"
        assert [error.code for error in batch.errors.data][:1] == [code]
        assert batch.output_file_id is None

    def test_whole_batches_fail_or_expire_when_told_to(self, client: openai.OpenAI, faults: Change) -> None:
        file_id = self.upload(client, [self.line(n) for n in range(20)])
        faults({"batch_failed": {"first": 1}, "batch_expired": {"done_share": 0.5}})
        batches = [self.create(client, file_id) for _ in range(2)]
        failed, expired = (self.ended(client, batch) for batch in batches)
        assert (failed.status, expired.status) == ("failed", "expired")
        lost = self.rows(client, expired.error_file_id)
        codes = [row["error"]["code"] for row in lost.values() if row["error"]]
        assert codes == ["batch_expired"] * 10
        assert expired.request_counts.completed + expired.request_counts.failed == 20

    def test_a_cancelled_batch_keeps_what_is_done(self, client: openai.OpenAI) -> None:
        batch = self.create(client, self.upload(client, [self.line(n) for n in range(50)]))
        while not client.batches.retrieve(batch.id).request_counts.completed:
            time.sleep(0.01)
        assert client.batches.cancel(batch.id).status == "cancelling"
        batch = self.ended(client, batch)
        assert batch.status == "cancelled"
        assert 0 < batch.request_counts.completed < 50
        assert self.rows(client, batch.output_file_id)
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(batch.id)

    def test_batches_are_listed_newest_first_and_files_can_go(self, client: openai.OpenAI) -> None:
        file_id = self.upload(client, [self.line(0)])
        batches = [self.create(client, file_id, number=str(n)) for n in range(3)]
        made = [batch.id for batch in batches]
        page = client.batches.list(limit=2)
        assert [batch.id for batch in page.data] == [made[2], made[1]]
        assert page.data[0].metadata == {"number": "2"}
        assert client.batches.list(limit=2, after=made[1]).data[0].id == made[0]
        assert {batch.id for batch in client.batches.list(limit=2)} >= set(made)
        assert client.files.delete(file_id).deleted
        for call in (lambda: client.files.content(file_id), lambda: client.batches.retrieve("batch_unknown")):
            with pytest.raises(openai.NotFoundError):
                call()
        with pytest.raises(openai.BadRequestError):
            client.files.create(file=("x.jsonl", b"{}"), purpose="fine-tune")
        # Batches still at work would be counted by the tests that follow.
        assert [self.ended(client, batch).status for batch in batches] == ["completed"] * 3


class TestState:
    def test_counters(self, simulator: Simulator, client: openai.OpenAI, faults: Change) -> None:
        before = simulator.state()
        request = body(SCHEMA, b"an image of this test alone")
        usages = [client.chat.completions.create(**request).usage for _ in range(2)]
        client.chat.completions.create(**body(SCHEMA, b"and another one"))
        faults({"burst_5xx": 1})
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(**request)
        after = simulator.state()
        changes = {key: value - before[key] for key, value in after.items() if isinstance(value, int)}
        assert changes["requests_received"] == changes["chat_requests_received"] == 4
        assert changes["completed_answers"] == 3
        assert (changes["duplicate_requests"], changes["duplicate_answers"]) == (2, 1)
        assert after["faults_served"]["burst_5xx"] - before["faults_served"].get("burst_5xx", 0) == 1
        assert after["concurrency"] == 0
        told = sum(usage.completion_tokens for usage in usages if usage is not None)
        assert changes["completion_tokens_billed"] > told
        assert changes["bytes_received"] > 4 * 100

    def test_a_question_is_known_again_whatever_way_it_comes(self) -> None:
        plain = body()
        spaced = json.dumps(plain, indent=1, sort_keys=True).encode()
        assert read_question(plain).key == read_question(spaced).key
        assert read_question(plain).key != read_question(body(SCHEMA, b"other")).key
        assert read_question(plain).key != read_question(body(seed=3)).key

    def test_an_answer_nobody_waits_for_is_billed_and_counted(self) -> None:
        with Simulator("--latency-s", 0.3, "--stop-after-s", 60) as simulator:
            with pytest.raises(TimeoutError):
                post(simulator, timeout_s=0.1)
            deadline = time.monotonic() + 5
            while simulator.state()["concurrency"] and time.monotonic() < deadline:
                time.sleep(0.05)
            state = simulator.state()
        assert (state["abandoned_answers"], state["completed_answers"]) == (1, 0)
        assert state["prompt_tokens_billed"] > 0


def test_it_runs_without_the_product(tmp_path: Path, repository: Path) -> None:
    script = repository / "benchmarks" / "simulated_endpoint"
    command = [sys.executable, "-I", str(script), "--stop-after-s", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=tmp_path, check=True)
    assert done.stdout.startswith("http://127.0.0.1:")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
