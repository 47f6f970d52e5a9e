"""Metrics, rules and provenance as the page's templates show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from pipeline.report import words
from pipeline.report.content import Metric

Row = dict[str, Any]
MAX_RULES_PER_CLASS = 8
MAX_WARNINGS = 40


def metrics_view(metrics: Mapping[str, Metric]) -> list[Row]:
    """Mean and spread over seeds of each test metric, with its explanation; well-known ones first."""
    order = {name: i for i, name in enumerate(words.METRICS)}
    rows = []
    for name in sorted(metrics, key=lambda n: order.get(n, len(order))):
        mean, sd, n_seeds = spread(metrics[name])
        title, meaning = words.METRICS.get(name, (words.words(name), ""))
        as_text = words.percent if name in words.IN_PERCENT else words.decimal
        digits = 1 if name in words.IN_PERCENT else 3
        shown = {"mean": as_text(mean, digits), "sd": as_text(sd, digits) if words.known(sd) else None}
        rows.append({"key": name, "title": title, "meaning": meaning, "n_seeds": n_seeds, "value": mean, **shown})
    return rows


def spread(metric: Metric) -> tuple[float | None, float | None, int | None]:
    """(mean, sample standard deviation, number of seeds) of a metric in any of its forms."""
    if isinstance(metric, Mapping):
        return metric.get("mean"), metric.get("sd", metric.get("std")), _whole(metric.get("n"))
    if isinstance(metric, int | float):
        return float(metric), None, None
    values = np.asarray([v for v in metric if words.known(v)], np.float64)
    if not len(values):
        return None, None, None
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None, len(values)


def confusion_view(confusion: pd.DataFrame) -> Row:
    """Cells with their share of the true class, for shading."""
    totals = confusion.sum(axis=1)
    rows = [
        {
            "name": str(name),
            "n": int(totals[name]),
            "cells": [
                {"n": int(value), "share": float(value) / max(1, int(totals[name])), "right": str(column) == str(name)}
                for column, value in row.items()
            ],
        }
        for name, row in confusion.iterrows()
    ]
    return {"columns": [str(c) for c in confusion.columns], "rows": rows}


def rules_view(rules: pd.DataFrame) -> list[Row]:
    """Rules by class, the best supported first."""
    ordered = rules.sort_values("support", ascending=False, kind="stable") if "support" in rules else rules
    return [
        {"name": name, "rules": group.head(MAX_RULES_PER_CLASS).to_dict("records"), "n_rules": len(group)}
        for name, group in ordered.groupby("class", sort=True)
    ]


def systems_view(systems: pd.DataFrame) -> Row:
    """Comparison of systems: columns NAME, or NAME_mean with NAME_sd."""
    names = [c.removesuffix("_mean") for c in systems.columns if c != "system" and not c.endswith("_sd")]
    numeric = [n for n in names if pd.api.types.is_numeric_dtype(systems.get(n, systems.get(f"{n}_mean")))]
    titles = [words.METRICS.get(n, (words.words(n), ""))[0] for n in numeric]
    rows = []
    for record in systems.to_dict("records"):
        cells = [(record.get(f"{n}_mean", record.get(n)), record.get(f"{n}_sd")) for n in numeric]
        rows.append({"name": record["system"], "cells": cells})
    return {"titles": titles, "rows": rows}


def provenance_view(manifest: Mapping[str, Any]) -> Row:
    """Steps with seconds and cost, what endpoints can do, versions, and warnings by step."""
    steps = [
        {
            "name": name,
            "what": words.STEPS.get(name, ""),
            "seconds": step.get("seconds"),
            "cost_usd": step.get("cost_usd"),
            "counts": ", ".join(f"{words.words(k)} {_plain(v)}" for k, v in (step.get("counts") or {}).items()),
        }
        for name, step in (manifest.get("steps") or {}).items()
    ]
    costs = [s["cost_usd"] for s in steps if words.known(s["cost_usd"])]
    warnings = [(step, w) for step, many in (manifest.get("warnings") or {}).items() for w in many]
    return {
        "steps": steps,
        "endpoints": list((manifest.get("endpoints") or {}).items()),
        "seconds": sum(float(s["seconds"]) for s in steps if words.known(s["seconds"])),
        "cost_usd": sum(costs) if costs else None,
        "versions": dict(manifest.get("versions") or {}),
        "config": manifest.get("config") or {},
        "warnings": warnings[:MAX_WARNINGS],
        "n_warnings": len(warnings),
    }


def _whole(value: Any) -> int | None:
    return int(value) if words.known(value) else None


def _plain(value: Any) -> str:
    return words.count(value) if words.known(value) and float(value).is_integer() else words.decimal(value)
