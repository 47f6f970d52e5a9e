"""Two runs on one page: what differs in their making, their labels and their results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from sklearn.metrics import cohen_kappa_score

from data_contracts.concepts import Concept, Vocabulary
from data_contracts.tables import Split
from pipeline.report import words
from pipeline.report.evidence import Column, Spec, TableView, table_view
from pipeline.templates import environment, source

PACKAGE = "pipeline.report"
_ABSENT = "not set"


@dataclass(frozen=True)
class RunSide:
    """One of the two runs."""

    name: str
    manifest: Mapping[str, Any]
    """`run.json` as a dict."""
    images: pd.DataFrame
    """IMAGES."""
    vocabulary: Vocabulary
    labels: pd.DataFrame | None = None
    """LABELS."""
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Test metric → {"mean", "sd"} over seeds."""

    @property
    def accepted(self) -> pd.DataFrame:
        """The images that were not rejected."""
        return self.images[self.images["rejected"].isna()]

    @property
    def test_ids(self) -> frozenset[str]:
        """Ids of the test images."""
        accepted = self.accepted
        return frozenset(accepted.loc[accepted["split"] == Split.TEST, "image_id"])


def render_comparison(first: RunSide, second: RunSide, made_at: datetime) -> str:
    """Both runs as one self-contained HTML page."""
    views = [
        _view(results(first, second), _results_spec(first, second)),
        _view(labels(first, second), _labels_spec(first, second)),
        _view(concepts(first, second), _sides_spec("Concepts that only one run has", first, second)),
        _view(data(first, second), _sides_spec("Images", first, second)),
        _view(effort(first, second), _sides_spec("Time and money", first, second)),
        _view(settings(first, second), _sides_spec("Settings that differ", first, second)),
        _view(versions(first, second), _sides_spec("Versions that differ", first, second)),
    ]
    page = environment(PACKAGE).get_template("compare.html")
    return page.render(
        first=first,
        second=second,
        made_at=made_at,
        style=Markup(source(PACKAGE, "report.css")),
        same_test=same_test_images(first, second),
        tables=[view for view in views if view is not None],
    )


def same_test_images(first: RunSide, second: RunSide) -> str:
    """A sentence about whether the two runs' test results may be compared."""
    a, b = first.test_ids, second.test_ids
    if not a or not b:
        return "At least one of the runs has no test images: results cannot be compared."
    if a == b:
        return f"Both runs were tested on the same {words.count(len(a))} images."
    shared = len(a & b)
    return (
        f"The test images differ ({words.count(len(a))} and {words.count(len(b))}, {words.count(shared)} of them in "
        "both): a difference of results may be one of images."
    )


def results(first: RunSide, second: RunSide) -> pd.DataFrame:
    """Test metrics side by side: metric, a, a_sd, b, b_sd, difference (b − a)."""
    shared = [name for name in first.metrics if name in second.metrics]
    rows = [
        {
            "metric": words.METRICS.get(name, (words.words(name), ""))[0],
            "a": first.metrics[name].get("mean"),
            "a_sd": first.metrics[name].get("sd"),
            "b": second.metrics[name].get("mean"),
            "b_sd": second.metrics[name].get("sd"),
        }
        for name in shared
    ]
    frame = pd.DataFrame(rows, columns=["metric", "a", "a_sd", "b", "b_sd"])
    return frame.assign(difference=pd.to_numeric(frame["b"]) - pd.to_numeric(frame["a"]))


def labels(first: RunSide, second: RunSide) -> pd.DataFrame:
    """How the labels of shared concepts agree on shared images.

    concept, n (cells where both decide), kappa (Cohen's), a_present, b_present, a_undecided, b_undecided (shares).
    """
    if first.labels is None or second.labels is None:
        return pd.DataFrame()
    shared = [c for c in first.vocabulary if c.concept_id in second.vocabulary]
    joined = first.labels.merge(second.labels, on=["image_id", "concept_id"], suffixes=("_a", "_b"))
    grouped = dict(iter(joined.groupby("concept_id")))
    return pd.DataFrame([_agreement(c.name, grouped[c.concept_id]) for c in shared if c.concept_id in grouped])


def _agreement(name: str, rows: pd.DataFrame) -> dict[str, Any]:
    a, b = (rows[f"present_{side}"].astype("boolean") for side in ("a", "b"))
    both = (a.notna() & b.notna()).to_numpy(bool)
    x, y = a[both].astype(int).to_numpy(), b[both].astype(int).to_numpy()
    defined = len(x) > 0 and len(np.unique(np.concatenate([x, y]))) > 1
    return {
        "concept": name,
        "n": int(both.sum()),
        "kappa": cohen_kappa_score(x, y) if defined else float("nan"),
        "a_present": float(a.mean()) if a.notna().any() else float("nan"),
        "b_present": float(b.mean()) if b.notna().any() else float("nan"),
        "a_undecided": float(a.isna().mean()),
        "b_undecided": float(b.isna().mean()),
    }


def concepts(first: RunSide, second: RunSide) -> pd.DataFrame:
    """Concepts of one run only, and those whose words changed: what, a, b."""
    ids = dict.fromkeys((*first.vocabulary.ids, *second.vocabulary.ids))
    rows = []
    for concept_id in ids:
        a, b = (_concept(side, concept_id) for side in (first, second))
        if a is None or b is None or (a.name, a.definition) != (b.name, b.definition):
            said = [c if c is None else f"{c.name}. {c.definition}" for c in (a, b)]
            rows.append({"what": concept_id, "a": said[0] or _ABSENT, "b": said[1] or _ABSENT})
    return pd.DataFrame(rows)


def _concept(side: RunSide, concept_id: str) -> Concept | None:
    return next((concept for concept in side.vocabulary if concept.concept_id == concept_id), None)


def data(first: RunSide, second: RunSide) -> pd.DataFrame:
    """Counts of images: what, a, b."""
    a, b = set(first.accepted["image_id"]), set(second.accepted["image_id"])
    rows = [
        ("images", len(a), len(b)),
        ("only in this run", len(a - b), len(b - a)),
        ("test images", len(first.test_ids), len(second.test_ids)),
        ("rejected", len(first.images) - len(first.accepted), len(second.images) - len(second.accepted)),
        ("classes", first.accepted["label"].nunique(), second.accepted["label"].nunique()),
    ]
    return pd.DataFrame([{"what": what, "a": words.count(x), "b": words.count(y)} for what, x, y in rows])


def effort(first: RunSide, second: RunSide) -> pd.DataFrame:
    """Seconds and dollars by step: what, a, b."""
    names = dict.fromkeys((*_steps(first), *_steps(second)))
    rows = [{"what": name, "a": _spent(first, name), "b": _spent(second, name)} for name in names]
    return pd.DataFrame(rows)


def _steps(side: RunSide) -> Mapping[str, Mapping[str, Any]]:
    return side.manifest.get("steps", {})


def _spent(side: RunSide, step: str) -> str:
    record = _steps(side).get(step)
    if record is None:
        return words.NOTHING
    cost = record.get("cost_usd")
    return words.seconds(record.get("seconds")) + (f", {words.dollars(cost)}" if cost else "")


def settings(first: RunSide, second: RunSide) -> pd.DataFrame:
    """Configuration keys with different values: what, a, b."""
    return _differences(_flat(first.manifest.get("config", {})), _flat(second.manifest.get("config", {})))


def versions(first: RunSide, second: RunSide) -> pd.DataFrame:
    """Packages of different versions: what, a, b."""
    return _differences(_flat(first.manifest.get("versions", {})), _flat(second.manifest.get("versions", {})))


def _differences(a: Mapping[str, str], b: Mapping[str, str]) -> pd.DataFrame:
    keys = [key for key in dict.fromkeys((*a, *b)) if a.get(key) != b.get(key)]
    return pd.DataFrame([{"what": key, "a": a.get(key, _ABSENT), "b": b.get(key, _ABSENT)} for key in keys])


def _flat(content: Any, above: str = "") -> dict[str, str]:
    if not isinstance(content, Mapping):
        return {above: str(content)}
    found: dict[str, str] = {}
    for key, value in content.items():
        found |= _flat(value, f"{above}.{key}" if above else str(key))
    return found


def _view(frame: pd.DataFrame, spec: Spec) -> TableView | None:
    return table_view(frame, spec) if len(frame) else None


def _results_spec(first: RunSide, second: RunSide) -> Spec:
    return Spec(
        "Results on test images",
        "Mean over seeds, and its standard deviation. The difference is the second run minus the first.",
        (
            Column("metric", "Measure"),
            Column("a", first.name, "fine"),
            Column("a_sd", "±", "fine"),
            Column("b", second.name, "fine"),
            Column("b_sd", "±", "fine"),
            Column("difference", "Difference", "signed"),
        ),
    )


def _labels_spec(first: RunSide, second: RunSide) -> Spec:
    return Spec(
        "Labels of the same images",
        "Kappa compares the two runs' labels where both decide; it says how alike they are, not which is right.",
        (
            Column("concept", "Concept"),
            Column("n", "Cells", "count"),
            Column("kappa", "Kappa", "decimal"),
            Column("a_present", f"Present, {first.name}", "percent"),
            Column("b_present", f"Present, {second.name}", "percent"),
            Column("a_undecided", f"Undecided, {first.name}", "percent"),
            Column("b_undecided", f"Undecided, {second.name}", "percent"),
        ),
    )


def _sides_spec(title: str, first: RunSide, second: RunSide) -> Spec:
    return Spec(title, "", (Column("what", "What"), Column("a", first.name), Column("b", second.name)))
