"""An edited concepts.csv on its way back: the difference, what it will cost, and the new table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_contracts.store import RunFolder
from flows.chain import Context
from flows.steps.images import accepted
from pipeline.import_concepts import ConceptEdits, read_concept_edits

_SHOWN = 20


@dataclass(frozen=True)
class ConceptSheet:
    """A checked sheet, not yet taken."""

    run: RunFolder
    edits: ConceptEdits
    n_images: int
    """Accepted images: each is asked about again where a question is new."""

    @property
    def n_changed(self) -> int:
        """Cells that differ, and new concepts."""
        return len(self.edits.changes)

    def preview(self) -> list[str]:
        """The differences, and what they ask for, as lines."""
        changes = self.edits.changes
        if not changes:
            return ["no concept differs"]
        lines = [
            f"  row {c.row}: new concept {c.after!r}"
            if c.column == "concept"
            else f"  row {c.row}: {c.concept_id} · {c.column}: {c.before!r} → {c.after!r}"
            for c in changes[:_SHOWN]
        ]
        more = [f"  … and {len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else []
        again = self.edits.asked_again
        cost = (
            f"{len(again)} concepts have a new question ({', '.join(again[:5])}{', …' if len(again) > 5 else ''}): "
            f"{self.n_images} images will be asked about them again; `medmicn estimate` shows the price first."
            if again
            else "no question is new: nothing will be asked again."
        )
        return [f"{len(changes)} differences:", *lines, *more, cost]

    def take(self) -> None:
        """Replace the concepts table; judgements of dropped concepts stay in the ledger."""
        self.run.write_concepts(self.edits.concepts)


def read_concept_sheet(context: Context, file: Path) -> ConceptSheet:
    """Read and check an edited concepts.csv; raises `ContractViolation` with every fault."""
    run = context.run
    edits = read_concept_edits(file, run.read_concepts())
    return ConceptSheet(run, edits, len(accepted(run.read_images())))
