"""A run as one self-contained page: no script, no network, light and dark, made to be printed."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from data_contracts.pixels import encode
from pipeline.report import evidence, plots, results, views
from pipeline.report.content import ReportContent, Tile
from pipeline.templates import environment, source

PACKAGE = "pipeline.report"
MAX_PICTURE_BYTES = 6_500_000
"""Bytes that pictures may take, before base64; keeps every page under 10 MB."""
_SIDES_PX = (200, 160, 128, 96, 72)
MAX_TILES = 640
MAX_TILES_PER_ROW = 5


class _Picture(NamedTuple):
    caption: str
    source: str
    """Data URI."""
    heatmap: str | None
    width: int
    height: int


def render(content: ReportContent) -> str:
    """The whole report as one HTML document (UTF-8, under 10 MB, no request to anywhere)."""
    pictures = _Pictures(content)
    concepts = views.concepts_view(content.concepts) if content.concepts is not None else None
    kept = concepts["kept"] if concepts else []
    quality = views.quality_view(content, kept)
    names = {concept["concept_id"]: concept["name"] for concept in kept}
    html = (
        environment(PACKAGE)
        .get_template("report.html")
        .render(
            content=content,
            style=Markup(source(PACKAGE, "report.css")),
            data=views.data_view(content.images) if content.images is not None else None,
            class_pictures={name: pictures.row(tiles) for name, tiles in content.class_examples.items()},
            concepts=concepts,
            mean_kappa=views.mean_kappa(quality),
            quality=quality if content.labels is not None else [],
            by_class=_by_class(content, kept),
            pairs=views.pairs_view(content.agreement),
            first_pair=views.first_pair(content.agreement),
            cards=_cards(content, quality, pictures),
            curves=_curves(content),
            metrics=results.metrics_view(content.metrics),
            confusion=results.confusion_view(content.confusion) if views.present(content.confusion) else None,
            per_class=content.per_class.to_dict("records") if views.present(content.per_class) else [],
            reliability=Markup(plots.reliability(content.calibration)) if views.present(content.calibration) else None,
            systems=results.systems_view(content.systems) if views.present(content.systems) else None,
            trust=evidence.tables(content.trust, evidence.TRUST, names),
            label_reliability=_label_reliability(content),
            evidence=evidence.tables(content.evidence, evidence.EVIDENCE, names),
            evidence_plots=[(text, _data_uri("image/png", png)) for text, png in content.evidence_pictures],
            plain_words=evidence.paragraphs(content.concept_use_text),
            rules=results.rules_view(content.rules) if views.present(content.rules) else [],
            saliency=pictures.row(content.saliency, limit=24),
            provenance=results.provenance_view(content.manifest),
            look={"kappa": views.LOOK_KAPPA, "leak": views.LOOK_LEAK, "abstained": views.LOOK_ABSTAINED},
            n_left_out=pictures.n_left_out,
        )
    )
    return html.replace("\r\n", "\n")


class _Pictures:
    """Encodes tiles at the largest size at which all of them fit."""

    def __init__(self, content: ReportContent) -> None:
        shown = list(_all_tiles(content))
        self.n_left_out = max(0, len(shown) - MAX_TILES)
        kept = shown[:MAX_TILES]
        spans = _spans(content)
        maps = {id(tile): _map_uri(tile, spans.get(id(tile))) for tile in kept}
        room = MAX_PICTURE_BYTES * 4 // 3 - sum(len(uri or "") for uri in maps.values())
        pictures = _encoded_within(kept, room)
        self._encoded = {id(t): _Picture(t.caption, pictures[id(t)], maps[id(t)], *_size(t)) for t in kept}

    def row(self, tiles: Sequence[Tile], limit: int = MAX_TILES_PER_ROW) -> list[_Picture]:
        return [self._encoded[id(tile)] for tile in tiles[:limit] if id(tile) in self._encoded]


def _all_tiles(content: ReportContent) -> Iterator[Tile]:
    """Every tile the page has room for, the ones to keep longest first."""
    for tiles in content.class_examples.values():
        yield from tiles[:MAX_TILES_PER_ROW]
    yield from content.saliency[:24]
    for kind in ("strongest", "disputed", "weakest"):
        for examples in content.examples.values():
            yield from getattr(examples, kind)[:MAX_TILES_PER_ROW]


def _encoded_within(tiles: Sequence[Tile], room: int) -> dict[int, str]:
    """Pictures as data URIs by tile, all at the largest side at which they fit into `room` characters."""
    for side_px in _SIDES_PX[:-1]:
        # A few tell the size of all, so that a page of many pictures is not encoded five times.
        sample = [len(_picture_uri(tile, side_px)) for tile in tiles[:: max(1, len(tiles) // 16)]]
        if sum(sample) * len(tiles) <= room * len(sample):
            encoded = {id(tile): _picture_uri(tile, side_px) for tile in tiles}
            if sum(map(len, encoded.values())) <= room:
                return encoded
    return {id(tile): _picture_uri(tile, _SIDES_PX[-1]) for tile in tiles}


def _size(tile: Tile) -> tuple[int, int]:
    height, width = tile.pixels.shape[:2]
    return width, height


def _picture_uri(tile: Tile, side_px: int) -> str:
    return _data_uri("image/jpeg", encode(tile.pixels, side_px, "JPEG"))


def _spans(content: ReportContent) -> dict[int, tuple[float, float]]:
    """One scale of the maps for all tiles of a concept, so that its weak pictures look cold beside its strong ones."""
    spans: dict[int, tuple[float, float]] = {}
    for examples in content.examples.values():
        tiles = [tile for row in examples for tile in row]
        span = plots.heat_span([tile.heatmap for tile in tiles if tile.heatmap is not None])
        spans.update({id(tile): span for tile in tiles})
    return spans


def _map_uri(tile: Tile, span: tuple[float, float] | None) -> str | None:
    if tile.heatmap is None or not np.size(tile.heatmap):
        return None
    return _data_uri("image/png", plots.heatmap_png(tile.heatmap, span=span))


def _data_uri(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _by_class(content: ReportContent, kept: list[views.Row]) -> views.Row | None:
    if content.images is None or content.labels is None or not kept:
        return None
    return views.class_table(content.images, content.labels, kept)


def _cards(content: ReportContent, quality: list[views.Row], pictures: _Pictures) -> list[views.Row]:
    """Concepts that have pictures, each with its numbers and its rows of pictures."""
    rows = []
    for row in quality:
        examples = content.examples.get(row["concept_id"])
        if examples is None:
            continue
        strips = [
            ("Strongest", pictures.row(examples.strongest)),
            ("Weakest", pictures.row(examples.weakest)),
            ("Disputed", pictures.row(examples.disputed)),
        ]
        rows.append({**row, "strips": [strip for strip in strips if strip[1]]})
    return [row for row in rows if row["strips"]]


def _curves(content: ReportContent) -> Markup | None:
    if not views.present(content.history):
        return None
    return Markup(plots.training_curves(content.history, content.chosen_epochs))


def _label_reliability(content: ReportContent) -> Markup | None:
    if not views.present(content.label_reliability):
        return None
    return Markup(plots.reliability(content.label_reliability.rename(columns={"observed": "accuracy"})))
