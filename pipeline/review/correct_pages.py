"""Forms that change something: corrections one by one and in bulk, undo, the audit sheet, who looks and how."""

from __future__ import annotations

from typing import Annotated

from fastapi import Form, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from data_contracts.errors import ContractViolation
from pipeline.report.words import plural
from pipeline.review.audit import AuditSheet, question
from pipeline.review.cells import row_of
from pipeline.review.drift import decide
from pipeline.review.ledger import Cell, Corrections
from pipeline.review.site import Site, back_to, is_fetch, sayable

MAX_BULK = 500
"""Images that one bulk correction may be about."""

Text = Annotated[str, Form()]


class Correction(BaseModel):
    """The form under every concept."""

    image_id: str
    concept_id: str
    state: str = ""
    back: str = "/"


class Bulk(BaseModel):
    """The form around the grid."""

    image_id: list[str] = Field(default_factory=list)
    concept_id: str = ""
    state: str = ""
    back: str = "/"


class CorrectPages:
    """FastAPI runs each action in a worker thread."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._corrections = Corrections(site.run)
        self._audit = AuditSheet(site.run)

    # ---- corrections ---------------------------------------------------------------------------------

    def judge(self, request: Request, said: Annotated[Correction, Form()]) -> Response:
        """One cell: present, absent or uncertain."""
        state, cell = sayable(said.state), self._cell(said.image_id, said.concept_id)
        self._corrections.correct(self._site.index(), [cell], state, self._site.reviewer(request))
        return self._after(request, said)

    def undo(self, request: Request, said: Annotated[Correction, Form()]) -> Response:
        """Take the reviewer's own last word on a cell back."""
        cell = self._cell(said.image_id, said.concept_id)
        self._corrections.undo(self._site.index(), cell, self._site.reviewer(request))
        return self._after(request, said)

    def bulk(self, request: Request, said: Annotated[Bulk, Form()]) -> Response:
        """One concept in every selected image."""
        state = sayable(said.state)
        if not 1 <= len(said.image_id) <= MAX_BULK or not said.concept_id:
            raise ContractViolation(
                "bulk correction",
                [f"expected a concept and 1 to {MAX_BULK} images, got {len(said.image_id)}; nothing was written"],
            )
        cells = [self._cell(image_id, said.concept_id) for image_id in said.image_id]
        reviewer = self._site.reviewer(request)
        action = self._corrections.correct(self._site.index(), cells, state, reviewer)
        name = self._site.concept(said.concept_id).name
        text = f"“{name}” is {state.value} in {plural(len(cells), 'image')}, says {reviewer.name}."
        self._site.say_once(request, text, action=action)
        return back_to(said.back)

    def undo_action(self, request: Request, action: Text, back: Text = "/") -> Response:
        """Take a bulk correction back."""
        n_cells = self._corrections.undo_action(self._site.index(), action, self._site.reviewer(request))
        self._site.say_once(request, f"Taken back in {plural(n_cells, 'image')}.")
        return back_to(back)

    def _cell(self, image_id: str, concept_id: str) -> Cell:
        """A cell that exists; raises `InputRefused` or `ContractViolation` for any other."""
        self._site.index().position(image_id)
        self._site.vocabulary.position(concept_id)
        return Cell(image_id, concept_id)

    def _after(self, request: Request, said: Correction) -> Response:
        """The changed row for the page's own script; a redirect for a browser without it."""
        if not is_fetch(request):
            return back_to(said.back)
        index, reviewer = self._site.index(), self._site.reviewer(request)
        position = index.position(said.image_id)
        row = row_of(self._site, index, position, said.image_id, said.concept_id, reviewer)
        return self._site.page(request, "_concept.html", row=row, image_id=said.image_id, back=said.back)

    # ---- who looks, and how --------------------------------------------------------------------------

    def rename(self, request: Request, name: Text, back: Text = "/") -> Response:
        """Another name for the ledger."""
        self._site.rename(request, name)
        return back_to(back)

    def mode(self, request: Request, hidden: Text = "", back: Text = "/") -> Response:
        """Audit mode: the machine's answer is hidden in this browser."""
        self._site.hide_answers(request, hidden=hidden == "yes")
        return back_to(back)

    def invite(self, request: Request) -> Response:
        """A link that opens one more browser."""
        link = str(request.url_for("grid").include_query_params(token=self._site.tokens.issue()))
        return self._site.page(request, "invite.html", link=link)

    def drift(self, request: Request, decision: Text, raised_at: Text, back: Text = "/") -> Response:
        """A person's answer to a pause for drift."""
        decide(self._site.run, decision, self._site.reviewer(request).name, raised_at)
        said = "Approved: training goes on" if decision == "approve" else "Rejected: nothing is trained on these images"
        self._site.say_once(request, f"{said}.")
        return back_to(back)

    # ---- the audit sheet -----------------------------------------------------------------------------

    def audit(self, request: Request, cell: int | None = None) -> Response:
        """One question of the audit sheet."""
        sheet, index = self._audit.read(), self._site.index()
        number = question(sheet, cell)
        row = None if number is None else sheet.loc[number].to_dict()
        return self._site.page(
            request,
            "audit.html",
            number=number,
            row=row,
            concept=None if row is None else self._site.concept(row["concept_id"]),
            readable=row is not None and index.has(row["image_id"]),
            answers=sheet["answer"].tolist(),
            n_open=int((sheet["answer"] == "").sum()),
        )

    def answer(self, number: Annotated[int, Form()], image_id: Text, concept_id: Text, state: Text = "") -> Response:
        """An answer, or none to take one back."""
        self._audit.answer(number, image_id, concept_id, sayable(state).value if state else "")
        return back_to("/audit" if state else f"/audit?cell={number}")
