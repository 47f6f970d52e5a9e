"""The real page in a real browser, over a small run of phantoms: what people do every day with it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from data_contracts.manifest import RunManifest
from data_contracts.ports import Pixels
from data_contracts.store import RunFolder
from data_contracts.tables import JUDGEMENTS
from pipeline.phantoms import CLASS_NAMES, CONCEPT_RATES, draw_phantom
from pipeline.review.app import create_app
from pipeline.review.ports import Cost, Ports, Predicted
from tests.pipeline.review.samples import expert_rows

N_IMAGES = 66
CONCEPTS = tuple(CONCEPT_RATES)
IDS = [f"{k:064x}" for k in range(N_IMAGES)]
PHANTOMS = [draw_phantom(k % 3, np.random.default_rng([1, k]), 96) for k in range(N_IMAGES)]
LARGE, ELONGATED = CONCEPTS[:2]


class Opened(NamedTuple):
    """A server that listens."""

    run: RunFolder
    address: str
    issue: Callable[[], str]
    """A link for one more browser."""

    def page(self, browser: Browser, **options: Any) -> Page:
        """A page of a browser of its own, with the grid in it; anything it would fetch elsewhere fails the test."""
        page = browser.new_context(viewport={"width": 1300, "height": 850}, **options).new_page()
        page.on("request", lambda request: _require_own(request.url, self.address))
        page.on("pageerror", lambda error: pytest.fail(f"script: {error}"))
        page.goto(self.issue())
        return page


def _require_own(url: str, address: str) -> None:
    assert url.startswith((f"{address}/", "data:"))


def read(image_id: str) -> Pixels:
    number = IDS.index(image_id)
    pixels = PHANTOMS[number].pixels
    return np.repeat(pixels.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2) if number == 0 else pixels


def predicted(concepts: Mapping[str, bool]) -> Predicted:
    """A classifier in one rule, so that a flipped concept must change what the page shows."""
    is_b = concepts[LARGE] and not concepts[ELONGATED]
    name = CLASS_NAMES[1] if is_b else CLASS_NAMES[0]
    probabilities = {CLASS_NAMES[1]: 0.8 if is_b else 0.3, CLASS_NAMES[0]: 0.2 if is_b else 0.7}
    rule = f"{name} ← {LARGE if concepts[LARGE] else '¬' + LARGE}"
    truths = {concept_id: 0.9 if present else 0.1 for concept_id, present in concepts.items()}
    return Predicted(name, probabilities, truths, rule, True, class_map=np.eye(5, dtype=np.float32))


def predict(image_id: str) -> Predicted:
    return predicted(PHANTOMS[IDS.index(image_id)].concepts)


def intervene(image_id: str, chosen: Mapping[str, bool]) -> tuple[Predicted, Predicted]:
    concepts = PHANTOMS[IDS.index(image_id)].concepts
    return predicted(concepts), predicted({**concepts, **chosen})


def make_run(path: Any) -> RunFolder:
    run = RunFolder(path)
    run.write_manifest(RunManifest.new("phantoms", "source").model_copy(update={"synthetic": True}))
    run.write_images(_images())
    names = [c.replace("-", " ") for c in CONCEPTS]
    kept = {"definition": "What was drawn.", "origin": "vlm", "status": "kept", "reason": None}
    concepts = pd.DataFrame({"concept_id": CONCEPTS, "name": names, "position": range(len(names))}).assign(**kept)
    dropped = {"concept_id": "benign", "name": "benign", "definition": "", "origin": "vlm", "status": "dropped"}
    concepts = pd.concat([concepts, pd.DataFrame([dropped | {"reason": "like_a_class"}])], ignore_index=True)
    run.write_concepts(concepts.assign(proposed_for=[["phantom A"]] * len(concepts)))
    cells = [(i, c, p.concepts[c]) for i, p in zip(IDS, PHANTOMS, strict=True) for c in CONCEPTS]
    _write_labels(run, cells)
    run.write_alignment([_alignment(cells)])
    return run


def _images() -> pd.DataFrame:
    classes = [CLASS_NAMES[k % 3] for k in range(N_IMAGES)]
    return pd.DataFrame(
        {
            "image_id": IDS,
            "path": [f"{name}/synthetic-{k:04d}.png" for k, name in enumerate(classes)],
            "label": classes,
            "split": [("train", "val", "test")[k % 5 % 3] for k in range(N_IMAGES)],
            "modality": "phantoms",
            "width_px": 96,
            "height_px": 96,
        }
    )


def _write_labels(run: RunFolder, cells: list[tuple[str, str, bool]]) -> None:
    random = np.random.default_rng(0)
    labels = pd.DataFrame(cells, columns=["image_id", "concept_id", "present"])
    sure = random.uniform(0.5, 1, len(labels))
    labels["probability"] = np.where(labels["present"], sure, 1 - sure)
    labels["present"] = labels["present"].astype("boolean").mask(sure < 0.6)
    labels = labels.assign(decided_by="vlm", disagreement=np.where(sure < 0.55, 0.6, 0.0))
    run.write_labels(labels, pd.DataFrame())
    said = labels[["image_id", "concept_id", "probability"]].assign(
        witness="vlm",
        witness_model="measurements",
        state=np.where(labels["probability"] > 0.5, "present", "absent"),
        evidence="seen in the middle",
        created_at=pd.Timestamp("2026-01-01", tz="UTC"),
    )
    run.append_judgements(said.reindex(columns=JUDGEMENTS.column_names))


def _alignment(cells: list[tuple[str, str, bool]]) -> pa.Table:
    n, grid = len(cells), np.outer(np.hanning(6), np.hanning(6)).astype(np.float16).ravel()
    return pa.table(
        {
            "image_id": [i for i, _, _ in cells],
            "concept_id": [c for _, c, _ in cells],
            "similarity": [0.5] * n,
            "null_similarity": [0.1] * n,
            "probability": [0.8 if present else 0.2 for _, _, present in cells],
            "grid_h": [6] * n,
            "grid_w": [6] * n,
            "heatmap": pa.array([grid] * n, pa.list_(pa.float16())),
        }
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        message = "browser tests: expected Chromium on the PATH, found none; install it (apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("phantoms") / "phantoms")


@pytest.fixture
def opened(finished_run: RunFolder, tmp_path: Any) -> Iterator[Opened]:
    run = RunFolder(shutil.copytree(finished_run.path, tmp_path / "phantoms"))
    cost = Cost(N_IMAGES, 5, "0.10 to 0.20 USD (a list)", {"never asked": N_IMAGES})
    ports = Ports(predict, intervene, lambda _concepts: cost)
    app = create_app(run, read, "first", reviewer="Dr A", ports=ports)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        tokens = app.user_middleware[0].kwargs["tokens"]
        links = iter([f"{address}/?token=first"])
        yield Opened(run, address, lambda: next(links, None) or f"{address}/?token={tokens.issue()}")
        server.should_exit = True
        thread.join()


@pytest.fixture
def page(opened: Opened, browser: Browser) -> Iterator[Page]:
    page = opened.page(browser)
    yield page
    page.context.close()


def shown(page: Page) -> list[int]:
    """Numbers of the images in the grid."""
    links = page.locator(".grid a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    return [IDS.index(re.findall(r"/image/(\w+)", link)[0]) for link in links]


def states(run: RunFolder) -> list[tuple[str, str, str]]:
    rows = expert_rows(run)
    return list(zip(rows["witness_model"], rows["concept_id"], rows["state"], strict=True))


def test_browse_and_filter_with_an_address_to_share(opened: Opened, page: Page, browser: Browser) -> None:
    assert shown(page) == list(range(60))
    # A click returns before the next page is there; what follows must not meet the old one.
    with page.expect_navigation():
        page.get_by_role("link", name="Next").first.click()
    assert shown(page) == list(range(60, N_IMAGES))
    with page.expect_navigation():
        page.get_by_role("link", name="Images", exact=True).click()
    page.get_by_label("Class").select_option("phantom B")
    page.wait_for_url("**label=phantom+B*")
    page.locator(".filters").get_by_label("Concept").select_option(LARGE)
    page.wait_for_url(f"**concept={LARGE}*")
    page.get_by_label("State").select_option("present")
    page.wait_for_url("**state=present*")
    found = shown(page)
    assert found
    assert all(PHANTOMS[k].concepts[LARGE] and k % 3 == 1 for k in found)
    # Empty fields have no place in an address that is shared.
    assert "split" not in page.url
    other = opened.page(browser)
    other.goto(page.url)
    assert shown(other) == found
    other.context.close()
    page.get_by_label("Words").fill("synthetic-0004")
    page.get_by_label("Words").press("Enter")
    page.wait_for_url("**text=synthetic-0004*")
    assert set(shown(page)) <= {4}


def test_correct_and_undo_by_keyboard(opened: Opened, page: Page) -> None:
    page.goto(f"{opened.address}/image/{IDS[1]}")
    first = page.locator(".concept.picked")
    begins_at = first.get_attribute("data-concept")
    page.keyboard.press("p")
    expect(page.locator("#status")).to_contain_text("present, saved")
    # The next concept is picked, and its map is shown.
    expect(page.locator(".concept.picked")).not_to_have_attribute("data-concept", str(begins_at))
    expect(page.locator("#map")).to_have_attribute("src", re.compile("/heatmap/"))
    # The map lies exactly on the picture, whatever room there is.
    boxes = page.locator("#picture, #map").evaluate_all(
        "all => all.map(e => JSON.stringify(e.getBoundingClientRect()))"
    )
    assert boxes[0] == boxes[1]
    page.keyboard.press("u")
    expect(page.locator("#status")).to_contain_text("uncertain, saved")
    page.keyboard.press("z")
    expect(page.locator("#status")).to_contain_text("taken back")
    assert [state for _, _, state in states(opened.run)] == ["present", "uncertain", "not_assessed"]
    expect(page.locator(f"#c-{begins_at}")).to_contain_text("Dr A: present")
    expect(page.locator(f"#c-{begins_at}").get_by_role("button", name="present")).to_have_attribute(
        "aria-pressed", "true"
    )
    page.keyboard.press("n")
    page.wait_for_url(f"**/image/{IDS[2]}")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url(f"**/image/{IDS[1]}")
    page.keyboard.press("Escape")
    page.wait_for_url(f"{opened.address}/")


def test_bulk_correction_by_keyboard_and_its_undo(opened: Opened, page: Page) -> None:
    page.keyboard.press("j")
    page.keyboard.press("x")
    page.locator(".grid a").nth(2).focus()
    page.keyboard.press("x")
    expect(page.locator("[data-selected]")).to_have_text("2 selected")
    page.locator(".bulk").get_by_label("Concept").select_option(LARGE)
    page.locator(".bulk").get_by_role("button", name="Absent").click()
    expect(page.locator(".band.said")).to_contain_text("absent in 2 images, says Dr A")
    assert states(opened.run) == [("Dr A", LARGE, "absent")] * 2
    assert set(expert_rows(opened.run)["image_id"]) == {IDS[0], IDS[2]}
    page.locator(".band.said").get_by_role("button", name="Undo").click()
    expect(page.locator(".band.said")).to_contain_text("Taken back in 2 images")
    assert [state for _, _, state in states(opened.run)][2:] == ["not_assessed"] * 2


def test_two_sessions_lose_nothing_and_see_each_other(opened: Opened, page: Page, browser: Browser) -> None:
    page.get_by_role("button", name="Second browser").click()
    link = page.get_by_label("Link").input_value()
    second = browser.new_context().new_page()
    second.goto(link)
    second.get_by_role("textbox", name="Reviewer").fill("Dr B")
    with second.expect_navigation():
        second.get_by_role("button", name="Save").click()
    for reviewer, state in ((page, "Present"), (second, "Absent")):
        reviewer.goto(f"{opened.address}/image/{IDS[3]}")
        reviewer.locator(f"#c-{LARGE}").get_by_role("button", name=state).click()
        expect(reviewer.locator("#status")).to_contain_text("saved")
    assert states(opened.run) == [("Dr A", LARGE, "present"), ("Dr B", LARGE, "absent")]
    page.goto(f"{opened.address}/disagreements")
    expect(page.locator(".differ")).to_contain_text("Dr A: present")
    expect(page.locator(".differ")).to_contain_text("Dr B: absent")
    second.context.close()


def test_intervene_changes_prediction_and_rule_and_writes_nothing(opened: Opened, page: Page) -> None:
    number = next(k for k, p in enumerate(PHANTOMS) if p.concepts[LARGE] and not p.concepts[ELONGATED])
    page.goto(f"{opened.address}/image/{IDS[number]}")
    model = page.locator(".model")
    expect(model.locator(".class")).to_contain_text("phantom B")
    model.get_by_text("What if a concept were different?").click()
    model.get_by_label("large lesion").select_option("absent")
    model.get_by_role("button", name="Predict again").click()
    expect(model.locator(".changed")).to_contain_text("from phantom B to phantom A")
    expect(model.locator(".answer").nth(1)).to_contain_text(f"¬{LARGE}")
    model.get_by_role("button", name="Show what speaks for phantom B").click()
    expect(page.locator("#map")).to_have_attribute("src", re.compile("/saliency/"))
    assert states(opened.run) == []


def test_audit_mode_hides_the_answers_of_the_machine(opened: Opened, page: Page) -> None:
    page.get_by_role("button", name="Audit mode").click()
    expect(page.locator(".band.blind")).to_be_visible()
    expect(page.locator(".grid")).not_to_contain_text("phantom")
    with page.expect_navigation():
        page.locator(".grid a").first.click()
    expect(page.locator(".model")).to_have_count(0)
    for hidden in ("measurements", "vlm", "phantom A", "seen in the middle"):
        expect(page.locator("main")).not_to_contain_text(hidden)
    page.keyboard.press("a")
    expect(page.locator("#status")).to_contain_text("absent, saved")
    page.get_by_role("button", name="Audit mode").click()
    expect(page.locator(".concept").first).to_contain_text("Dr A: absent")
    assert expert_rows(opened.run)["evidence"].tolist() == ["said without seeing the machine's answer"]


def test_zoom_pan_and_window_of_a_grey_image(opened: Opened, page: Page) -> None:
    page.goto(f"{opened.address}/image/{IDS[0]}")
    page.keyboard.press("+")
    expect(page.locator("[data-zoom-level]")).to_have_text("150 %")
    box = page.locator(".stage").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    before = page.locator(".canvas").evaluate("e => e.style.transform")
    page.mouse.move(box["x"] + 60, box["y"] + 70, steps=3)
    page.mouse.up()
    assert page.locator(".canvas").evaluate("e => e.style.transform") != before
    page.keyboard.press("0")
    expect(page.locator("[data-zoom-level]")).to_have_text("100 %")
    expect(page.locator(".window")).to_be_visible()
    page.get_by_label("Window").fill("100")
    expect(page.locator("#window feFuncR")).to_have_attribute("slope", "2.55")
    page.goto(f"{opened.address}/image/{IDS[1]}")
    expect(page.locator("#picture")).to_be_visible()
    expect(page.locator(".window")).to_be_hidden()


PAGES = ("/", f"/image/{IDS[1]}", f"/overview?concept={LARGE}", f"/concepts?edit={LARGE}", "/disagreements", "/audit",
         f"/history/{IDS[1]}/{LARGE}", f"/prediction/{IDS[1]}?set=absent:{LARGE}",
         f"/concepts/change?action=drop&concept={LARGE}")  # fmt: skip


@pytest.fixture
def with_audit(opened: Opened) -> Opened:
    sheet = {"image_id": IDS[:3], "path": "", "concept_id": LARGE, "concept": "large lesion", "answer": ""}
    opened.run.write_audit(pd.DataFrame(sheet))
    return opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_any_page(with_audit: Opened, browser: Browser, scheme: Any) -> None:
    page = with_audit.page(browser, color_scheme=scheme)
    for concept in (LARGE, ELONGATED):
        for name in ("Dr A", "Dr B"):
            page.get_by_role("textbox", name="Reviewer").fill(name)
            with page.expect_navigation():
                page.get_by_role("button", name="Save").click()
            page.goto(f"{with_audit.address}/image/{IDS[1]}")
            page.locator(f"#c-{concept}").get_by_role("button", name="Present" if name == "Dr A" else "Absent").click()
            expect(page.locator("#status")).to_contain_text("saved")
    found = []
    for path in PAGES:
        page.goto(with_audit.address + path)
        if path.startswith("/image/"):
            expect(page.locator(".model .class")).to_be_visible()
        violations = Axe().run(page).response["violations"]
        found += [(path, v["id"], v["nodes"][0]["html"]) for v in violations if v["impact"] in ("serious", "critical")]
    assert found == []
    page.context.close()


def test_at_200_percent_nothing_needs_scrolling_sideways(with_audit: Opened, browser: Browser) -> None:
    # A window of 1280 px at 200 % has 640 px for the page.
    page = with_audit.page(browser)
    page.set_viewport_size({"width": 640, "height": 480})
    for path in PAGES:
        page.goto(with_audit.address + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 640, path
    page.goto(f"{with_audit.address}/image/{IDS[1]}")
    page.locator(f"#c-{LARGE}").get_by_role("button", name="Uncertain").click()
    expect(page.locator("#status")).to_contain_text("saved")
    page.context.close()


def test_a_change_of_the_concepts_shows_its_cost_first(opened: Opened, page: Page) -> None:
    with page.expect_navigation():
        page.get_by_role("link", name="Concepts").click()
    expect(page.locator("main")).to_contain_text("says the diagnosis rather than what is seen")
    with page.expect_navigation():
        page.get_by_role("link", name="Change large lesion").click()
    page.get_by_label("Name").first.fill("big lesion")
    page.get_by_role("button", name="See the cost").first.click()
    expect(page.locator("dl.cost")).to_contain_text("0.10 to 0.20 USD")
    expect(page.locator("dl.cost")).to_contain_text(f"{N_IMAGES} questions")
    assert opened.run.vocabulary()[LARGE].name == "large lesion"
    page.get_by_role("button", name="Change it").click()
    expect(page.locator(".band.said")).to_contain_text("medmicn judge")
    assert opened.run.vocabulary()[LARGE].name == "big lesion"
