"""The review page as an ASGI application: server-rendered, on this machine only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from data_contracts.errors import MedMicnError
from data_contracts.ports import PixelReader
from data_contracts.store import RunFolder
from pipeline.review.browse_pages import BrowsePages
from pipeline.review.concepts_pages import ConceptsPages
from pipeline.review.correct_pages import CorrectPages
from pipeline.review.image_pages import ImagePages
from pipeline.review.index import NotReadyYet
from pipeline.review.ports import Ports
from pipeline.review.security import Guard, Tokens
from pipeline.review.site import Site


def create_app(
    run: RunFolder, read: PixelReader, token: str, *, reviewer: str = "reviewer", ports: Ports | None = None
) -> FastAPI:
    """The review page of `run`. Serve it on 127.0.0.1 and open `/?token=…`; the token opens one browser.

    `read` gives pixels, which are re-encoded; no file of the source is ever sent. `reviewer` is the name
    under which corrections stand in the ledger until the person changes it on the page. `ports` is what the page
    needs others for: predictions, interventions and prices.
    """
    site = Site(run, read, Tokens(token), ports or Ports(), reviewer)

    @asynccontextmanager
    async def reading(_app: FastAPI) -> AsyncIterator[None]:
        site.keeper.warm()
        yield
        site.keeper.stop()

    app = FastAPI(title="medmicn review", docs_url=None, redoc_url=None, openapi_url=None, lifespan=reading)
    _add_routes(app, site)
    app.mount("/static", StaticFiles(packages=[("pipeline.review", "static")]))
    app.add_exception_handler(MedMicnError, site.refused)
    app.add_exception_handler(NotReadyYet, site.waiting)
    app.add_middleware(Guard, tokens=site.tokens)
    return app


def _add_routes(app: FastAPI, site: Site) -> None:
    browse, images = BrowsePages(site), ImagePages(site)
    correct, concepts = CorrectPages(site), ConceptsPages(site)
    for path, page in (
        ("/", browse.grid),
        ("/overview", browse.overview),
        ("/disagreements", browse.disagreements),
        ("/progress", browse.progress),
        ("/image/{image_id}", images.image),
        ("/pixels/{image_id}", images.pixels),
        ("/heatmap/{image_id}/{concept_id}", images.heatmap),
        ("/history/{image_id}/{concept_id}", images.history),
        ("/prediction/{image_id}", images.prediction),
        ("/saliency/{image_id}", images.saliency),
        ("/explained/{image_id}/{target}", images.explained),
        ("/concepts", concepts.concepts),
        ("/concepts/change", concepts.preview),
        ("/audit", correct.audit),
    ):
        app.add_api_route(path, page, methods=["GET"])
    for path, action in (
        ("/judge", correct.judge),
        ("/undo", correct.undo),
        ("/bulk", correct.bulk),
        ("/undo-action", correct.undo_action),
        ("/audit", correct.answer),
        ("/reviewer", correct.rename),
        ("/mode", correct.mode),
        ("/invite", correct.invite),
        ("/drift", correct.drift),
        ("/concepts/change", concepts.change),
    ):
        app.add_api_route(path, action, methods=["POST"])
