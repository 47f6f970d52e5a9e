"""Plots as SVG in the colours and fonts of the page, so that light, dark and print all fit; heatmaps as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

# Colours no plot would choose by accident; each becomes a colour of the page.
INK, MUTED, LINE, ACCENT, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
_PAGE_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    ACCENT: "var(--accent)",
    SECOND: "var(--warm)",
}
_ON_PAPER = {INK: "#1b1f24", MUTED: "#59636e", LINE: "#d8dee4", ACCENT: "#0b6e99", SECOND: "#b35c00"}
"""The same on a white sheet."""
_HEATMAP_SIDE_PX = 56

_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "lines.solid_capstyle": "round",
}


def training_curves(history: pd.DataFrame, chosen_epochs: Mapping[int, int]) -> str:
    """Loss and validation macro F1 by epoch, one thin line a seed, a dot at the epoch that was kept."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "training"}):
        return _svg(
            _curves(history, chosen_epochs, SECOND, ACCENT), "Training curves: loss and validation macro F1 by epoch"
        )


def paper_style() -> dict[str, Any]:
    """The page's style in the colours of a white sheet, for PNG files; matplotlib's rc parameters."""
    return {key: _ON_PAPER.get(str(value), value) for key, value in _STYLE.items()}


def training_curves_png(history: pd.DataFrame, chosen_epochs: Mapping[int, int]) -> bytes:
    """The same curves as a PNG on white, for programs and papers that take no SVG."""
    with mpl.rc_context(paper_style()):
        figure = _curves(history, chosen_epochs, _ON_PAPER[SECOND], _ON_PAPER[ACCENT])
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        return stream.getvalue()


def _curves(history: pd.DataFrame, chosen_epochs: Mapping[int, int], training: str, validation: str) -> Figure:
    figure, (loss, score) = _figure(8.6, 2.9, 2)
    loss.set_title("Loss")
    score.set_title("Macro F1 on validation images")
    for seed, rows in history.sort_values("epoch").groupby("seed", sort=True):
        for axes, name, colour in (
            (loss, "train_loss", training),
            (loss, "val_loss", validation),
            (score, "val_macro_f1", validation),
        ):
            _line(axes, rows, name, colour, chosen_epochs.get(int(seed)))
    for axes in (loss, score):
        axes.set_xlabel("epoch")
    _direct_labels(loss, history, training, validation)
    return figure


def reliability(bins: pd.DataFrame) -> str:
    """Stated probability against how often it was right; a calibrated classifier follows the diagonal."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "reliability"}):
        figure, (axes,) = _figure(4.1, 3.4, 1)
        shown = bins[bins["n"] > 0]
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        axes.plot(shown["confidence"], shown["accuracy"], color=ACCENT, linewidth=1.6)
        sizes = 14 + 120 * shown["n"] / max(1, shown["n"].max())
        axes.scatter(shown["confidence"], shown["accuracy"], s=sizes, color=ACCENT, linewidths=0, zorder=3)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="stated probability", ylabel="share that was right")
        axes.set_aspect("equal")
        return _svg(figure, "Calibration: stated probability against the share that was right")


def heatmap_png(
    heatmap: npt.NDArray[np.floating[Any]],
    shape: tuple[int, int] | None = None,
    span: tuple[float, float] | None = None,
) -> bytes:
    """A small RGBA PNG of one map: cells at the low end of `span` are clear, those at the high end opaque.

    `shape` is the (height, width) of the picture it lies on; only the ratio counts. The map's own if None.
    Without `span` a map is scaled to its own range, and does not compare with any other.
    """
    values = np.asarray(heatmap, np.float32)
    low, high = span or heat_span([values])
    unit = np.nan_to_num((values - low) / (high - low)).clip(0, 1) if high > low else np.zeros_like(values)
    height, width = shape or unit.shape
    side = _HEATMAP_SIDE_PX / max(height, width)
    size = (max(1, round(width * side)), max(1, round(height * side)))
    smooth = np.asarray(Image.fromarray(unit).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    rgba = mpl.colormaps["inferno"](0.25 + 0.72 * smooth)
    # Faint where lukewarm, so that the picture stays visible under the map.
    rgba[..., 3] = smooth**1.5
    stream = io.BytesIO()
    Image.fromarray((rgba * 255).round().astype(np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


def heat_span(heatmaps: Iterable[npt.NDArray[np.floating[Any]]]) -> tuple[float, float]:
    """Lowest and highest finite value over several maps; (0, 0) where there is none."""
    finite = [values[np.isfinite(values)] for values in map(np.asarray, heatmaps)]
    both = [(float(values.min()), float(values.max())) for values in finite if values.size]
    return (min(low for low, _ in both), max(high for _, high in both)) if both else (0.0, 0.0)


def _figure(width: float, height: float, n_panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    panels = list(figure.subplots(1, n_panels, squeeze=False)[0])
    for axes in panels:
        axes.patch.set_alpha(0)
    return figure, panels


def _line(axes: Axes, rows: pd.DataFrame, name: str, colour: str, chosen: int | None) -> None:
    if name not in rows or rows[name].isna().all():
        return
    axes.plot(rows["epoch"], rows[name], color=colour, linewidth=1.3, alpha=0.85)
    kept = rows[rows["epoch"] == chosen]
    if len(kept) and name != "train_loss":
        axes.scatter(kept["epoch"], kept[name], s=22, color=colour, linewidths=0, zorder=3)


def _direct_labels(axes: Axes, history: pd.DataFrame, training: str, validation: str) -> None:
    """Names at the upper right of the panel instead of a legend box."""
    for i, (name, text, colour) in enumerate(
        (("val_loss", "validation", validation), ("train_loss", "training", training))
    ):
        if name in history:
            axes.text(0.98, 0.95 - 0.1 * i, text, color=colour, transform=axes.transAxes, ha="right", va="top")


def _svg(figure: Figure, title: str) -> str:
    """The figure as an `<svg>` element that scales with the page and speaks to a screen reader."""
    stream = io.StringIO()
    # No metadata: a date would make the same content two different files.
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    for sentinel, colour in _PAGE_COLOURS.items():
        svg = svg.replace(sentinel, colour)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    width = re.search(r'width="([\d.]+)pt"', svg)
    svg = re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r"\1", svg, count=1)
    limit = f"max-width:{float(width[1]) * 4 / 3:.0f}px" if width else ""
    return re.sub(r'width="[\d.]+pt"', f'role="img" aria-label="{title}" style="width:100%;{limit}"', svg, count=1)
