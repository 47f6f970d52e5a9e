from __future__ import annotations

import base64
import io
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_contracts.errors import DropReason, RejectReason
from data_contracts.tables import CONCEPTS, IMAGES, LABELS, to_pandas
from pipeline.report import plots, results, views, words
from pipeline.report.content import ConceptExamples, ReportContent, Tile
from pipeline.report.render import MAX_TILES, render

NOW = datetime(2026, 3, 4, 5, 6, tzinfo=UTC)
RNG = np.random.default_rng(0)
VOID = {"meta", "img", "br", "link", "input", "hr"}
EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Tags, references and visible text of a page; fails on tags that do not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += re.sub(r"\s+", " ", data)

    def references(self) -> list[str]:
        return [v for _, a in self.tags for k in ("src", "href", "xlink:href", "action") if (v := a.get(k)) is not None]


def images(n: int = 12) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "image_id": [f"i{k}" for k in range(n)],
            "path": [f"patient-name/{k}.png" for k in range(n)],
            "label": ["x", "y", EVIL] * (n // 3),
            "split": ["train", "val", "test", "train"] * (n // 4),
            "modality": "m",
            "width_px": 40,
            "height_px": [30] * (n - 1) + [80],
            "rejected": [None] * (n - 2) + ["truncated", "exact_duplicate"],
        }
    )
    return to_pandas(IMAGES.to_arrow(frame, "images"))


def concepts(n: int = 2) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "concept_id": [f"c{k}" for k in range(n)] + ["d"],
            "name": [f"concept {k}" for k in range(n)] + [EVIL],
            "definition": "",
            "proposed_for": [["x"]] * (n + 1),
            "origin": "vlm",
            "status": ["kept"] * n + ["dropped"],
            "reason": [None] * n + ["like_a_class"],
            "nearest": [None] * n + ["c0"],
            "position": [*range(n), None],
        }
    )
    return to_pandas(CONCEPTS.to_arrow(frame, "concepts"))


def labels(n_concepts: int = 2, n_images: int = 12) -> pd.DataFrame:
    rows = [
        (f"i{i}", f"c{k}", None if i == 0 else (i + k) % 3 == 0, (i % 10) / 10, 0.1)
        for i in range(n_images)
        for k in range(n_concepts)
    ]
    frame = pd.DataFrame(rows, columns=["image_id", "concept_id", "present", "probability", "disagreement"])
    frame["present"] = frame["present"].astype("boolean")
    return to_pandas(LABELS.to_arrow(frame.assign(decided_by="vlm"), "labels"))


def tile(side_px: int = 24, caption: str = "i1") -> Tile:
    return Tile(caption, RNG.integers(0, 255, (side_px, side_px, 3), dtype=np.uint8), RNG.random((3, 4)))


def full(**changes: Any) -> ReportContent:
    classes = ["x", "y", EVIL]
    content: dict[str, Any] = {
        "name": "run",
        "made_at": NOW,
        "images": images(),
        "class_examples": {name: [tile()] for name in classes},
        "concepts": concepts(),
        "labels": labels(),
        "agreement": pd.DataFrame(
            {"concept_id": ["c0", "c1"], "witness": "vlm", "reference": "expert", "n": 9, "kappa": [0.7, np.nan]}
        ),
        "leaks": pd.DataFrame({"concept_id": ["c0", "c1"], "auroc": [0.6, 0.99]}),
        "examples": {"c0": ConceptExamples([tile()], [tile()], [])},
        "history": pd.DataFrame(
            {"epoch": [1, 2] * 2, "seed": [0, 0, 1, 1], "train_loss": 1.0, "val_loss": 0.9, "val_macro_f1": 0.5}
        ),
        "chosen_epochs": {0: 2},
        "metrics": {"accuracy": [0.9, 0.8], "ece": {"mean": 0.1, "sd": 0.02}, "auroc": 0.95, "odd_metric": 0.5},
        "per_class": pd.DataFrame({"class": classes, "precision": 0.5, "recall": np.nan, "f1": 0.5, "support": 3}),
        "confusion": pd.DataFrame([[3, 0, 0], [1, 2, 0], [0, 0, 0]], index=classes, columns=classes),
        "calibration": pd.DataFrame({"confidence": [0.6, np.nan], "accuracy": [0.5, np.nan], "n": [3, 0]}),
        "concept_metrics": pd.DataFrame({"concept_id": ["c0"], "auroc": [0.8]}),
        "systems": pd.DataFrame({"system": ["black box"], "accuracy_mean": [0.8], "accuracy_sd": [0.01]}),
        "rules": pd.DataFrame({"class": classes, "rule": [EVIL] * 3, "support": 2, "precision": 0.5}),
        "saliency": [tile()],
        "manifest": {
            "steps": {"judge": {"seconds": 95, "cost_usd": 0.5, "counts": {"images": 10}}},
            "versions": {"torch": "2"},
            "config": {"train": {"seeds": [0]}, "evil": EVIL},
            "warnings": {"ingest": [EVIL]},
        },
        "limits": [EVIL],
    }
    return ReportContent(**(content | changes))


def test_the_page_is_well_formed_and_asks_nothing_of_any_network() -> None:
    html = render(full())
    page = Page(html)
    assert all(r.startswith(("data:image/", "#")) for r in page.references())
    assert not re.search(r"url\((?!#)|@import", html)
    assert "default-src 'none'" in next(a["content"] or "" for t, a in page.tags if a.get("http-equiv"))
    assert all(tag != "script" for tag, _ in page.tags)


def test_links_of_the_contents_lead_somewhere() -> None:
    page = Page(render(full()))
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert {r[1:] for t, a in page.tags if t == "a" and (r := a["href"] or "")} <= ids


def test_every_field_is_optional() -> None:
    assert "Research tool" in Page(render(ReportContent("run", NOW))).text
    plots_take_long = {"history": None, "calibration": None}
    for name in full().__dict__:
        if name not in ("name", "made_at", "modality", "synthetic"):
            empty = ReportContent("run", NOW).__dict__[name]
            Page(render(full(**plots_take_long | {name: empty})))


def test_empty_tables_are_as_good_as_none() -> None:
    nothing = {k: v.head(0) for k, v in full().__dict__.items() if isinstance(v, pd.DataFrame)}
    Page(render(full(**nothing)))


def test_an_unlabelled_run_has_a_report() -> None:
    text = Page(render(full(images=images().assign(label=None, split=None), metrics={}, per_class=None))).text
    assert "no class" in text


def test_notices() -> None:
    assert "Synthetic data." in Page(render(full(synthetic=True))).text
    assert "Synthetic" not in Page(render(full())).text
    assert "not a medical device" in Page(render(full())).text


def test_names_are_text_and_paths_are_not_shown() -> None:
    html = render(full())
    assert EVIL not in html
    assert EVIL in Page(html).text
    assert "patient-name" not in html


def test_numbers_on_the_page() -> None:
    text = Page(render(full())).text
    assert "85.0 %" in text  # mean of the two seeds
    assert "± 7.1 %" in text  # their sample standard deviation
    assert "10.0 %" in text  # the calibration error, given as mean and sd
    assert "1 min 35 s" in text
    assert "$0.50" in text
    assert "odd metric" in text
    assert "vlm against expert" in text


def test_a_page_of_noise_stays_under_ten_megabytes() -> None:
    many = 60
    noise = [tile(300) for _ in range(15)]
    examples = {
        f"c{k}": ConceptExamples(*([t._replace(caption=f"{k}") for t in noise[i : i + 5]] for i in (0, 5, 10)))
        for k in range(many)
    }
    html = render(full(concepts=concepts(many), labels=labels(many), examples=examples))
    assert len(html.encode()) < 10_000_000
    assert html.count('<img src="data:image/jpeg') <= MAX_TILES
    assert "were left out to keep this page small" in html


def test_pictures_are_re_encoded_without_metadata() -> None:
    html = render(full(class_examples={}, examples={}, saliency=[tile(600)]))
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    picture = Image.open(io.BytesIO(base64.b64decode(found[0])))
    assert max(picture.size) <= 200
    assert not picture.getexif()


def test_the_same_content_gives_the_same_page() -> None:
    content = full()
    assert render(content) == render(content)


# ---- what the rows say -----------------------------------------------------------------------------------


def test_data_view_counts() -> None:
    view = views.data_view(images())
    assert (view["n_given"], view["n_accepted"]) == (12, 10)
    assert view["totals"] == [5, 3, 2]
    assert sum(sum(row["counts"]) for row in view["classes"]) == 10
    assert {row["code"] for row in view["rejected"]} == {"truncated", "exact_duplicate"}


def test_class_table_leaves_abstained_labels_out() -> None:
    view = views.class_table(images(), labels(), [{"concept_id": "c0", "name": "concept 0"}])
    assert view is not None
    # c0 is present where i % 3 == 0, and i0 abstains; class x holds exactly those images.
    assert dict(zip(view["classes"], view["rows"][0]["fractions"], strict=True)) == {EVIL: 0.0, "x": 1.0, "y": 0.0}


def test_quality_rows_say_what_deserves_a_look() -> None:
    kept = views.concepts_view(concepts())["kept"]
    rows = {row["concept_id"]: row for row in views.quality_view(full(), kept)}
    assert rows["c0"]["abstained"] == pytest.approx(1 / 12)
    assert rows["c0"]["prevalence"] == pytest.approx(3 / 11)
    assert rows["c0"]["look"] == []
    assert rows["c1"]["look"] == ["follows the class"]


def test_constant_and_disputed_concepts_are_flagged() -> None:
    table = labels().assign(present=True)
    content = full(labels=table, agreement=pd.DataFrame({"concept_id": ["c0"], "n": 9, "kappa": [0.1]}), leaks=None)
    rows = views.quality_view(content, views.concepts_view(concepts())["kept"])
    assert [row["look"] for row in rows] == [["low agreement", "nearly constant"], ["nearly constant"]]


def test_the_first_comparison_leads_and_every_pair_is_averaged() -> None:
    table = pd.DataFrame(
        {
            "concept_id": ["c0", "c1", "c0", "c1"],
            "first": ["label", "label", None, None],
            "second": ["known truth", "known truth", None, None],
            "witness": [None, None, "vlm:some-model", "vlm:some-model"],
            "reference": [None, None, "alignment", "alignment"],
            "n": 5,
            "kappa": [0.2, 0.4, 0.5, np.nan],
        }
    )
    assert views.first_pair(table) == ("label", "known truth")
    pairs = views.pairs_view(table)
    assert [(p["first"], p["second"], round(p["kappa"], 6)) for p in pairs] == [
        ("label", "known truth", 0.3),
        ("vlm", "alignment", 0.5),
    ]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (0.5, (0.5, None, None)),
        ([0.1, 0.2, 0.6], (np.mean([0.1, 0.2, 0.6]), np.std([0.1, 0.2, 0.6], ddof=1), 3)),
        ([0.5, float("nan")], (0.5, None, 1)),
        ([], (None, None, None)),
        ({"mean": 0.3, "sd": 0.1, "n": 5}, (0.3, 0.1, 5)),
        ({"mean": 0.3, "std": 0.1}, (0.3, 0.1, None)),
    ],
)
def test_spread(metric: Any, expected: tuple[float | None, float | None, int | None]) -> None:
    found = results.spread(metric)
    assert [pytest.approx(e) if e is not None else None for e in expected] == list(found)


def test_rules_are_shown_best_supported_first_and_the_rest_is_counted() -> None:
    table = pd.DataFrame({"class": "x", "rule": [f"r{k}" for k in range(12)], "support": range(12)})
    (group,) = results.rules_view(table)
    assert [rule["rule"] for rule in group["rules"]] == [f"r{k}" for k in range(11, 3, -1)]
    assert group["n_rules"] == 12


def test_confusion_shares_are_of_the_true_class() -> None:
    view = results.confusion_view(pd.DataFrame([[3, 1], [0, 0]], index=["a", "b"], columns=["a", "b"]))
    assert [[c["share"] for c in row["cells"]] for row in view["rows"]] == [[0.75, 0.25], [0, 0]]


# ---- words -----------------------------------------------------------------------------------------------


def test_every_reason_code_has_words() -> None:
    assert set(words.REJECTED) == set(RejectReason)
    assert set(words.DROPPED) == set(DropReason)


@pytest.mark.parametrize(
    ("fraction", "shown"),
    [(0, "0 %"), (0.001, "<1 %"), (0.42, "42 %"), (0.998, ">99 %"), (1, "100 %"), (None, "–"), (np.nan, "–")],
)
def test_percent_never_rounds_an_end_away(fraction: float | None, shown: str) -> None:
    assert words.percent(fraction) == shown


@pytest.mark.parametrize(
    ("kappa", "word"),
    [
        (-0.1, "none"),
        (0.0, "none"),
        (0.2, "slight"),
        (0.21, "fair"),
        (0.6, "moderate"),
        (0.8, "substantial"),
        (1, "almost perfect"),
    ],
)
def test_words_for_kappa_are_landis_and_kochs(kappa: float, word: str) -> None:
    assert words.agreement_word(kappa) == word


@pytest.mark.parametrize(("value", "shown"), [(0.42, "0.4 s"), (59.4, "59 s"), (95, "1 min 35 s"), (7260, "2 h 1 min")])
def test_seconds(value: float, shown: str) -> None:
    assert words.seconds(value) == shown


# ---- plots -----------------------------------------------------------------------------------------------


def test_plots_take_their_colours_from_the_page() -> None:
    history = full().history
    calibration = full().calibration
    assert history is not None
    assert calibration is not None
    for svg in (plots.training_curves(history, {0: 2}), plots.reliability(calibration)):
        ElementTree.fromstring(svg)
        assert "var(--accent)" in svg
        # A stray sentinel would be almost black on a dark page.
        assert not re.search(r"#0[1-5]0[1-5]0[1-5]", svg)
        assert "DejaVu" not in svg


def test_heatmap_is_clear_where_cold_and_opaque_where_hot() -> None:
    heatmap = np.zeros((4, 4))
    heatmap[0, 3] = 5.0
    picture = np.asarray(Image.open(io.BytesIO(plots.heatmap_png(heatmap))))
    assert np.unravel_index(picture[..., 3].argmax(), picture.shape[:2])[1] > picture.shape[1] * 0.7
    assert picture[-1, 0, 3] == 0


@pytest.mark.parametrize("heatmap", [np.zeros((2, 3)), np.full((2, 3), 0.7), np.full((1, 1), np.nan)])
def test_a_flat_heatmap_claims_nothing(heatmap: np.ndarray) -> None:
    picture = np.asarray(Image.open(io.BytesIO(plots.heatmap_png(heatmap))))
    assert (picture[..., 3] == 0).all()


def test_maps_of_one_concept_share_a_scale() -> None:
    hot, cold = np.array([[0.0, 1.0]]), np.array([[0.0, 0.1]])
    span = plots.heat_span([hot, cold, np.full((2, 2), np.nan)])
    assert span == (0.0, 1.0)
    picture = np.asarray(Image.open(io.BytesIO(plots.heatmap_png(cold, span=span))))
    assert picture[..., 3].max() < 30
    assert np.asarray(Image.open(io.BytesIO(plots.heatmap_png(cold))))[..., 3].max() == 255


def test_a_concept_that_never_changes_does_not_follow_the_class() -> None:
    leaks = pd.DataFrame({"concept_id": ["c0", "c1"], "auroc": np.nan, "flagged": True, "constant": [True, False]})
    rows = views.quality_view(full(leaks=leaks, agreement=None), views.concepts_view(concepts())["kept"])
    assert [row["look"] for row in rows] == [[], ["follows the class"]]


def test_heatmap_takes_the_shape_of_its_picture() -> None:
    picture = Image.open(io.BytesIO(plots.heatmap_png(np.eye(7), (100, 200))))
    assert picture.size[0] == 2 * picture.size[1]
