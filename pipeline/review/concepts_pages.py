"""The concepts page: what is kept and dropped and why, and every change with its cost before it happens."""

from __future__ import annotations

from typing import Annotated, Any

import pandas as pd
from fastapi import Depends, Form, Request
from pydantic import BaseModel
from starlette.responses import Response

from data_contracts.errors import ContractViolation, InputRefused, MedMicnError
from data_contracts.files import sha256_of_file
from data_contracts.tables import CONCEPTS, ConceptStatus
from pipeline.report.words import DROPPED
from pipeline.review.experts import words_per_concept
from pipeline.review.ledger import Corrections
from pipeline.review.site import Site, back_to
from pipeline.review.vocabulary_edits import MAX_NAME_CHARACTERS, Edit, Edited, apply

NEXT_VERBS = ("judge", "align", "fuse", "train")
"""What brings labels and model in step with changed concepts."""

EditQuery = Annotated[Edit, Depends()]


class Change(BaseModel):
    """The form that makes a change, as it was previewed."""

    action: str
    concept: str = ""
    into: str = ""
    name: str = ""
    definition: str = ""
    group: str = ""
    parts: str = ""
    seen: str
    """Hash of the concepts table that the preview was about."""

    def edit(self) -> Edit:
        """What is asked for."""
        return Edit(**self.model_dump(exclude={"seen"}))


class ConceptsPages:
    """FastAPI runs each page in a worker thread."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._corrections = Corrections(site.run)

    def concepts(self, request: Request, edit: str = "") -> Response:
        """Kept and dropped concepts."""
        if self._site.reviewer(request).is_blind:
            return self._site.page(request, "hidden.html")
        table = self._table()
        words = words_per_concept(self._site.index().cursor())
        rows = [_shown(row, words) for row in table.to_dict("records")]
        kept = sorted((r for r in rows if r["is_kept"]), key=lambda r: r["position"])
        chosen = next((r for r in rows if r["concept_id"] == edit), None)
        return self._site.page(
            request,
            "concepts.html",
            kept=kept,
            dropped=[r for r in rows if not r["is_kept"]],
            chosen=chosen,
            max_characters=MAX_NAME_CHARACTERS,
        )

    def preview(self, request: Request, edit: EditQuery) -> Response:
        """What a change would do and cost. Nothing is written."""
        edited = apply(self._table(), edit, self._site.reviewer(request).name)
        words = words_per_concept(self._site.index().cursor())
        return self._site.page(
            request,
            "change.html",
            edit=edit,
            edited=edited,
            n_words=words.get(edit.concept, 0) if edit.action not in ("add", "keep") else 0,
            carries=self._carries(edited),
            verbs=NEXT_VERBS,
            seen=self._seen(),
            **self._cost(edited.concepts),
        )

    def change(self, request: Request, said: Annotated[Change, Form()]) -> Response:
        """Make a previewed change; refused when somebody changed the concepts meanwhile."""
        reviewer, index = self._site.reviewer(request), self._site.index()
        with self._site.run.lock():
            if said.seen != self._seen():
                raise ContractViolation(
                    "concepts",
                    ["the concepts changed since this was shown; nothing was changed"],
                    remedy="Go back and look again.",
                )
            edited = apply(self._table(), said.edit(), reviewer.name)
            self._site.run.write_concepts(edited.concepts)
        n_carried = 0
        for carry in edited.carries:
            note = f"said of '{carry.origin}' before it was changed"
            n_carried += self._corrections.carry_over(index, carry.origin, carry.to, said=carry.said, note=note)
        carried = f" {n_carried} corrections were carried over." if n_carried else ""
        commands = ", then ".join(f"medmicn {verb} --run {self._site.run.path}" for verb in NEXT_VERBS)
        self._site.say_once(request, f"{edited.sentence}{carried} Next: {commands}")
        return back_to("/concepts")

    # ---- inside --------------------------------------------------------------------------------------

    def _table(self) -> pd.DataFrame:
        if not self._site.run.table_path(CONCEPTS).is_file():
            raise InputRefused("concepts: this run has none yet.", remedy="Find them: medmicn concepts")
        return self._site.run.read_concepts()

    def _seen(self) -> str:
        return sha256_of_file(self._site.run.table_path(CONCEPTS))

    def _carries(self, edited: Edited) -> list[dict[str, Any]]:
        return [
            {"said": carry.said.value, "origin": carry.origin, "to": [f"{c} {s.value}" for c, s in carry.to.items()]}
            for carry in edited.carries
        ]

    def _cost(self, concepts: pd.DataFrame) -> dict[str, Any]:
        """What judging would take after the change, beside what it takes now."""
        port = self._site.ports.cost
        if port is None:
            return {"cost": None, "cost_now": None, "cost_problem": "Only a run with its settings can tell."}
        try:
            return {"cost": port(concepts), "cost_now": port(self._table()), "cost_problem": None}
        except MedMicnError as error:
            return {"cost": None, "cost_now": None, "cost_problem": str(error)}


def _shown(row: dict[Any, Any], words: dict[str, int]) -> dict[str, Any]:
    """One concept for the table; a null is an empty text."""

    def text(name: str) -> str:
        value = row.get(name)
        return "" if pd.isna(value) else str(value)

    def texts(name: str) -> list[str]:
        return list(row[name]) if hasattr(row.get(name), "__len__") else []

    return {
        **{name: text(name) for name in ("concept_id", "name", "definition", "group", "origin", "nearest")},
        "is_kept": row["status"] == ConceptStatus.KEPT,
        "reason": DROPPED.get(text("reason"), text("reason")),
        "similarity": row.get("similarity"),
        "position": row.get("position"),
        "proposed_for": texts("proposed_for"),
        "synonyms": texts("synonyms"),
        "provenance": texts("provenance"),
        "n_words": words.get(text("concept_id"), 0),
    }
