"""Pictures of the evidence: intervention curves, and what is lost without each concept. As PNG on white."""

from __future__ import annotations

import io

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pipeline.report.plots import paper_style

INK, MUTED = "#1b1f24", "#59636e"
_COLOURS = {"right": "#0b6e99", "wrong": "#b35c00"}
_TITLES = {
    "random": "In random order",
    "uncertainty": "Least certain first",
    "utility": "Most useful first",
}
_MAX_BARS = 25
_MAX_NAME = 38


def intervention_curves_png(curves: pd.DataFrame) -> bytes:
    """Accuracy by the number of corrected concepts: one panel an order; right and wrong corrections, 95 % bands.

    `curves` has the columns order, corrections, n_corrected, accuracy, low, high.
    """
    orders = [order for order in _TITLES if (curves["order"] == order).any()]
    with mpl.rc_context(paper_style()):
        figure = Figure(figsize=(1.2 + 2.9 * len(orders), 3.3), layout="constrained")
        panels = figure.subplots(1, len(orders), squeeze=False, sharey=True)[0]
        for axes, order in zip(panels, orders, strict=True):
            _curve_panel(axes, curves[curves["order"] == order])
            axes.set_title(_TITLES[order])
            axes.set_xlabel("concepts or attributes corrected")
        panels[0].set_ylabel("accuracy")
        figure.legend(
            handles=[Line2D([], [], color=colour, label=f"{kind} corrections") for kind, colour in _COLOURS.items()],
            loc="outside lower center",
            ncols=len(_COLOURS),
            frameon=False,
        )
        return _png(figure)


def knock_out_png(table: pd.DataFrame) -> bytes:
    """Accuracy lost without each concept, with 95 % intervals, beside what another image's concept costs.

    `table` has the columns concept, drop, low, high, control, and the most needed concepts first.
    """
    shown = table.reindex(table["drop"].sort_values(ascending=False, kind="stable").index).head(_MAX_BARS)[::-1]
    places = range(len(shown))
    with mpl.rc_context(paper_style()):
        figure = Figure(figsize=(7.4, 1.2 + 0.24 * len(shown)), layout="constrained")
        axes = figure.subplots()
        axes.grid(visible=False, axis="y")
        axes.axvline(0, color=MUTED, linewidth=1)
        value = 100 * shown["drop"]
        ends = (value - 100 * shown["low"], 100 * shown["high"] - value)
        if shown[["low", "high"]].notna().all(axis=None):
            axes.errorbar(value, places, xerr=ends, fmt="none", ecolor=_COLOURS["right"], elinewidth=1.2, alpha=0.6)
        axes.scatter(value, places, s=26, color=_COLOURS["right"], zorder=3, label="hidden")
        axes.scatter(
            100 * shown["control"],
            places,
            s=20,
            facecolors="none",
            edgecolors=_COLOURS["wrong"],
            zorder=3,
            label="as in another image",
        )
        axes.set_yticks(list(places), [_short(str(name)) for name in shown["concept"]], color=INK, fontsize=8.5)
        axes.set_ylim(-0.8, len(shown) - 0.2)
        axes.set_xlabel("accuracy lost, percentage points")
        more = f", the {len(shown)} largest of {len(table)}" if len(table) > len(shown) else ""
        axes.set_title(f"Without this concept{more}")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        return _png(figure)


def _curve_panel(axes: Axes, rows: pd.DataFrame) -> None:
    for kind, colour in _COLOURS.items():
        one = rows[rows["corrections"] == kind].sort_values("n_corrected")
        if one.empty:
            continue
        axes.fill_between(one["n_corrected"], one["low"], one["high"], color=colour, alpha=0.13, linewidth=0)
        axes.plot(one["n_corrected"], one["accuracy"], color=colour, linewidth=1.6, marker="o", markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _short(name: str) -> str:
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    # No metadata: the same numbers are the same bytes.
    figure.savefig(stream, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return stream.getvalue()
