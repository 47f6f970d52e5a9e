from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from annotation.vlm.client import VlmClient
from annotation.vlm.probe import PROBE_VERSION, Capabilities, n_requests, picture, probe
from annotation.vlm.settings import VlmSettings
from data_contracts.errors import ConfigurationError, EndpointError

Make = Callable[..., VlmClient]
COLOURS = {"red": (208, 32, 38), "green": (22, 150, 60), "blue": (30, 70, 200), "yellow": (240, 210, 40)}
TOKENS_PER_IMAGE = 777


def seen(body: dict[str, Any]) -> list[np.ndarray]:
    """The pictures of a request as the endpoint gets them."""
    parts = [p for p in body["messages"][1]["content"] if p["type"] == "image_url"]
    data = [base64.b64decode(p["image_url"]["url"].partition(",")[2]) for p in parts]
    return [np.asarray(Image.open(io.BytesIO(d)).convert("RGB")).astype(int) for d in data]


def colour_of(pixels: np.ndarray) -> str:
    """The name of what is not grey in a picture."""
    coloured = pixels[np.ptp(pixels, axis=2) > 60]
    return min(COLOURS, key=lambda c: float(np.abs(np.median(coloured, axis=0) - COLOURS[c]).sum()))


def has_several_discs(pixels: np.ndarray) -> bool:
    """One disc lies in the middle, four lie around it."""
    middle = pixels[len(pixels) // 2, len(pixels) // 2]
    return bool(np.ptp(middle) < 60)


class Model:
    """A vision-language model that is asked about discs, with faults as they are met."""

    def __init__(
        self,
        see: Callable[[list[np.ndarray]], str] = lambda pictures: colour_of(pictures[-1]),
        wrap: Callable[[str], str] = str,
        *,
        has_logprobs: bool = True,
        counts: bool = True,
        p_yes: Callable[[str, list[np.ndarray]], float] | None = None,
    ) -> None:
        self.see, self.wrap, self.has_logprobs, self.counts = see, wrap, has_logprobs, counts
        self.p_yes = p_yes or (lambda asked, pictures: 0.9 if pictures and see(pictures) == asked else 0.2)
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        pictures = seen(body)
        if "response_format" in body:
            message, logprobs = self.wrap(json.dumps(self.judged(pictures))), None
        else:
            message, logprobs = self.one_word(body, pictures)
        choice = {"finish_reason": "stop", "message": {"content": message}, "logprobs": logprobs}
        n_tokens = 50 + TOKENS_PER_IMAGE * len(pictures)
        usage = {"prompt_tokens": n_tokens, "completion_tokens": 9} if self.counts else None
        return httpx2.Response(200, json={"id": "r", "choices": [choice], "usage": usage})

    def judged(self, pictures: list[np.ndarray]) -> dict[str, Any]:
        several = "present" if has_several_discs(pictures[-1]) else "absent"
        return {
            "probe-colour": {"choice": f"probe-{self.see(pictures)}", "probability": 0.9, "evidence": "disc"},
            "probe-several-discs": {"state": several, "probability": 0.9, "evidence": "disc"},
        }

    def one_word(self, body: dict[str, Any], pictures: list[np.ndarray]) -> tuple[str, Any]:
        text = next(p["text"] for p in body["messages"][1]["content"] if p["type"] == "text")
        asked = re.search(r"The disc is (\w+)", text)
        assert asked is not None
        p = self.p_yes(asked[1], pictures)
        word = "yes" if p > 0.5 else "no"
        top = [{"token": "yes", "logprob": math.log(p)}, {"token": "no", "logprob": math.log(1 - p)}]
        return word, {"content": [{"token": word, "top_logprobs": top}]} if self.has_logprobs else None


async def probed(make_client: Make, model: Callable[[httpx2.Request], Any], **settings: Any) -> Capabilities:
    async with make_client(model, **({"image_side_px": 96} | settings)) as client:
        return await probe(client)


async def test_a_model_that_sees_passes_and_is_described(make_client: Make) -> None:
    model = Model()
    found = await probed(make_client, model)
    assert (found.version, found.base_url, found.model) == (PROBE_VERSION, "http://endpoint.test/v1", "m")
    assert (found.sees_images, found.n_right, found.keeps_schema) == (True, 4, True)
    assert (found.logprobs, found.reports_usage) == (True, True)
    assert found.tokens_per_image == TOKENS_PER_IMAGE
    assert (found.probability, found.side_px) == ("stated", 96)
    assert len(model.bodies) == n_requests(VlmSettings(base_url="http://x/v1", model="m"))
    assert Capabilities(**json.loads(json.dumps(found.as_dict()))) == found
    assert "tokens of an image: 777" in "\n".join(found.lines())


async def test_a_model_that_sees_passes_with_log_probabilities(make_client: Make) -> None:
    model = Model()
    found = await probed(make_client, model, probability="logprobs")
    assert (found.sees_images, found.n_right, found.logprobs, found.probability) == (True, 4, True, "logprobs")
    assert not any("response_format" in body for body in model.bodies)
    settings = VlmSettings(base_url="http://x/v1", model="m", probability="logprobs")
    assert len(model.bodies) == n_requests(settings)


async def test_pictures_are_sent_as_images_will_be(make_client: Make) -> None:
    model = Model()
    await probed(make_client, model, image_side_px=200, image_format="PNG")
    pictures = [p for body in model.bodies for p in seen(body)]
    assert {p.shape for p in pictures} == {(200, 200, 3)}
    urls = [p["image_url"]["url"] for b in model.bodies for p in b["messages"][1]["content"] if p["type"] != "text"]
    assert all(url.startswith("data:image/png;") for url in urls)


async def test_only_drawn_pictures_are_sent_and_each_colour_once(make_client: Make) -> None:
    model = Model()
    await probed(make_client, model, image_format="PNG", image_side_px=256)
    drawn = [picture(c, n).astype(int) for c in COLOURS for n in (1, 4)]
    pictures = [p for body in model.bodies for p in seen(body)]
    assert all(any(np.array_equal(p, d) for d in drawn) for p in pictures)
    judged = [seen(body)[-1] for body in model.bodies if "response_format" in body]
    assert sorted(colour_of(p) for p in judged) == sorted(COLOURS)
    assert len({has_several_discs(p) for p in judged}) == 2


@pytest.mark.parametrize("word", COLOURS)
async def test_a_blind_model_that_always_says_the_same_is_refused(make_client: Make, word: str) -> None:
    with pytest.raises(EndpointError, match=r"does not see images: it told 1 of 4.*no image of yours was sent.*mmproj"):
        await probed(make_client, Model(lambda _: word))


async def test_a_model_that_guesses_is_refused(make_client: Make) -> None:
    wrong = {"red": "red", "green": "green", "blue": "yellow", "yellow": "blue"}
    with pytest.raises(EndpointError, match="it told 2 of 4"):
        await probed(make_client, Model(lambda pictures: wrong[colour_of(pictures[-1])]))


async def test_one_confusion_is_no_blindness(make_client: Make) -> None:
    confused = {"red": "red", "green": "blue", "blue": "blue", "yellow": "yellow"}
    found = await probed(make_client, Model(lambda pictures: confused[colour_of(pictures[-1])]))
    assert (found.n_right, found.sees_images) == (3, True)


@pytest.mark.parametrize("p", [0.02, 0.5, 0.98])
async def test_one_word_that_only_the_text_decides_is_blindness(make_client: Make, p: float) -> None:
    # It prefers some colours, so that its answers differ, but never by the picture.
    liked = {"red": 0.01, "green": 0.0, "blue": -0.01, "yellow": 0.0}
    model = Model(p_yes=lambda asked, _: p + liked[asked])
    with pytest.raises(EndpointError, match="does not see images: it told 0 of 4"):
        await probed(make_client, model, probability="logprobs")


@pytest.mark.parametrize("text", ["A nice picture.", "{}", '{"probe-colour": "red"}', "[]"])
async def test_a_model_without_a_usable_answer_is_refused(make_client: Make, text: str) -> None:
    with pytest.raises(EndpointError, match=r"no image of yours was sent.*(follows instructions|vision-language)"):
        await probed(make_client, Model(wrap=lambda _: text))


async def test_no_answer_to_anything_is_refused(make_client: Make) -> None:
    with pytest.raises(EndpointError, match=r"got none; no image of yours was sent.*log"):
        await probed(make_client, lambda _: httpx2.Response(500, json={}))


async def test_a_wrong_key_is_said_as_such(make_client: Make) -> None:
    with pytest.raises(EndpointError, match="refused the key"):
        await probed(make_client, lambda _: httpx2.Response(401, json={}))


@pytest.mark.parametrize("model", [Model(has_logprobs=False)])
async def test_log_probabilities_that_are_configured_and_not_given_are_refused(make_client: Make, model: Model) -> None:
    with pytest.raises(
        ConfigurationError, match=r"probability = 'logprobs'.*gives no log-prob.*of yours was sent.*'stated'"
    ):
        await probed(make_client, model, probability="logprobs")
    assert not (await probed(make_client, model)).logprobs


async def test_an_endpoint_that_refuses_to_be_asked_for_log_probabilities_has_none(make_client: Make) -> None:
    model = Model()

    def handler(request: httpx2.Request) -> httpx2.Response:
        refused = httpx2.Response(400, json={"error": {"message": "logprobs is not supported"}})
        return refused if "logprobs" in json.loads(request.content) else model(request)

    found = await probed(make_client, handler)
    assert (found.logprobs, found.tokens_per_image, found.n_right) == (False, None, 4)
    n_before = len(model.bodies)
    with pytest.raises(ConfigurationError, match=r"no log-probabilities.*'stated'"):
        await probed(make_client, handler, probability="logprobs", concurrency=1)
    assert len(model.bodies) == n_before


@pytest.mark.parametrize("wrap", [lambda t: f"```json\n{t}\n```", lambda t: f"Sure!\n```\n{t}\n```"])
async def test_a_fence_around_the_answer_is_noticed_and_accepted(make_client: Make, wrap: Callable[[str], str]) -> None:
    found = await probed(make_client, Model(wrap=wrap))
    assert (found.keeps_schema, found.n_right) == (False, 4)
    assert "validated anyway" in "\n".join(found.lines())


async def test_tokens_that_are_not_told_are_not_made_up(make_client: Make) -> None:
    found = await probed(make_client, Model(counts=False))
    assert (found.reports_usage, found.tokens_per_image) == (False, None)
    assert "tokens of an image: not told" in "\n".join(found.lines())


async def test_it_never_answers_from_the_journal(make_client: Make) -> None:
    for model in (Model(), Model()):
        await probed(make_client, model)
        assert len(model.bodies) == 6
    # The model has lost its vision part since.
    with pytest.raises(EndpointError):
        await probed(make_client, Model(lambda _: "red"))


async def test_its_requests_count_like_any_other(make_client: Make) -> None:
    async with make_client(Model(), image_side_px=96) as client:
        await probe(client)
        assert client.budget.spent.n_requests == 6
