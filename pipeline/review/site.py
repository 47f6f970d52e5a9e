"""What every page shares: the run, its database, who looks, and how a template becomes an answer."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import ConfigurationError, ContractViolation, InputRefused, MedMicnError
from data_contracts.ports import PixelReader
from data_contracts.store import RunFolder
from data_contracts.tables import State
from pipeline.review.drift import pending
from pipeline.review.index import Index, Keeper, NotReadyYet
from pipeline.review.ledger import Reviewer
from pipeline.review.ports import Ports
from pipeline.review.security import Tokens
from pipeline.templates import environment

SAYABLE = (State.PRESENT, State.ABSENT, State.UNCERTAIN)
MAX_REVIEWER_CHARACTERS = 80


@dataclass
class _Person:
    """What one browser session chose."""

    name: str
    is_blind: bool = False
    notice: dict[str, Any] | None = None
    """What to say on the next page, once."""


@dataclass
class Site:
    """One run behind one server."""

    run: RunFolder
    read: PixelReader
    tokens: Tokens
    ports: Ports
    default_name: str
    keeper: Keeper = field(init=False)

    def __post_init__(self) -> None:
        self.keeper = Keeper(self.run)
        self._people: dict[str, _Person] = {}
        self._lock = threading.Lock()
        self._is_synthetic = self.run.exists and self.run.read_manifest().synthetic

    # ---- the run -------------------------------------------------------------------------------------

    def index(self) -> Index:
        """The database as it is now."""
        return self.keeper.current()

    @property
    def vocabulary(self) -> Vocabulary:
        """The kept concepts."""
        return self.keeper.vocabulary()

    def concept(self, concept_id: str) -> Concept:
        """A concept by id; one that was dropped since keeps its id as its name."""
        vocabulary = self.vocabulary
        return vocabulary[concept_id] if concept_id in vocabulary else Concept(concept_id, concept_id)

    # ---- who looks -----------------------------------------------------------------------------------

    def _person(self, request: Request) -> _Person:
        session = request.cookies.get(self.tokens.cookie, "")
        with self._lock:
            return self._people.setdefault(session, _Person(self.default_name))

    def reviewer(self, request: Request) -> Reviewer:
        """Who speaks in this browser."""
        person = self._person(request)
        return Reviewer(person.name, person.is_blind)

    def rename(self, request: Request, name: str) -> None:
        """Give this browser's reviewer another name; an empty one changes nothing."""
        cleaned = " ".join(name.split())[:MAX_REVIEWER_CHARACTERS]
        if cleaned:
            self._person(request).name = cleaned

    def hide_answers(self, request: Request, *, hidden: bool) -> None:
        """Enter or leave audit mode in this browser."""
        self._person(request).is_blind = hidden

    def say_once(self, request: Request, text: str, **more: Any) -> None:
        """Show a sentence on the next page of this browser."""
        self._person(request).notice = {"text": text, "action": None, **more}

    # ---- answers -------------------------------------------------------------------------------------

    def page(self, request: Request, template: str, status: int = 200, **content: Any) -> Response:
        """A rendered template."""
        person = self._person(request)
        is_fragment = template.startswith("_")
        notice, person.notice = (None, person.notice) if is_fragment else (person.notice, None)
        query = f"?{request.url.query}" if request.url.query else ""
        html = (
            environment("pipeline.review")
            .get_template(template)
            .render(
                run_name=self.run.path.name,
                run_path=str(self.run.path),
                synthetic=self._is_synthetic,
                reviewer=person.name,
                blind=person.is_blind,
                notice=notice,
                drift=None if is_fragment else pending(self.run),
                here=request.url.path + query if request.method == "GET" else "/",
                can_predict=self.ports.predict is not None,
                **content,
            )
        )
        return HTMLResponse(html, status)

    def refused(self, request: Request, error: Exception) -> Response:
        """An error as a page for people, as a plain sentence for scripts."""
        status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
        if is_fetch(request) or "text/html" not in request.headers.get("accept", ""):
            return PlainTextResponse(str(error), status)
        return self.page(request, "refused.html", status, error=error)

    def waiting(self, request: Request, error: Exception) -> Response:
        """The page that stands where another one will be, once the run is read."""
        progress = error.progress if isinstance(error, NotReadyYet) else self.keeper.progress
        return self.page(request, "waiting.html", 503, progress=progress)


def sayable(state: str) -> State:
    """A state that a person may give; raises `ContractViolation` for anything else."""
    if state not in SAYABLE:
        raise ContractViolation(
            "judgement", [f"state: expected one of {{{', '.join(SAYABLE)}}}, got {state[:40]!r}; nothing was written"]
        )
    return State(state)


def back_to(path: str) -> Response:
    """A redirect within this page; anything that could name another host goes to the grid."""
    inside = path.startswith("/") and not path.startswith(("//", "/\\")) and not any(c in path for c in "\r\n\t")
    return RedirectResponse(path if inside else "/", status_code=303)


def is_fetch(request: Request) -> bool:
    """Whether the page's own script asks, and wants a piece of a page."""
    return request.headers.get("x-requested-with") == "fetch"


_STATUS: tuple[tuple[type[MedMicnError], int], ...] = (
    (ConfigurationError, 409),
    (ContractViolation, 400),
    (InputRefused, 404),
    (MedMicnError, 500),
)
"""Errors as HTTP says them; the first that fits."""
