"""What experts do between runs: spreadsheets that come back, and the audit sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.errors import ConfigurationError, ContractViolation, InputRefused
from data_contracts.spreadsheet import read_csv, write_csv
from data_contracts.store import RunFolder
from data_contracts.tables import CONCEPTS, LABELS, Split, Witness, vocabulary_of
from flows.chain import Context
from flows.ledger import append_new, merge_concepts
from flows.parts import evidence_of, judgements_with, label_shards, some_images
from flows.settings import Scale
from flows.steps.honesty import refused_of
from flows.steps.images import accepted
from flows.steps.thresholds import fit_alignment
from pipeline.import_labels import Imported, given_concepts, read_labels
from pipeline.sheet import read_sheet

AUDIT_DESIGN_CSV = "audit_design.csv"
AUDIT_SCORES_CSV = "audit_scores.csv"
AUDIT_EXPERTS_CSV = "audit_experts.csv"
AUDIT_DISPUTED_CSV = "audit_disputed.csv"
AUDIT_REJECTED_CSV = "audit_rejected.csv"
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


@dataclass(frozen=True)
class AuditScores:
    """What an audit found."""

    scores: pd.DataFrame
    """One row per witness and concept."""
    experts: pd.DataFrame
    """How experts agree among themselves; empty for one."""
    disputed: pd.DataFrame
    """Cells that experts decided differently."""
    n_answers: int
    """Answers read from the sheet."""
    n_rejected: int
    """Rows of the sheet that were left out."""


def draw_audit(context: Context, n_cells: int, seed: int, *, again: bool, more: bool = False) -> int:
    """Write `audit.csv`; returns the number of new cells.

    A sheet with answers in it is only replaced on request (`again`); `more` adds cells of the concepts that its
    answers leave undecided.
    """
    from annotation.trust.audit_sheet import AUDIT_EVIDENCE
    from annotation.trust.draw import DESIGN_COLUMNS, LABEL_COLUMNS, SHEET_COLUMNS, DrawOptions, draw

    run = context.run
    before = run.read_audit() if run.audit_path.is_file() else None
    if before is not None and not again and not more:
        answered = int((before.get("answer", pd.Series(dtype=str)).str.strip() != "").sum())
        if answered:
            raise ConfigurationError(
                f"{run.audit_path}: {answered} cells are answered already; a new draw would replace them.",
                remedy="`medmicn audit score` reads them; --more adds cells of what they leave undecided; --again "
                "replaces the sheet.",
            )
    labels, images, vocabulary = label_shards(run, LABEL_COLUMNS), run.read_images(), run.vocabulary()
    options = DrawOptions(n_cells=n_cells, seed=seed)
    if not more:
        # Cells of earlier audits are not asked again: a design before the first round.
        asked = judgements_with(run, AUDIT_EVIDENCE).drop_duplicates().assign(round=0)
        cells = draw(labels, images, vocabulary, options, asked=asked)
        sheet, design = cells[SHEET_COLUMNS], cells[DESIGN_COLUMNS].assign(round=1)
    else:
        earlier = _design(run, before)
        need = _still_needed(context, earlier)
        cells = draw(labels, images, vocabulary, options, asked=earlier, need=need)
        sheet = pd.concat([before, cells[SHEET_COLUMNS]], ignore_index=True).fillna("")
        design = pd.concat([earlier, cells[DESIGN_COLUMNS]], ignore_index=True)
    # The design first: a cell without a question does no harm, a question without its probability does.
    write_csv(run.path / AUDIT_DESIGN_CSV, design)
    run.write_audit(sheet)
    return len(cells)


def score_audit(
    context: Context,
    reviewer: str,
    *,
    sheet: Path | None = None,
    partial: bool = False,
    ordinal: Mapping[str, Scale] | None = None,
) -> AuditScores:
    """Score every witness against all experts who answered blind, and add this sheet's answers to the ledger.

    Nothing is taken from a sheet with a fault; with `partial` the valid rows are, and the others are written to
    `audit_rejected.csv`. `ordinal` adds to the settings' `concepts.ordinal_groups`, and wins over them.
    """
    from annotation.trust.audit_sheet import AUDIT_EVIDENCE, check_sheet
    from annotation.trust.experts import disputed_cells, expert_agreement

    run = context.run
    filled, row_numbers = _text_cells(sheet or run.audit_path)
    vocabulary, design = run.vocabulary(), _design(run, filled)
    scales = _scales(context, ordinal or {}, vocabulary)
    reading = check_sheet(filled, accepted(run.read_images()), vocabulary, drawn=design, row_numbers=row_numbers)
    if not partial:
        reading.require((sheet or run.audit_path).name)
    answers = reading.judgements(reviewer, datetime.now(UTC))
    stored = evidence_of(run, set(design["image_id"]), vocabulary).judgements
    ledger = pd.concat([part for part in (stored, answers) if len(part)], ignore_index=True) if len(answers) else stored
    scores = _scored(context, design, ledger)
    blind = ledger[ledger["evidence"] == AUDIT_EVIDENCE]
    found = AuditScores(
        scores,
        expert_agreement(blind, vocabulary, scales),
        disputed_cells(blind),
        len(answers),
        len(reading.rejected),
    )
    write_csv(run.path / AUDIT_SCORES_CSV, scores)
    write_csv(run.path / AUDIT_EXPERTS_CSV, found.experts)
    write_csv(run.path / AUDIT_DISPUTED_CSV, found.disputed)
    write_csv(run.path / AUDIT_REJECTED_CSV, reading.rejected)
    run.append_judgements(_said_anew(answers, stored))
    return found


def _said_anew(answers: pd.DataFrame, stored: pd.DataFrame) -> pd.DataFrame:
    """The blind answers that differ from the same expert's last blind answer about the cell.

    What the expert corrected since then, seeing what the machine says, is another answer: it stands.
    """
    from annotation.trust.audit_sheet import AUDIT_EVIDENCE

    cell = ["image_id", "concept_id", "witness_model"]
    blind = stored[(stored["witness"] == Witness.EXPERT) & (stored["evidence"] == AUDIT_EVIDENCE)]
    last = blind.drop_duplicates(cell, keep="last")
    said = set(last[[*cell, "state"]].itertuples(index=False, name=None))
    return answers[[row not in said for row in answers[[*cell, "state"]].itertuples(index=False, name=None)]]


def _scales(context: Context, flags: Mapping[str, Scale], vocabulary: Vocabulary) -> dict[str, Scale]:
    """Group → scale, from the settings and the flags; raises `ConfigurationError` for what is no group here."""
    found = {**context.settings.concepts.ordinal_scales, **flags}
    for group in found:
        if group not in vocabulary.groups:
            key = f"--ordinal {group}" if group in flags else f"concepts.ordinal_groups: {group!r}"
            known = ", ".join(vocabulary.groups) or "none"
            raise ConfigurationError(f"{key}: expected a group of concepts of this run ({known}).")
    return found


def _scored(context: Context, design: pd.DataFrame, ledger: pd.DataFrame) -> pd.DataFrame:
    """Every witness and the fused labels against the experts' answers in `ledger`, on the drawn cells.

    Labels are fused as the run fuses them, but without experts: of the audited images, from reliabilities learned on
    them and on as many others as fusion learns from.
    """
    from annotation.trust.audit import answers_of, score

    run, vocabulary = context.run, context.run.vocabulary()
    audited = set(design["image_id"])
    labels = _unaided_labels(context, audited, vocabulary)
    here = labels[labels["image_id"].isin(audited)]
    alignment = evidence_of(run, audited, vocabulary).alignment
    return score(answers_of(ledger, design), ledger, alignment, here, vocabulary)


def _unaided_labels(context: Context, audited: set[str], vocabulary: Vocabulary) -> pd.DataFrame:
    """LABELS of the audited images, and of those that reliabilities are learned on, as without any expert."""
    from annotation.trust.audit import without_experts
    from annotation.trust.fuse import FuseOptions, fuse
    from annotation.trust.refuse import silenced

    settings = context.settings.labels
    options = FuseOptions.model_validate(settings.model_dump(include=set(FuseOptions.model_fields)))
    images = accepted(context.run.read_images())
    others = some_images(images.loc[images["split"] != Split.TEST, "image_id"], options.max_fit_images)
    learn_from = sorted(audited.union(others))
    found = evidence_of(context.run, learn_from, vocabulary)
    heard, scores = silenced(without_experts(found.judgements), found.alignment, refused_of(context.run))
    cuts = fit_alignment(context, heard, scores, vocabulary, learn_from=learn_from)
    return fuse(heard, scores, vocabulary, options, thresholds=cuts, learn_from=learn_from)


def _text_cells(path: Path) -> tuple[pd.DataFrame, list[int]]:
    """(cells as text, where each row stands in the file), whatever a spreadsheet did to the file."""
    if not path.is_file():
        raise InputRefused(f"{path}: expected the audit sheet, found none.", remedy="Make it: medmicn audit draw")
    sheet = read_sheet(path)
    cells = pd.DataFrame([cells for _, cells in sheet.rows], columns=list(sheet.header), dtype="str")
    cells.columns = [
        name.casefold() if name.casefold() in ("image_id", "concept_id", "answer") else name for name in sheet.header
    ]
    return cells, [number for number, _ in sheet.rows]


def _design(run: RunFolder, sheet: pd.DataFrame | None) -> pd.DataFrame:
    """How the cells were drawn: from `audit_design.csv`, which `audit draw` writes beside the sheet."""
    path = run.path / AUDIT_DESIGN_CSV
    if sheet is None or not path.is_file():
        raise InputRefused(
            f"{path}: expected how the cells of audit.csv were drawn, found nothing; nothing was imported.",
            remedy="Draw a sheet with `medmicn audit draw`; answers to other cells: `medmicn import-labels`.",
        )
    # As text: an id may look like a number.
    design = read_csv(path, as_text=True)
    return design.astype({"round": "int64", "inclusion_probability": "float64"})


def _still_needed(context: Context, design: pd.DataFrame) -> dict[str, float]:
    """Concept → how much is to be asked of it: the root of the cells that would settle it, 0 where it is settled."""
    from annotation.trust.audit import answers_of

    run = context.run
    ledger = evidence_of(run, set(design["image_id"]), run.vocabulary()).judgements
    if (answers_of(ledger, design)["answer"] == "").all():
        raise ConfigurationError(
            f"{run.audit_path}: no answer was taken yet, so nothing can be said of what is undecided.",
            remedy="Fill the sheet, then `medmicn audit score`.",
        )
    scores = _scored(context, design, ledger)
    fused = scores[scores["recommendation"].notna()].set_index("concept_id")["n_more_cells"].astype("float64")
    need = {str(concept): float(n) ** 0.5 for concept, n in fused.items() if n > 0}
    if not need:
        raise ConfigurationError("audit draw --more: every concept is settled, or lies on the limit itself.")
    return need
