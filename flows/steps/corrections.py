"""What experts do between runs: spreadsheets that come back, and the audit sample."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from data_contracts.errors import ConfigurationError, ContractViolation
from data_contracts.spreadsheet import write_csv
from data_contracts.store import RunFolder
from data_contracts.tables import CONCEPTS, LABELS, Witness, vocabulary_of
from flows.chain import Context
from flows.ledger import append_new, merge_concepts
from flows.steps.images import accepted
from pipeline.import_labels import Imported, given_concepts, read_labels

AUDIT_SCORES_CSV = "audit_scores.csv"
_SHOWN = 10


@dataclass(frozen=True)
class SheetImport:
    """A checked sheet, not yet taken."""

    run: RunFolder
    imported: Imported
    concepts: pd.DataFrame | None
    """The concepts table to write, where the sheet brings new concepts."""

    @property
    def n_changed(self) -> int:
        """Cells that say something new."""
        return len(self.imported.judgements)

    @property
    def n_unchanged(self) -> int:
        """Cells that say what was known."""
        return self.imported.n_unchanged

    def preview(self) -> list[str]:
        """The first differences, as lines."""
        changed = self.imported.changed
        rows = [
            f"  row {row.row}: {row.path} · {row.concept_id}: {row.before} → {row.after}"
            for row in changed.head(_SHOWN).itertuples()
        ]
        more = [f"  … and {len(changed) - _SHOWN} more"] if len(changed) > _SHOWN else []
        left_out = self.imported.n_rows_left_out
        notes = [f"{left_out} rows are about rejected images and were left out"] if left_out else []
        return [*([f"{len(changed)} cells differ:", *rows, *more] if len(changed) else ["no cell differs"]), *notes]

    def take(self) -> None:
        """Add the judgements to the ledger, and the concepts they are about."""
        if self.concepts is not None:
            self.run.write_concepts(self.concepts)
        append_new(self.run, self.imported.judgements)


def import_sheet(context: Context, file: Path, *, given: bool, reviewer: str) -> SheetImport:
    """Read and check a sheet completely; raises `ContractViolation` with every fault, and takes nothing then."""
    run = context.run
    if not file.is_file():
        raise ConfigurationError(f"import-labels: expected a CSV file, found none at {file}.")
    concepts = _with_given(run, file) if given else None
    vocabulary = vocabulary_of(concepts) if concepts is not None else run.vocabulary()
    current = run.read_labels() if not given and run.table_path(LABELS).is_file() else None
    imported = read_labels(
        file,
        # Rows of rejected images are known, and left out, not refused.
        run.read_images(),
        vocabulary,
        reviewer=reviewer or file.name,
        witness=Witness.GIVEN if given else Witness.EXPERT,
        current=current,
    )
    return SheetImport(run, imported, concepts)


def _with_given(run: RunFolder, file: Path) -> pd.DataFrame:
    found = given_concepts(file)
    if found.empty:
        raise ContractViolation(str(file), ["expected at least one column that names a concept, found none"])
    return merge_concepts(run.read_concepts() if run.table_path(CONCEPTS).is_file() else None, found)


def draw_audit(context: Context, n_cells: int, seed: int, *, again: bool) -> int:
    """Write `audit.csv`; returns the number of cells. A sheet with answers in it is only replaced on request."""
    from annotation.trust.audit import AuditOptions, draw

    run = context.run
    if run.audit_path.is_file() and not again:
        answered = int((run.read_audit().get("answer", pd.Series(dtype=str)).str.strip() != "").sum())
        if answered:
            raise ConfigurationError(
                f"{run.audit_path}: {answered} cells are answered already; a new draw would replace them.",
                remedy="`medmicn audit score` reads them; --again replaces the sheet.",
            )
    sheet = draw(
        run.read_labels(),
        run.read_images(),
        run.vocabulary(),
        AuditOptions(n_cells=n_cells, seed=seed),
    )
    run.write_audit(sheet)
    return len(sheet)


def score_audit(context: Context, reviewer: str) -> pd.DataFrame:
    """Score every witness against the expert's answers, and add the answers to the ledger."""
    from annotation.trust.audit import read_audit, score

    run = context.run
    sheet, vocabulary = run.read_audit(), run.vocabulary()
    answers = read_audit(
        sheet, accepted(run.read_images()), vocabulary, reviewer=reviewer, created_at=datetime.now(UTC)
    )
    scores = score(sheet, run.read_judgements(), run.read_alignment_scores(), vocabulary)
    write_csv(run.path / AUDIT_SCORES_CSV, scores)
    append_new(run, answers)
    return scores
