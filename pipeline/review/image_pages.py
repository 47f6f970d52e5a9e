"""Pages about one image: its pixels and maps, what every witness said, the model's answer, and interventions."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from fastapi import Query, Request
from starlette.responses import PlainTextResponse, Response

from data_contracts.errors import InputRefused, MedMicnError
from data_contracts.pixels import encode
from data_contracts.spreadsheet import read_csv
from data_contracts.tables import State
from pipeline.report.plots import heatmap_png
from pipeline.review import queries
from pipeline.review.browse_pages import FiltersQuery
from pipeline.review.cells import history_of, rows_of
from pipeline.review.index import Index
from pipeline.review.site import Site, is_fetch
from pipeline.review.witnesses import maps_of

THUMBNAIL_PX, FULL_PX = 240, 1400
_KEEP = {"Cache-Control": "private, max-age=3600"}
"""Pixels never change under an id: it is the hash of the file."""


class ImagePages:
    """FastAPI runs each page in a worker thread."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._thumbnail = functools.lru_cache(maxsize=2000)(self._new_thumbnail)
        # One prediction at a time: a network uses every core there is.
        self._predicting = threading.Lock()
        self._predict = functools.lru_cache(maxsize=64)(self._new_prediction)

    def image(self, request: Request, image_id: str, filters: FiltersQuery) -> Response:
        """One image with every concept."""
        index, reviewer = self._site.index(), self._site.reviewer(request)
        position = index.position(image_id)
        filters = filters.hidden() if reviewer.is_blind else filters
        return self._site.page(
            request,
            "image.html",
            image=queries.described(index, [position])[0],
            rows=rows_of(self._site, index, position, image_id, reviewer),
            filters=filters,
            found=queries.neighbours(index, self._site.vocabulary, filters, position),
            reading=index.rest,
            explained=[] if reviewer.is_blind else self._explained(image_id),
        )

    def pixels(self, image_id: str, size: str = "full") -> Response:
        """The image as fresh pixels; no file of the source is ever sent."""
        self._site.index().position(image_id)
        if size == "thumb":
            return Response(self._thumbnail(image_id), media_type="image/jpeg", headers=_KEEP)
        return Response(encode(self._site.read(image_id), FULL_PX), media_type="image/png", headers=_KEEP)

    def heatmap(self, request: Request, image_id: str, concept_id: str) -> Response:
        """Where the aligner sees a concept, to lie over the image."""
        if self._site.reviewer(request).is_blind:
            return PlainTextResponse("Hidden in audit mode.", 403)
        index = self._site.index()
        position = index.position(image_id)
        found = maps_of(index.cursor(), self._site.run, position, image_id).get(concept_id)
        if found is None or found.grid is None:
            return PlainTextResponse("No map of this concept in this image.", 404)
        return Response(heatmap_png(found.grid, _shape(index, position)), media_type="image/png")

    def history(self, request: Request, image_id: str, concept_id: str) -> Response:
        """All that was ever said of one cell."""
        if self._site.reviewer(request).is_blind:
            return self._site.page(request, "hidden.html")
        index = self._site.index()
        position = index.position(image_id)
        return self._site.page(
            request,
            "history.html",
            image=queries.described(index, [position])[0],
            concept=self._site.concept(concept_id),
            events=history_of(self._site.run, index, position, image_id, concept_id),
        )

    # ---- the trained model ---------------------------------------------------------------------------

    def prediction(
        self, request: Request, image_id: str, choice: Annotated[list[str] | None, Query(alias="set")] = None
    ) -> Response:
        """The model's class and rule, and what they become when concepts are set. Nothing is written."""
        if self._site.reviewer(request).is_blind:
            return self._site.page(request, "hidden.html")
        index = self._site.index()
        index.position(image_id)
        content: dict[str, Any] = {"image_id": image_id, "before": None, "after": None, "problem": None}
        chosen = _choices(choice or [])
        try:
            content["before"] = self._predict(image_id)
            if chosen and self._site.ports.intervene is not None:
                with self._predicting:
                    _, content["after"] = self._site.ports.intervene(image_id, chosen)
        except MedMicnError as error:
            content["problem"] = str(error)
        said = content["before"]
        concepts = [self._site.concept(c) for c in said.concept_probabilities] if said else []
        fragment = is_fetch(request)
        return self._site.page(
            request,
            "_prediction.html" if fragment else "prediction.html",
            fragment=fragment,
            chosen=chosen,
            concepts=concepts,
            can_intervene=self._site.ports.intervene is not None,
            **content,
        )

    def saliency(self, request: Request, image_id: str) -> Response:
        """What in the image speaks for the class that is predicted, to lie over the image."""
        if self._site.reviewer(request).is_blind:
            return PlainTextResponse("Hidden in audit mode.", 403)
        index = self._site.index()
        position = index.position(image_id)
        class_map = self._predict(image_id).class_map
        if class_map is None:
            return PlainTextResponse("This model gives no map.", 404)
        return Response(heatmap_png(class_map, _shape(index, position)), media_type="image/png")

    def explained(self, request: Request, image_id: str, target: str) -> Response:
        """A map that the explain step drew; only files that its table names are sent."""
        if self._site.reviewer(request).is_blind:
            return PlainTextResponse("Hidden in audit mode.", 403)
        folder = self._site.run.explanations_dir.resolve()
        for row in self._explained(image_id):
            path = (folder / row["file"]).resolve()
            if row["target"] == target and path.is_relative_to(folder) and path.suffix == ".png" and path.is_file():
                return Response(path.read_bytes(), media_type="image/png")
        return PlainTextResponse("No such map.", 404)

    # ---- inside --------------------------------------------------------------------------------------

    def _explained(self, image_id: str) -> list[dict[str, Any]]:
        path = self._site.run.explanations_dir / "maps.csv"
        if not path.is_file():
            return []
        table = _maps_table(path, path.stat().st_mtime_ns)
        rows = table[table["image_id"] == image_id]
        return [{str(name): value for name, value in row.items()} for row in rows.to_dict("records")]

    def _new_thumbnail(self, image_id: str) -> bytes:
        return encode(self._site.read(image_id), THUMBNAIL_PX, "JPEG")

    def _new_prediction(self, image_id: str) -> Any:
        if self._site.ports.predict is None:
            raise InputRefused("prediction: this run has no trained model yet.", remedy="Train it: medmicn train")
        with self._predicting:
            return self._site.ports.predict(image_id)


@functools.lru_cache(maxsize=2)
def _maps_table(path: Path, _mtime_ns: int) -> pd.DataFrame:
    return read_csv(path, as_text=True)


def _shape(index: Index, position: int) -> tuple[int, int] | None:
    """(height, width) of an image, if known."""
    row = queries.described(index, [position])[0]
    return (row["height_px"], row["width_px"]) if row["height_px"] and row["width_px"] else None


def _choices(chosen: list[str]) -> dict[str, bool]:
    """Concepts that are set, from `present:ID` and `absent:ID`; anything else sets nothing."""
    pairs = [text.partition(":") for text in chosen]
    return {c: state == State.PRESENT for state, _, c in pairs if c and state in (State.PRESENT, State.ABSENT)}
