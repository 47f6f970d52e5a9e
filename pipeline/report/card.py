"""Model card and data sheet: what a run's tables say about its model and its data, as two Markdown texts.

After Mitchell et al. (Model Cards for Model Reporting, FAT* 2019) and Gebru et al. (Datasheets for Datasets, CACM
2021). Everything that a run knows is filled in; what only people can know is asked, not invented.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pandas as pd

from data_contracts.tables import ConceptStatus
from pipeline.report import words
from pipeline.report.content import Metric
from pipeline.report.markdown import Markdown, environment, interval, table
from pipeline.report.results import spread
from pipeline.report.views import data_view

Row = dict[str, Any]
_OF_255 = {"fgsm", "pgd", "uniform noise"}
_MANY_BLANKS = re.compile(r"\n{3,}")


@dataclass(frozen=True)
class CardContent:
    """What both texts are made of; parts that a run lacks stay empty and are said to be missing."""

    name: str
    made_at: datetime
    modality: str
    synthetic: bool
    manifest: Mapping[str, Any]
    """`run.json`."""
    images: pd.DataFrame | None = None
    concepts: pd.DataFrame | None = None
    witnesses: Mapping[str, int] = field(default_factory=dict)
    """Cells judged, by `witness: model`."""
    decided_by: Mapping[str, int] = field(default_factory=dict)
    """Labels, by who decided them."""
    abstained_fraction: float | None = None
    agreement: pd.DataFrame | None = None
    """Pairs of witnesses: first, second, n_concepts, kappa."""
    refused: pd.DataFrame | None = None
    """source, concept_id, reason: witnesses' answers on concepts that were refused."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """`model/config.json`."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """Test metrics over seeds."""
    n_test: int | None = None
    per_class: pd.DataFrame | None = None
    intervals: pd.DataFrame | None = None
    """metric, estimate, low, high of the kept model."""
    calibration: pd.DataFrame | None = None
    reject: pd.DataFrame | None = None
    subgroups: pd.DataFrame | None = None
    robustness: pd.DataFrame | None = None
    maps: pd.DataFrame | None = None
    """`map_evidence.csv`."""
    concept_use: pd.DataFrame | None = None
    """measure, value, low, high, control, meaning: how much of the decision goes through the concepts."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """File → sha256."""


def model_card(content: CardContent) -> str:
    """The model card as Markdown."""
    return _render("model_card.md", content)


def data_sheet(content: CardContent) -> str:
    """The data sheet as Markdown."""
    return _render("data_sheet.md", content)


def _render(template: str, content: CardContent) -> str:
    text = (
        environment()
        .get_template(template)
        .render(
            c=content,
            config=content.manifest.get("config") or {},
            data=data_view(content.images) if content.images is not None else None,
            tables={name: make(content) for name, make in _TABLES.items()},
            formats=_formats(content),
            class_names=list(content.model.get("class_names", [])),
            kept=_kept(content),
            dropped=_dropped(content),
            seeds=(content.model.get("train") or {}).get("seeds", []),
            experts=any(name.startswith("expert") for name in content.witnesses),
            warnings=[w for many in (content.manifest.get("warnings") or {}).values() for w in many],
        )
    )
    return _MANY_BLANKS.sub("\n\n", text)


def _formats(content: CardContent) -> str:
    if content.images is None:
        return ""
    found: Mapping[str, int] = data_view(content.images)["formats"]
    return ", ".join(f"{name} ({n})" for name, n in found.items())


def _kept(content: CardContent) -> list[Row]:
    if content.concepts is None:
        return []
    kept = content.concepts[content.concepts["status"] == ConceptStatus.KEPT]
    return kept.sort_values("position", kind="stable").to_dict("records")


def _dropped(content: CardContent) -> list[tuple[str, int]]:
    if content.concepts is None:
        return []
    reasons = content.concepts.loc[content.concepts["status"] != ConceptStatus.KEPT, "reason"].dropna().value_counts()
    return [(words.DROPPED.get(code, words.words(code)), int(n)) for code, n in reasons.items()]


def _splits(content: CardContent) -> Markdown | None:
    if content.images is None:
        return None
    view = data_view(content.images)
    rows = [[row["name"], *row["counts"], row["n"]] for row in view["classes"]]
    return table(["class", *view["splits"], "all"], [*rows, ["all", *view["totals"], view["n_accepted"]]])


def _rejections(content: CardContent) -> Markdown | None:
    if content.images is None or not (found := data_view(content.images)["rejected"]):
        return None
    return table(["reason", "images"], [[row["meaning"] or words.words(row["code"]), row["n"]] for row in found])


def _metrics(content: CardContent) -> Markdown | None:
    if not content.metrics:
        return None
    bounds: dict[str, Row] = {}
    if content.intervals is not None:
        bounds = content.intervals.set_index("metric").to_dict("index")
    order = {name: n for n, name in enumerate(words.METRICS)}
    rows = []
    for name in sorted(content.metrics, key=lambda n: order.get(n, len(order))):
        mean, sd, _n = spread(content.metrics[name])
        kept = bounds.get(name) or dict.fromkeys(("estimate", "low", "high"))
        of_seeds = f"{words.decimal(mean, 3)} ± {words.decimal(sd, 3)}" if words.known(sd) else words.decimal(mean, 3)
        of_kept = interval(kept["estimate"], kept["low"], kept["high"])
        rows.append([words.METRICS.get(name, (words.words(name), ""))[0], of_seeds, of_kept])
    return table(["metric", "all seeds, mean ± sd", "kept model (95 % interval)"], rows)


def _per_class(content: CardContent) -> Markdown | None:
    columns = ("precision", "recall", "f1", "auroc")
    return _plain(content.per_class, ["class", "support"], columns)


def _calibration(content: CardContent) -> Markdown | None:
    if content.calibration is None:
        return None
    rows = [
        [row["measure"], *(interval(row[w], row.get(f"{w}_low"), row.get(f"{w}_high")) for w in ("before", "after"))]
        for row in content.calibration.to_dict("records")
    ]
    return table(["measure", "before", "after"], rows)


def _reject(content: CardContent) -> Markdown | None:
    if content.reject is None:
        return None
    in_use = content.reject[content.reject["in_use"].astype(bool)]
    if in_use.empty:
        return None
    rows = [
        [
            r["split"],
            words.decimal(r["threshold"], 3),
            words.decimal(r["coverage"], 3),
            interval(r["risk"], r["risk_low"], r["risk_high"]),
        ]
        for r in in_use.to_dict("records")
    ]
    return table(["split", "threshold", "coverage", "risk"], rows)


def _subgroups(content: CardContent) -> Markdown | None:
    if content.subgroups is None or content.subgroups.empty:
        return None
    rows = [
        [
            f"{r['column']} = {r['value']}",
            r["n"],
            words.words(r["metric"]),
            interval(r["estimate"], r["low"], r["high"]),
            interval(r["difference"], r["difference_low"], r["difference_high"]),
            words.decimal(r["p_holm"], 3),
            r["note"],
        ]
        for r in content.subgroups.to_dict("records")
    ]
    return table(["group", "images", "metric", "estimate", "difference to the rest", "P (Holm)", "note"], rows)


def _robustness(content: CardContent) -> Markdown | None:
    if content.robustness is None or content.robustness.empty:
        return None
    rows = [
        [
            r["perturbation"],
            _strength(r["perturbation"], r["strength"]),
            interval(r["accuracy"], r["accuracy_low"], r["accuracy_high"]),
            *(words.decimal(r[name], 3) for name in ("macro_f1", "concept_auroc", "map_correlation")),
        ]
        for r in content.robustness.to_dict("records")
    ]
    return table(["change", "strength", "accuracy", "macro F1", "concept AUROC", "map correlation"], rows)


def _strength(perturbation: str, strength: float) -> str:
    if perturbation == "none":
        return ""
    return f"{strength:.0f}/255" if perturbation in _OF_255 else f"severity {strength:.0f}"


def _evidence(frame: pd.DataFrame | None) -> Markdown | None:
    if frame is None or frame.empty:
        return None
    rows = [
        [
            " by ".join(filter(None, [r["measure"], r.get("method")])),
            interval(r["value"], r.get("low"), r.get("high")),
            words.decimal(r.get("control"), 3),
            r.get("control_is", ""),
            r.get("verdict", ""),
        ]
        for r in frame.to_dict("records")
    ]
    return table(["measure", "value", "control", "control is", "verdict"], rows)


def _agreement(content: CardContent) -> Markdown | None:
    if content.agreement is None or content.agreement.empty:
        return None
    rows = [
        [r["first"], r["second"], r["n_concepts"], words.decimal(r["kappa"]), words.agreement_word(r["kappa"])]
        for r in content.agreement.to_dict("records")
    ]
    return table(["who", "with whom", "concepts", "mean kappa", "in words"], rows)


def _refused(content: CardContent) -> Markdown | None:
    if content.refused is None or content.refused.empty:
        return None
    rows = [[r["source"], r["concept_id"], words.words(r["reason"])] for r in content.refused.to_dict("records")]
    return table(["whose answers", "concept", "reason"], rows)


def _hashes(content: CardContent) -> Markdown | None:
    return table(["file", "sha256"], list(content.hashes.items())) if content.hashes else None


def _versions(content: CardContent) -> Markdown | None:
    versions = content.manifest.get("versions") or {}
    return table(["package", "version"], list(versions.items())) if versions else None


def _counts(found: Mapping[str, int], headers: Sequence[str]) -> Markdown | None:
    return table(headers, [[name, words.count(n)] for name, n in found.items()]) if found else None


def _plain(frame: pd.DataFrame | None, names: Sequence[str], numbers: Sequence[str]) -> Markdown | None:
    if frame is None or frame.empty:
        return None
    shown = [n for n in numbers if n in frame]
    rows = [[*(r[n] for n in names), *(words.decimal(r[n], 3) for n in shown)] for r in frame.to_dict("records")]
    return table([*names, *shown], rows)


def _maps(content: CardContent) -> Markdown | None:
    return _evidence(content.maps)


def _concept_use(content: CardContent) -> Markdown | None:
    return _evidence(content.concept_use)


def _witnesses(content: CardContent) -> Markdown | None:
    return _counts(content.witnesses, ["witness", "cells"])


def _decided_by(content: CardContent) -> Markdown | None:
    return _counts(content.decided_by, ["decided by", "labels"])


_TABLES: Mapping[str, Callable[[CardContent], Markdown | None]] = {
    "splits": _splits,
    "rejections": _rejections,
    "metrics": _metrics,
    "per_class": _per_class,
    "calibration": _calibration,
    "reject": _reject,
    "subgroups": _subgroups,
    "robustness": _robustness,
    "maps": _maps,
    "concept_use": _concept_use,
    "agreement": _agreement,
    "refused": _refused,
    "hashes": _hashes,
    "versions": _versions,
    "witnesses": _witnesses,
    "decided_by": _decided_by,
}
