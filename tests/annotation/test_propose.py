from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from annotation.propose import ProposeOptions, class_pairs, most_concepts, planned_requests, propose
from annotation.text import minilm_embedder
from annotation.vlm.client import VlmClient
from annotation.vlm.journal import Journal
from annotation.vlm.settings import VlmSettings
from data_contracts.errors import BudgetReached, StepFailed
from data_contracts.tables import CONCEPTS, vocabulary_of

SAMPLES = {"red spots": [f"large-{i}" for i in range(6)], "plain": [f"small-{i}" for i in range(6)]}
CLASSES_ONLY = ProposeOptions(contrast_pairs=0)
Make = Callable[..., VlmClient]
Body = dict[str, Any]


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


def parts_of(body: Body) -> list[dict[str, Any]]:
    return body["messages"][1]["content"]


def text_of(body: Body) -> str:
    return "\n".join(p["text"] for p in parts_of(body) if p["type"] == "text")


def images_of(body: Body) -> list[str]:
    return [p["image_url"]["url"] for p in parts_of(body) if p["type"] == "image_url"]


def is_about_a_pair(body: Body) -> bool:
    return "tell the class" in text_of(body)


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
        assert client.budget.spent.n_requests == 0
    assert again.equals(first)


async def test_the_same_concept_from_two_classes_is_one_row(read: Any, tmp_path: Path) -> None:
    client, sent = endpoint(tmp_path, lambda _: concepts("Dark Centre", "dark centers!", "halo"))
    async with client:
        table = await propose(SAMPLES, read, client, "skin")
    assert list(table["concept_id"]) == ["dark-centre", "halo"]
    assert list(table["proposed_for"]) == [["red spots", "plain"]] * 2
    assert set(table["origin"]) == {"vlm"}
    assert len(sent) == 3


async def test_each_class_is_asked_with_its_own_images_before_those_of_others(read: Any, tmp_path: Path) -> None:
    client, sent = endpoint(tmp_path, lambda _: concepts("x"))
    options = ProposeOptions(n_per_class=3, max_images_per_request=5, contrast_pairs=0)
    async with client:
        await propose(SAMPLES, read, client, "skin", options)
    assert len(sent) == 2
    for body in sent:
        kinds = ["image" if p["type"] == "image_url" else "text" for p in parts_of(body)]
        assert kinds == ["text", "text", "image", "image", "image", "text", "image", "image"]


async def test_a_pair_is_asked_with_images_of_both(read: Any, tmp_path: Path) -> None:
    client, sent = endpoint(tmp_path, lambda _: concepts("x"))
    async with client:
        await propose(SAMPLES, read, client, "skin", ProposeOptions(n_per_class=3, max_images_per_request=5))
    (pair,) = (body for body in sent if is_about_a_pair(body))
    (first, second) = class_pairs(list(SAMPLES), ProposeOptions())[0]
    kinds = ["image" if p["type"] == "image_url" else p["text"] for p in parts_of(pair)[1:]]
    expected = [f'Images of the class "{first}":', "image", "image"]
    assert kinds == [*expected, f'Images of other classes, here of "{second}":', "image", "image"]
    about = {name: next(b for b in sent if not is_about_a_pair(b) and f'"{name}"' in text_of(b)) for name in SAMPLES}
    assert images_of(pair)[:2] == images_of(about[first])[:2]
    assert images_of(pair)[2:] == images_of(about[second])[:2]


async def test_neither_ids_nor_the_names_of_classes_not_asked_about_are_sent(read: Any, tmp_path: Path) -> None:
    client, sent = endpoint(tmp_path, lambda _: concepts("x"))
    async with client:
        await propose(SAMPLES, read, client, "skin")
    alone = [text_of(body) for body in sent if not is_about_a_pair(body)]
    assert sum("red spots" in t for t in alone) == sum('"plain"' in t for t in alone) == 1
    assert not any("large-" in text_of(body) or "small-" in text_of(body) for body in sent)


async def test_an_unlabelled_folder_is_one_group(read: Any, make_embedded: Make) -> None:
    mixed = {"images": [f"{kind}-{i}" for i in range(5) for kind in ("large", "small")]}
    async with make_embedded() as client:
        table = await propose(mixed, read, client, "skin")
        assert client.budget.spent.n_requests == 1
    assert "large-lesion" in set(table["concept_id"])
    assert all(lines[0].startswith("all images (round 1): ") for lines in table["provenance"])


async def test_a_class_without_an_answer_is_left_out_and_said(
    read: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client, _ = endpoint(tmp_path, lambda b: concepts("x") if "red spots" in json.dumps(b) else "sorry")
    async with client:
        table = await propose(SAMPLES, read, client, "skin", CLASSES_ONLY)
    assert list(table["proposed_for"]) == [["red spots"]]
    assert "'plain'" in caplog.text


async def test_a_pair_without_an_answer_is_left_out_and_said(
    read: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client, _ = endpoint(tmp_path, lambda b: "sorry" if is_about_a_pair(b) else concepts("x"))
    async with client:
        assert len(await propose(SAMPLES, read, client, "skin")) == 1
    assert "against" in caplog.text


async def test_no_answer_at_all_is_a_failure(read: Any, tmp_path: Path) -> None:
    client, _ = endpoint(tmp_path, lambda _: "sorry")
    async with client:
        with pytest.raises(StepFailed, match="invalid_json"):
            await propose(SAMPLES, read, client, "skin")


async def test_a_cap_ends_all_questions(read: Any, make_embedded: Make) -> None:
    async with make_embedded(max_requests=1, concurrency=1) as client:
        with pytest.raises(BudgetReached):
            await propose(SAMPLES, read, client, "skin")
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert client.budget.spent.n_requests == 1


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


async def test_the_table_says_where_each_concept_came_from(read: Any, tmp_path: Path) -> None:
    def answers(body: Body) -> str:
        return concepts("jagged edge") if is_about_a_pair(body) else concepts("no halo", "ragged rim")

    client, _ = endpoint(tmp_path, answers)
    async with client:
        table = (await propose(SAMPLES, read, client, "skin")).set_index("concept_id")
    CONCEPTS.to_arrow(table.reset_index(), "test")
    (first, second) = class_pairs(list(SAMPLES), ProposeOptions())[0]
    assert table.loc["jagged-edge", "provenance"] == [f"'{first}' against '{second}': \"jagged edge\""]
    assert table.loc["jagged-edge", "proposed_for"] == [first]
    assert table.loc["halo", "provenance"] == [f"class '{name}' (round 1): \"no halo\"" for name in SAMPLES]
    assert table.loc["halo", "definition"] == "Halo can be seen."


async def test_wordings_close_in_text_become_synonyms(read: Any, tmp_path: Path) -> None:
    def answers(body: Body) -> str:
        if is_about_a_pair(body):
            return concepts("left lung opacity")
        return concepts("granules in the cytoplasm" if "red spots" in text_of(body) else "cytoplasm with granules")

    client, _ = endpoint(tmp_path, answers)
    async with client:
        table = await propose(SAMPLES, read, client, "blood", embed=minilm_embedder())
    assert list(table["concept_id"]) == ["granules-in-the-cytoplasm", "left-lung-opacity"]
    assert table["synonyms"].iloc[0] == ["cytoplasm with granules"]
    assert table["proposed_for"].iloc[0] == list(SAMPLES)
    assert vocabulary_of(table).concepts[0].synonyms == ("cytoplasm with granules",)


async def test_texts_that_go_into_judging_hold_no_class_name(read: Any, tmp_path: Path) -> None:
    row = {
        "name": "halo",
        "definition": "Typical of red spot lesions.",
        "synonyms": ["ring", "red spots ring"],
        "group": "plain look",
        "contrast": "other red spots",
    }
    other = {"name": "rim", "definition": "A dark rim.", "synonyms": [], "group": "plain look", "contrast": "a fold"}
    client, _ = endpoint(tmp_path, lambda _: json.dumps({"concepts": [row, other]}))
    async with client:
        table = await propose(SAMPLES, read, client, "skin")
    halo, rim = vocabulary_of(table)
    assert (halo.definition, halo.synonyms, halo.group, halo.contrast) == ("Halo can be seen.", ("ring",), None, "")
    assert (rim.definition, rim.contrast) == ("A dark rim.", "a fold")


async def test_the_name_of_an_unlabelled_group_is_no_class(read: Any, tmp_path: Path) -> None:
    client, _ = endpoint(tmp_path, lambda _: concepts("halo", definition="A ring in the image."))
    async with client:
        table = await propose({"images": SAMPLES["plain"]}, read, client, "skin")
    assert list(table["definition"]) == ["A ring in the image."]


async def test_more_than_was_asked_for_is_cut(read: Any, tmp_path: Path) -> None:
    many = concepts(*(f"{word} patch" for word in ("warm", "bold", "mild", "keen", "vast")))
    client, _ = endpoint(tmp_path, lambda _: many)
    async with client:
        table = await propose(SAMPLES, read, client, "skin", ProposeOptions(n_concepts=3, n_contrast=1))
    assert len(table) == 3


async def test_names_with_one_slug_keep_ids_apart(read: Any, tmp_path: Path) -> None:
    client, _ = endpoint(tmp_path, lambda _: concepts("α granules", "β granules"))
    async with client:
        table = await propose(SAMPLES, read, client, "skin")
    assert list(table["concept_id"]) == ["granules", "granules-2"]


async def test_every_round_shows_other_images_as_long_as_there_are_any(read: Any, tmp_path: Path) -> None:
    client, sent = endpoint(tmp_path, lambda _: concepts("x"))
    options = ProposeOptions(n_per_class=3, rounds=5, contrast_pairs=0)
    async with client:
        table = await propose(SAMPLES, read, client, "skin", options)
    # Six images a class make two rounds of three.
    assert len(sent) == 4
    rounds = [images_of(body)[:3] for body in sent if '"plain"' in text_of(body)]
    assert not set(rounds[0]) & set(rounds[1])
    assert [line.split(":")[0] for line in table["provenance"].iloc[0]] == [
        f"class '{name}' (round {k})" for k in (1, 2) for name in SAMPLES
    ]


async def test_a_pair_tells_apart_what_single_questions_missed(read: Any, make_embedded: Make) -> None:
    async with make_embedded() as client:
        table = await propose(SAMPLES, read, client, "skin")
    (first, second) = class_pairs(list(SAMPLES), ProposeOptions())[0]
    from_pair = [any(f"'{first}' against '{second}'" in line for line in lines) for lines in table["provenance"]]
    assert any(from_pair)
    assert table["concept_id"].is_unique


@pytest.mark.parametrize(
    "options", [ProposeOptions(), ProposeOptions(n_per_class=4, max_images_per_request=6, rounds=2)]
)
async def test_the_plan_is_what_is_sent(options: ProposeOptions, read: Any, tmp_path: Path) -> None:
    samples = {**SAMPLES, "third": ["large-7"], "none": []}
    client, sent = endpoint(tmp_path, lambda _: concepts("x"))
    n_samples = {name: len(ids) for name, ids in samples.items()}
    planned = [sum(isinstance(p, bytes) for p in r.parts) for r in planned_requests(n_samples, "", options)]
    async with client:
        await propose(samples, read, client, "skin", options)
    assert sorted(planned) == sorted(len(images_of(body)) for body in sent)
    assert max(planned) <= options.max_images_per_request
    texts = {"\n".join(p for p in r.parts if isinstance(p, str)) for r in planned_requests(n_samples, "skin", options)}
    assert texts == {text_of(body) for body in sent}
    asked = [int(re.search(r"Propose up to (\d+)", text_of(body))[1]) for body in sent]  # type: ignore[index]
    assert most_concepts(n_samples, options) == sum(asked)


@pytest.mark.parametrize("n", [2, 3, 4, 6, 7, 9, 30])
def test_few_classes_meet_all_others_and_many_at_least_two(n: int) -> None:
    names = [f"class {i}" for i in range(n)]
    pairs = class_pairs(names, ProposeOptions())
    assert len({frozenset(p) for p in pairs}) == len(pairs)
    assert all(a != b for a, b in pairs)
    if n <= 6:
        assert len(pairs) == n * (n - 1) // 2
    else:
        assert len(pairs) == max(15, n)
        assert min(sum(name in p for p in pairs) for name in names) >= 2
    firsts = [sum(name == a for a, _ in pairs) for name in names]
    assert max(firsts) - min(firsts) <= 1


def test_pairs_are_bounded_and_chosen_by_the_seed() -> None:
    names = [f"class {i}" for i in range(9)]
    assert len(class_pairs(names, ProposeOptions(contrast_pairs=4))) == 4
    assert class_pairs(names, ProposeOptions(contrast_pairs=0)) == []
    assert class_pairs(names, ProposeOptions(seed=1)) == class_pairs(names, ProposeOptions(seed=1))
    assert class_pairs(names, ProposeOptions(seed=1)) != class_pairs(names, ProposeOptions(seed=2))
    assert class_pairs(["alone"], ProposeOptions()) == []
