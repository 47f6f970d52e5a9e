"""Pages about many images: the grid, counts and prevalence, and what reviewers disagree on."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.responses import JSONResponse, Response

from data_contracts.tables import State
from pipeline.review import charts, queries
from pipeline.review.experts import contested_cells
from pipeline.review.filters import DISPUTES, SORTS, Filters
from pipeline.review.index import Index
from pipeline.review.site import Site

FiltersQuery = Annotated[Filters, Depends()]
_DISAGREEMENTS_SHOWN = 50


class BrowsePages:
    """FastAPI runs each page in a worker thread."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def grid(self, request: Request, filters: FiltersQuery) -> Response:
        """The images that pass the filters."""
        index, blind = self._site.index(), self._site.reviewer(request).is_blind
        filters = filters.hidden() if blind else filters
        page = queries.page(index, self._site.vocabulary, filters)
        return self._site.page(
            request, "grid.html", page=page, filters=filters, **self._choices(index), reading=index.rest
        )

    def overview(self, request: Request, filters: FiltersQuery) -> Response:
        """Counts and prevalence per class of the images that pass the filters."""
        if self._site.reviewer(request).is_blind:
            return self._site.page(request, "hidden.html")
        index, vocabulary = self._site.index(), self._site.vocabulary
        rows = queries.prevalence(index, vocabulary, filters, list(vocabulary.ids))
        asked = self._site.concept(filters.concept) if filters.concept in vocabulary else None
        is_drawn = asked is not None and asked.concept_id in index.numbers
        return self._site.page(
            request,
            "overview.html",
            filters=filters,
            n_found=sum(row.n_images for row in rows),
            counts=charts.images_per_class(queries.split_counts(index, vocabulary, filters)),
            asked=asked,
            chart=charts.prevalence_of(asked.name, rows, asked.concept_id) if asked and is_drawn else None,
            classes=[row.label or charts.NO_CLASS for row in rows],
            table=charts.prevalence_table(vocabulary, rows),
            **self._choices(index),
        )

    def disagreements(self, request: Request, first: int = 0) -> Response:
        """Cells that reviewers decided differently, with what each said."""
        reviewer = self._site.reviewer(request)
        if reviewer.is_blind:
            return self._site.page(request, "hidden.html")
        index, first = self._site.index(), max(0, first)
        cursor = index.cursor()
        n_found = cursor.execute("SELECT count(*) FROM contested").fetchall()[0][0]
        cells = contested_cells(cursor, _DISAGREEMENTS_SHOWN, first)
        return self._site.page(
            request,
            "disagreements.html",
            cells=[cell | {"name": self._site.concept(cell["concept"]).name} for cell in cells],
            n_found=n_found,
            first=first,
            n_shown=_DISAGREEMENTS_SHOWN,
        )

    def progress(self) -> Response:
        """How far the reading is, for the page that waits."""
        progress = self._site.keeper.progress
        return JSONResponse({"what": progress.what, "share": progress.share, "ready": self._site.keeper.is_ready})

    def _choices(self, index: Index) -> dict[str, Any]:
        return {
            "labels": index.labels,
            "splits": index.splits,
            "vocabulary": self._site.vocabulary,
            "states": [s.value for s in State],
            "sorts": SORTS,
            "disputes": DISPUTES,
        }
