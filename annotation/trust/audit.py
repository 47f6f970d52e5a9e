"""The expert audit: what an expert's answers say of every witness and every concept.

Which cells are asked is `annotation.trust.draw`; reading a filled sheet back `audit_sheet`; how cells are weighted
`sampling`; how sure the numbers are `intervals`.
"""

from __future__ import annotations

import math
from datetime import datetime
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from annotation.trust.agreement import FUSED, Agreement, Source, note_of, sources_of
from annotation.trust.audit_sheet import AUDIT_EVIDENCE, answer_of, check_sheet
from annotation.trust.intervals import Sample, audited
from annotation.trust.sampling import answered_weights
from annotation.votes import latest, matrix
from data_contracts.concepts import Vocabulary
from data_contracts.tables import State, Witness

_CELLS_OF_RARER_ANSWER = 5
_ON_THE_LIMIT = 0.01


class AuditOptions(BaseModel):
    """What answers decide."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep_kappa: float = Field(0.4, ge=0, le=1)
    """A concept is kept when its kappa is above this with 97.5 % certainty, dropped when as certainly below."""
    rethreshold_auroc: float = Field(0.75, ge=0.5, le=1)
    """A concept that fails on kappa but ranks images at least so well needs another threshold, not other answers."""


class Verdict(StrEnum):
    """What the audit advises for a concept."""

    KEEP = "keep"
    RETHRESHOLD = "rethreshold"
    ASK_AGAIN = "ask_again"
    DROP = "drop"


def read_audit(
    filled: pd.DataFrame, images: pd.DataFrame, vocabulary: Vocabulary, *, reviewer: str, created_at: datetime
) -> pd.DataFrame:
    """JUDGEMENTS of the answered cells, by `expert`; empty answers are left out.

    Raises:
        ContractViolation: Every fault found, with its row and column (the header is row 1); nothing is imported.
    """
    reading = check_sheet(filled, images, vocabulary)
    reading.require()
    return reading.judgements(reviewer, created_at)


def answers_of(judgements: pd.DataFrame, design: pd.DataFrame) -> pd.DataFrame:
    """The drawn cells with `answer`: what the experts who answered blind agree on, else empty.

    A cell that they decided differently has no answer here, and is for `experts.disputed_cells`.
    """
    standing = latest(
        judgements[(judgements["witness"] == Witness.EXPERT) & (judgements["evidence"] == AUDIT_EVIDENCE)]
    )
    decided = standing[standing["state"].isin([State.PRESENT, State.ABSENT])]
    by_cell = decided.groupby(["image_id", "concept_id"])["state"].agg(["nunique", "first"])
    agreed = by_cell.loc[by_cell["nunique"] == 1, "first"]
    keys = pd.MultiIndex.from_frame(design[["image_id", "concept_id"]])
    return design.assign(answer=agreed.reindex(keys).fillna("").to_numpy())


def score(
    audit: pd.DataFrame,
    judgements: pd.DataFrame,
    alignment: pd.DataFrame | pa.Table | None,
    labels: pd.DataFrame,
    vocabulary: Vocabulary,
    options: AuditOptions | None = None,
) -> pd.DataFrame:
    """One row per witness and concept: its agreement with the expert, with intervals, and a recommendation.

    Cells are weighted by the inverse of their inclusion probability, answered ones standing for the unanswered ones of
    their stratum. `recommendation`, its `reason` in words and `n_more_cells` stand on the rows of `fused`; the last is
    how many more answers would settle a concept that is still open, if its kappa stays (0: settled; none: no number
    will).

    Args:
        audit: The drawn cells of all rounds, with `DESIGN_COLUMNS` (round and stratum may be missing: one round, one
            stratum a concept) and answers.
        judgements: The ledger, of the audited images at least.
        alignment: ALIGNMENT columns of the audited images, or None.
        labels: LABELS of the audited images, fused from `without_experts` of the ledger: labels that know an expert's
            answer would be compared with themselves.
        vocabulary: The concepts and their order.
        options: Limits.
    """
    settings = options or AuditOptions()
    cells = answered_cells(audit, vocabulary)
    image_ids = np.asarray(pd.unique(cells["image_id"]), object)
    machine = without_experts(judgements)
    sources = sources_of(latest(machine), alignment, labels, image_ids, vocabulary)
    rows = []
    for name, source in sources.items():
        found = audited(samples_of(cells, source, image_ids, vocabulary))
        for concept_id, numbers in zip(vocabulary.ids, found, strict=True):
            row = {"witness": name, "concept_id": concept_id} | numbers.flat() | {"note": note_of(numbers)}
            rows.append(row | (advice(numbers, settings) if name == FUSED else {}))
    return pd.DataFrame(rows)


def without_experts(judgements: pd.DataFrame) -> pd.DataFrame:
    """What the machine, and the data set, said before any expert did."""
    return judgements[judgements["witness"] != Witness.EXPERT]


def answered_cells(audit: pd.DataFrame, vocabulary: Vocabulary) -> pd.DataFrame:
    """The cells whose answer is decided: image_id, concept_id, true (1 or 0), weight, stratum, open_fraction."""
    known = audit[audit["concept_id"].isin(vocabulary.ids)].reset_index(drop=True)
    design = pd.DataFrame(
        {
            "concept_id": known["concept_id"],
            "round": pd.to_numeric(known["round"]) if "round" in known else 1,
            "stratum": known["stratum"] if "stratum" in known else known["concept_id"],
            "inclusion_probability": known["inclusion_probability"].astype("float64"),
        }
    )
    state = known["answer"].astype("object").map(answer_of)
    true = state.map({State.PRESENT: 1.0, State.ABSENT: 0.0}).astype("float64")
    # An expert who looked and could not tell is an answer too: it stands for cells of which nobody could tell.
    looked = state.isin([State.PRESENT, State.ABSENT, State.UNCERTAIN]).to_numpy(bool)
    cells = pd.DataFrame(
        {
            "image_id": known["image_id"],
            "concept_id": known["concept_id"],
            "true": true,
            "weight": answered_weights(design, looked),
            "stratum": pd.factorize(design["round"].astype(str) + design["stratum"].astype(str))[0],
            "open_fraction": 1 - design["inclusion_probability"],
        }
    )
    return cells[cells["true"].notna()].reset_index(drop=True)


def samples_of(
    cells: pd.DataFrame, source: Source, image_ids: npt.NDArray[np.object_], vocabulary: Vocabulary
) -> list[Sample]:
    """One witness's cells of each concept, as far as both it and the expert answered."""
    columns = ("true", "weight", "stratum", "open_fraction")
    true, weight, stratum, left = (matrix(cells, c, image_ids, vocabulary).astype(np.float64) for c in columns)
    samples = []
    for k in range(len(vocabulary)):
        both = np.isfinite(true[:, k]) & np.isfinite(source.answers[:, k])
        samples.append(
            Sample(
                said=source.answers[both, k].astype(np.float64),
                true=true[both, k],
                weight=weight[both, k],
                stratum=stratum[both, k].astype(np.int64),
                open_fraction=left[both, k],
                score=source.score[both, k].astype(np.float64),
            )
        )
    return samples


def advice(found: Agreement, options: AuditOptions) -> dict[str, object]:
    """`recommendation`, `reason` in words and `n_more_cells` for a concept, by how its fused label agrees."""
    kappa, auroc, limit = found.kappa, found.auroc, options.keep_kappa
    between = f"kappa {kappa.value:.2f} (95 % {kappa.low:.2f} to {kappa.high:.2f}, {found.n} cells)"
    if math.isnan(kappa.value):
        seen = "no answered cell has a label" if not found.n else "the expert and the label gave one answer only"
        return _said(Verdict.ASK_AGAIN, f"{seen}: kappa cannot be told", _n_more_to_see(found))
    if kappa.low >= limit:
        return _said(Verdict.KEEP, f"{between} is surely at least {limit:.2f}", 0)
    if kappa.high < limit:
        ranks = f"AUROC {auroc.value:.2f} (from {auroc.low:.2f})"
        if auroc.low >= options.rethreshold_auroc:
            return _said(Verdict.RETHRESHOLD, f"{between} is surely below {limit:.2f}, but {ranks} ranks well", 0)
        return _said(Verdict.DROP, f"{between} is surely below {limit:.2f}, and {ranks} is no proof of good ranking", 0)
    n_more = _n_more(found, limit)
    if n_more is None:
        return _said(Verdict.ASK_AGAIN, f"{between} lies on {limit:.2f} itself: no number of cells settles that", None)
    return _said(Verdict.ASK_AGAIN, f"{between} does not tell whether it reaches {limit:.2f}", n_more)


def _said(verdict: Verdict, reason: str, n_more: int | None) -> dict[str, object]:
    return {"recommendation": str(verdict), "reason": reason, "n_more_cells": n_more}


def _n_more(found: Agreement, limit: float) -> int | None:
    """Cells still to ask until the interval, which shrinks with the root of their number, leaves the limit."""
    kappa = found.kappa
    distance = abs(kappa.value - limit)
    reach = kappa.value - kappa.low if kappa.value > limit else kappa.high - kappa.value
    if distance < _ON_THE_LIMIT:
        return None
    return max(math.ceil(found.n * ((reach / distance) ** 2 - 1)), 1)


def _n_more_to_see(found: Agreement) -> int:
    """Cells until the rarer answer may be expected a few times, by the most of it that the interval allows."""
    if not found.n:
        return 2 * _CELLS_OF_RARER_ANSWER
    # With none of n seen, up to about 3 / n of them may be there all the same.
    return math.ceil(_CELLS_OF_RARER_ANSWER * found.n / 3)
