"""The review page as an ASGI application: server-rendered, on this machine only."""

from __future__ import annotations

import functools
import threading
from typing import Annotated, Any

import pandas as pd
from fastapi import Depends, FastAPI, Form, Request
from pydantic import BaseModel
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from data_contracts.concepts import Concept
from data_contracts.errors import ContractViolation, InputRefused, MedMicnError
from data_contracts.pixels import encode
from data_contracts.ports import PixelReader
from data_contracts.store import RunFolder
from data_contracts.tables import Split, State
from pipeline.report.plots import heatmap_png
from pipeline.review.ledger import AuditSheet, Cell, Ledger
from pipeline.review.queries import SORTS, Filters, Snapshot
from pipeline.review.security import Guard, Tokens
from pipeline.review.tables import Heatmaps, Tables
from pipeline.templates import environment

THUMBNAIL_PX, FULL_PX = 240, 1400
SAYABLE = (State.PRESENT, State.ABSENT, State.UNCERTAIN)
MAX_REVIEWER_CHARACTERS = 80
_KEEP = {"Cache-Control": "private, max-age=3600"}
"""Pixels never change under an id: it is the hash of the file."""

FiltersQuery = Annotated[Filters, Depends()]
Text = Annotated[str, Form()]


class Correction(BaseModel):
    """The form under every concept."""

    image_id: str
    concept_id: str
    state: str = ""
    back: str = "/"


CorrectionForm = Annotated[Correction, Form()]


def create_app(run: RunFolder, read: PixelReader, token: str, *, reviewer: str = "reviewer") -> FastAPI:
    """The review page of `run`. Serve it on 127.0.0.1 and open `/?token=…`; the token opens one browser.

    `read` gives pixels, which are re-encoded; no file of the source is ever sent. `reviewer` is the name
    under which corrections stand in the ledger until the person changes it on the page.
    """
    app = FastAPI(title="medmicn review", docs_url=None, redoc_url=None, openapi_url=None)
    tokens = Tokens(token)
    pages = _Pages(run, read, tokens, reviewer)
    for path, page in (
        ("/", pages.grid),
        ("/image/{image_id}", pages.image),
        ("/pixels/{image_id}", pages.pixels),
        ("/heatmap/{image_id}/{concept_id}", pages.heatmap),
        ("/audit", pages.audit),
    ):
        app.add_api_route(path, page, methods=["GET"])
    for path, action in (
        ("/judge", pages.judge),
        ("/undo", pages.undo),
        ("/audit", pages.answer),
        ("/reviewer", pages.rename),
        ("/invite", pages.invite),
    ):
        app.add_api_route(path, action, methods=["POST"])
    app.mount("/static", StaticFiles(packages=[("pipeline.review", "static")]))
    app.add_exception_handler(MedMicnError, _refused)
    app.add_middleware(Guard, tokens=tokens)
    return app


class _Pages:
    """The pages and actions; FastAPI runs each in a worker thread."""

    def __init__(self, run: RunFolder, read: PixelReader, tokens: Tokens, reviewer: str) -> None:
        self._run = run
        self._read = read
        self._tokens = tokens
        self._ledger = Ledger(run)
        self._tables = Tables(run, self._ledger)
        self._heatmaps = Heatmaps(run)
        self._audit = AuditSheet(run)
        self._synthetic = run.exists and run.read_manifest().synthetic
        self._names: dict[str, str] = {}
        self._default_name = reviewer
        self._names_lock = threading.Lock()
        self._thumbnail = functools.lru_cache(maxsize=2000)(self._new_thumbnail)

    # ---- look ----------------------------------------------------------------------------------------

    def grid(self, request: Request, filters: FiltersQuery) -> Response:
        snapshot = self._tables.snapshot()
        return self._page(
            request,
            "grid.html",
            page=snapshot.page(filters),
            filters=filters,
            labels=sorted(snapshot.images["label"].dropna().unique()),
            splits=[s.value for s in Split if (snapshot.images["split"] == s).any()],
            vocabulary=snapshot.vocabulary,
            states=[s.value for s in State],
            sorts=SORTS,
        )

    def image(self, request: Request, image_id: str, filters: FiltersQuery) -> Response:
        snapshot = self._found(image_id)
        before, after, place, n_found = snapshot.neighbours(image_id, filters)
        return self._page(
            request,
            "image.html",
            image=snapshot.image(snapshot.position[image_id]),
            rows=snapshot.concepts_of(image_id),
            mapped=set(self._heatmaps.of(image_id)),
            filters=filters,
            before=before,
            after=after,
            place=place,
            n_found=n_found,
        )

    def pixels(self, image_id: str, size: str = "full") -> Response:
        self._found(image_id)
        if size == "thumb":
            return Response(self._thumbnail(image_id), media_type="image/jpeg", headers=_KEEP)
        return Response(encode(self._read(image_id), FULL_PX), media_type="image/png", headers=_KEEP)

    def heatmap(self, image_id: str, concept_id: str) -> Response:
        snapshot = self._found(image_id)
        found = self._heatmaps.of(image_id).get(concept_id)
        if found is None:
            return PlainTextResponse("No map of this concept in this image.", 404)
        return Response(heatmap_png(found, snapshot.shape_px(image_id)), media_type="image/png")

    # ---- correct -------------------------------------------------------------------------------------

    def judge(self, request: Request, said: CorrectionForm) -> Response:
        self._ledger.correct(self._cell(request, said), _sayable(said.state))
        return self._after(request, said)

    def undo(self, request: Request, said: CorrectionForm) -> Response:
        self._ledger.undo(self._cell(request, said))
        return self._after(request, said)

    def _cell(self, request: Request, said: Correction) -> Cell:
        self._found(said.image_id).vocabulary.position(said.concept_id)
        return Cell(said.image_id, said.concept_id, self._reviewer(request))

    def _after(self, request: Request, said: Correction) -> Response:
        """The changed row for the page's own script; a redirect for a browser without it."""
        if request.headers.get("x-requested-with") != "fetch":
            return _back_to(said.back)
        row = self._tables.snapshot().concept_of(said.image_id, said.concept_id)
        mapped = set(self._heatmaps.of(said.image_id))
        return self._page(request, "_concept.html", row=row, image_id=said.image_id, back=said.back, mapped=mapped)

    def rename(self, request: Request, name: Text, back: Text = "/") -> Response:
        cleaned = " ".join(name.split())[:MAX_REVIEWER_CHARACTERS]
        if cleaned:
            with self._names_lock:
                self._names[self._session(request)] = cleaned
        return _back_to(back)

    def invite(self, request: Request) -> Response:
        link = str(request.url_for("grid").include_query_params(token=self._tokens.issue()))
        return self._page(request, "invite.html", link=link)

    # ---- audit ---------------------------------------------------------------------------------------

    def audit(self, request: Request, cell: int | None = None) -> Response:
        sheet = self._audit.read()
        snapshot = self._tables.snapshot()
        number = _question(sheet, cell)
        row = None if number is None else sheet.loc[number].to_dict()
        return self._page(
            request,
            "audit.html",
            number=number,
            row=row,
            concept=None if row is None else _concept(snapshot, row["concept_id"]),
            readable=row is not None and row["image_id"] in snapshot.position,
            answers=sheet["answer"].tolist(),
            n_open=int((sheet["answer"] == "").sum()),
        )

    def answer(self, number: Annotated[int, Form()], image_id: Text, concept_id: Text, state: Text = "") -> Response:
        self._audit.answer(number, image_id, concept_id, _sayable(state).value if state else "")
        return _back_to("/audit" if state else f"/audit?cell={number}")

    # ---- inside --------------------------------------------------------------------------------------

    def _found(self, image_id: str) -> Snapshot:
        snapshot = self._tables.snapshot()
        if image_id not in snapshot.position:
            raise InputRefused(f"image {image_id[:16]!r}: no accepted image of this run has this id.")
        return snapshot

    def _new_thumbnail(self, image_id: str) -> bytes:
        return encode(self._read(image_id), THUMBNAIL_PX, "JPEG")

    def _session(self, request: Request) -> str:
        return request.cookies.get(self._tokens.cookie, "")

    def _reviewer(self, request: Request) -> str:
        return self._names.get(self._session(request), self._default_name)

    def _page(self, request: Request, template: str, **content: Any) -> Response:
        query = f"?{request.url.query}" if request.url.query else ""
        here = request.url.path + query if request.method == "GET" else "/"
        html = (
            environment("pipeline.review")
            .get_template(template)
            .render(
                run_name=self._run.path.name,
                synthetic=self._synthetic,
                reviewer=self._reviewer(request),
                here=here,
                **content,
            )
        )
        return HTMLResponse(html)


def _question(sheet: pd.DataFrame, asked: int | None) -> int | None:
    """The row to show: the one asked for, else the first without an answer, else the first."""
    if not len(sheet):
        return None
    if asked is not None and 0 <= asked < len(sheet):
        return asked
    return int((sheet["answer"] == "").idxmax())


def _concept(snapshot: Snapshot, concept_id: str) -> Concept:
    """A concept by id; one that was dropped since keeps its id as its name."""
    known = concept_id in snapshot.vocabulary
    return snapshot.vocabulary[concept_id] if known else Concept(concept_id, concept_id)


def _sayable(state: str) -> State:
    if state not in SAYABLE:
        raise ContractViolation(
            "judgement", [f"state: expected one of {{{', '.join(SAYABLE)}}}, got {state[:40]!r}; nothing was written"]
        )
    return State(state)


def _back_to(path: str) -> Response:
    """A redirect within this page; anything that could name another host goes to the grid."""
    inside = path.startswith("/") and not path.startswith(("//", "/\\"))
    return RedirectResponse(path if inside else "/", status_code=303)


def _refused(_request: Request, error: Exception) -> Response:
    status = 400 if isinstance(error, ContractViolation) else 404 if isinstance(error, InputRefused) else 500
    return PlainTextResponse(str(error), status)
