"""Counts and prevalence as SVG that the page's own style sheet colours: no inline style, no script, no picture."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from data_contracts.concepts import Vocabulary
from data_contracts.tables import Split
from pipeline.report.words import count, percent
from pipeline.review.queries import Prevalence

_ROW_PX, _BAR_PX, _LEFT_PX, _WIDTH_PX = 26, 16, 168, 640
_SPLITS = (*(s.value for s in Split), None)
NO_CLASS = "no class"


def images_per_class(counts: Sequence[tuple[str | None, str | None, int]]) -> Markup:
    """Horizontal bars, one a class, in parts of train, validation and test."""
    labels = sorted({label for label, _, _ in counts}, key=lambda label: label or "\uffff")
    by_cell = {(label, split): n for label, split, n in counts}
    totals = {label: sum(by_cell.get((label, split), 0) for split in _SPLITS) for label in labels}
    scale = (_WIDTH_PX - _LEFT_PX - 70) / max(1, *totals.values()) if totals else 0
    shapes: list[Markup] = []
    for n, label in enumerate(labels):
        x, y = float(_LEFT_PX), n * _ROW_PX + 4
        shapes.append(_name(label, y))
        for number, split in enumerate(_SPLITS):
            width = by_cell.get((label, split), 0) * scale
            if width:
                title = f"{label or NO_CLASS}, {split or 'no split'}: {count(by_cell[label, split])}"
                shapes.append(_bar(x, y, width, f"part-{number}", title))
            x += width
        shapes.append(_text(x + 6, y, count(totals[label]), "value"))
    return _svg(shapes, len(labels), "Images per class and split")


def prevalence_of(concept: str, rows: Sequence[Prevalence], concept_id: str) -> Markup:
    """Horizontal bars: in each class, the share of labelled images in which the concept is present."""
    shapes: list[Markup] = []
    width = _WIDTH_PX - _LEFT_PX - 130
    for n, row in enumerate(rows):
        present, absent = row.counts[concept_id]
        y, labelled = n * _ROW_PX + 4, present + absent
        share = present / labelled if labelled else None
        shapes += [_name(row.label, y), _bar(_LEFT_PX, y, width, "track", "")]
        if share:
            shapes.append(_bar(_LEFT_PX, y, width * share, "part-0", f"{row.label or NO_CLASS}: {percent(share)}"))
        shapes.append(_text(_LEFT_PX + width + 8, y, f"{percent(share)} of {count(labelled)}", "value"))
    return _svg(shapes, len(rows), f"How often {concept} is present, by class")


def prevalence_table(vocabulary: Vocabulary, rows: Sequence[Prevalence]) -> list[tuple[str, str, list[float | None]]]:
    """(concept id, name, share present among labelled images in each class) in the vocabulary's order."""
    return [
        (c.concept_id, c.name, [_share(row, c.concept_id) for row in rows])
        for c in vocabulary
        if all(c.concept_id in row.counts for row in rows)
    ]


def _share(row: Prevalence, concept_id: str) -> float | None:
    present, absent = row.counts[concept_id]
    return present / (present + absent) if present + absent else None


def _svg(shapes: Sequence[Markup], n_rows: int, title: str) -> Markup:
    height = max(1, n_rows) * _ROW_PX
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH_PX, height, title, Markup("").join(shapes)
    )


def _bar(x: float, y: float, width: float, kind: str, title: str) -> Markup:
    return Markup(
        '<rect class="{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="2"><title>{}</title></rect>'
    ).format(kind, x, y, max(width, 0.5), _BAR_PX, title)


def _name(label: str | None, y: float) -> Markup:
    shown = label or NO_CLASS
    shown = shown if len(shown) <= 22 else shown[:21] + "…"
    return Markup('<text class="name" x="{}" y="{}" text-anchor="end">{}</text>').format(
        _LEFT_PX - 10, y + 12.5, escape(shown)
    )


def _text(x: float, y: float, text: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{}">{}</text>').format(kind, x, y + 12.5, text)
