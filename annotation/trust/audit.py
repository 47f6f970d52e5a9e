"""The expert audit: which cells to ask an expert, reading the answers back, and what they say of every witness."""

from __future__ import annotations

import math
from datetime import datetime
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from annotation.trust.agreement import FUSED, Interval, agreement, sources_of
from annotation.trust.fuse import FuseOptions, fuse
from annotation.votes import latest, matrix
from data_contracts.concepts import Vocabulary
from data_contracts.errors import ContractViolation
from data_contracts.tables import Split, State, Witness

COLUMNS = ["image_id", "path", "concept_id", "concept", "definition", "answer", "stratum", "inclusion_probability"]
_ANSWERS = {
    **dict.fromkeys(("1", "1.0", "present", "yes", "y", "true", "x"), State.PRESENT),
    **dict.fromkeys(("0", "0.0", "absent", "no", "n", "false"), State.ABSENT),
    **dict.fromkeys(("?", "uncertain", "unsure", "unclear"), State.UNCERTAIN),
    **dict.fromkeys(("not_assessed", "skip"), State.NOT_ASSESSED),
}
_BANDS = (0.35, 0.65)


class AuditOptions(BaseModel):
    """How cells are drawn, and what their answers decide."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_cells: int = Field(200, ge=1)
    """Cells the expert is asked to fill."""
    seed: int = 0
    """Decides the draw."""
    splits: tuple[Split, ...] = (Split.TRAIN, Split.VAL)
    """Splits drawn from. The test split stays out: an expert's answer becomes part of the labels."""
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


def draw(labels: pd.DataFrame, images: pd.DataFrame, vocabulary: Vocabulary, options: AuditOptions) -> pd.DataFrame:
    """The cells for an expert to fill: `COLUMNS`, `answer` empty, in random order.

    Cells are stratified by concept and by what the machine believes (absent, unsure, present), spread over classes
    within each stratum; every stratum is drawn at random with a known probability, so that all statistics can be
    estimated without bias. The rows do not show the machine's answer: strata have arbitrary numbers. Cells that a
    person decided are not drawn.
    """
    cells = _population(labels, images, vocabulary, options)
    rng = np.random.default_rng(options.seed)
    sizes = cells.groupby("band", sort=False).size()
    taken = _allocated(sizes.to_numpy(), min(options.n_cells, len(cells)), rng)
    quota = dict(zip(sizes.index, taken, strict=True))
    parts = [_systematic(group, quota[band], rng) for band, group in cells.groupby("band", sort=False)]
    drawn = pd.concat(parts) if parts else cells.assign(inclusion_probability=1.0)
    number = dict(zip(sizes.index, rng.permutation(len(sizes)), strict=True))
    concepts = {c.concept_id: c for c in vocabulary}
    shuffled = drawn.sample(frac=1, random_state=options.seed)
    result = shuffled.assign(
        concept=[concepts[c].name for c in shuffled["concept_id"]],
        definition=[concepts[c].definition for c in shuffled["concept_id"]],
        answer="",
        stratum=[f"s{number[b]:03d}" for b in shuffled["band"]],
    )
    return result[COLUMNS].reset_index(drop=True)


def read_audit(
    filled: pd.DataFrame, images: pd.DataFrame, vocabulary: Vocabulary, *, reviewer: str, created_at: datetime
) -> pd.DataFrame:
    """JUDGEMENTS of the answered cells, by `expert`; empty answers are left out.

    Raises:
        ContractViolation: Every fault found, with its row and column (the header is row 1); nothing is imported.
    """
    missing = [name for name in ("image_id", "concept_id", "answer") if name not in filled]
    if missing:
        raise ContractViolation("audit.csv", [f"column {name!r} is missing" for name in missing])
    answer = filled["answer"].astype("object").map(_normalised)
    faults = [
        *_unknown(filled, "image_id", set(images["image_id"])),
        *_unknown(filled, "concept_id", set(vocabulary.ids)),
        *(
            f"row {row + 2}, column 'answer': expected present, absent, uncertain or nothing, got {text!r}"
            for row, text in enumerate(answer)
            if text and text not in _ANSWERS
        ),
        *_contradictions(filled, answer),
    ]
    if faults:
        raise ContractViolation(
            "audit.csv", faults, remedy="Nothing was imported; correct these cells and give the same command again."
        )
    answered = filled[answer != ""].reset_index(drop=True)
    return pd.DataFrame(
        {
            "image_id": answered["image_id"],
            "concept_id": answered["concept_id"],
            "witness": str(Witness.EXPERT),
            "witness_model": reviewer,
            "prompt_sha256": None,
            "state": [str(_ANSWERS[text]) for text in answer[answer != ""]],
            "probability": np.nan,
            "evidence": "audit",
            "request_id": None,
            "created_at": pd.Timestamp(created_at),
            "supersedes": None,
        }
    )


def score(
    audit: pd.DataFrame,
    judgements: pd.DataFrame,
    alignment: pd.DataFrame | pa.Table | None,
    vocabulary: Vocabulary,
    options: AuditOptions | None = None,
    fuse_options: FuseOptions | None = None,
) -> pd.DataFrame:
    """One row per witness and concept: its agreement with the expert, with intervals, and a recommendation.

    Fused labels are made anew without the expert's own answers, or they would be compared with themselves. Cells are
    weighted by the inverse of their inclusion probability. `recommendation` stands on the rows of `fused`;
    `n_more_cells` is how many more answers would settle a concept that is still open, if its kappa stays.

    Args:
        audit: The drawn cells with their `inclusion_probability` and answers.
        judgements: The ledger.
        alignment: ALIGNMENT columns, or None.
        vocabulary: The concepts and their order.
        options: Limits.
        fuse_options: How labels are fused.
    """
    settings = options or AuditOptions()
    machine = judgements[judgements["witness"] != Witness.EXPERT]
    labels = fuse(machine, alignment, vocabulary, fuse_options)
    image_ids = np.asarray(pd.unique(audit["image_id"]), object)
    true, weight = _audited(audit, image_ids, vocabulary)
    sources = sources_of(latest(machine), alignment, labels, image_ids, vocabulary)
    rows = [
        {"witness": name, "concept_id": concept_id}
        | (found := agreement(source.answers[:, k], true[:, k], source.score[:, k], weight[:, k])).flat()
        | (_advice(found.kappa, found.auroc, found.n, settings) if name == FUSED else {})
        for name, source in sources.items()
        for k, concept_id in enumerate(vocabulary.ids)
    ]
    return pd.DataFrame(rows)


def _population(
    labels: pd.DataFrame, images: pd.DataFrame, vocabulary: Vocabulary, options: AuditOptions
) -> pd.DataFrame:
    """image_id, path, concept_id, label and band of every cell that may be drawn."""
    usable = images[images["rejected"].isna() & (images["split"].isna() | images["split"].isin(options.splits))]
    cells = labels[~labels["decided_by"].isin([Witness.EXPERT, Witness.GIVEN])]
    cells = cells[cells["concept_id"].isin(vocabulary.ids)].merge(usable[["image_id", "path", "label"]], on="image_id")
    band = np.digitize(cells["probability"], _BANDS)
    return cells.assign(band=cells["concept_id"] + "/" + band.astype(str))[
        ["image_id", "path", "concept_id", "label", "band"]
    ]


def _allocated(sizes: npt.NDArray[np.int64], n_cells: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """How many cells of each stratum: in proportion to the root of its size, never more than it has.

    The root asks more of small strata than their share: rare answers are where precision and recall are decided.
    """
    taken = np.zeros(len(sizes), np.int64)
    order = rng.permutation(len(sizes))
    for _ in range(n_cells):
        # The stratum that is furthest behind its share; ties in random order.
        need = np.where(taken < sizes, (taken + 0.5) / np.sqrt(sizes), np.inf)
        taken[order[need[order].argmin()]] += 1
    return taken


def _systematic(group: pd.DataFrame, n_taken: int, rng: np.random.Generator) -> pd.DataFrame:
    """`n_taken` cells of a stratum at equal probability, spread over its classes."""
    shuffled = group.sample(frac=1, random_state=rng).sort_values("label", kind="stable", na_position="last")
    rows = ((rng.uniform(0, 1) + np.arange(n_taken)) * (len(group) / max(n_taken, 1))).astype(int)
    return shuffled.iloc[rows].assign(inclusion_probability=n_taken / len(group))


def _normalised(value: object) -> str:
    """An answer cell as lower-case text; empty for what spreadsheets make of nothing."""
    return "" if pd.isna(value) else str(value).strip().lower()


def _unknown(filled: pd.DataFrame, column: str, known: set[str]) -> list[str]:
    return [
        f"row {row + 2}, column {column!r}: {str(value)[:40]!r} is not in this run"
        for row, value in enumerate(filled[column])
        if value not in known
    ]


def _contradictions(filled: pd.DataFrame, answer: pd.Series) -> list[str]:
    """Cells that are listed twice with different answers."""
    answered = filled.assign(answer=answer)[answer != ""]
    answered["answer"] = [_ANSWERS.get(text, text) for text in answered["answer"]]
    kinds = answered.groupby(["image_id", "concept_id"])["answer"].nunique()
    return [f"image {str(i)[:12]}…, concept {c!r}: answered twice, differently" for i, c in kinds.index[kinds > 1]]


def _audited(
    audit: pd.DataFrame, image_ids: npt.NDArray[np.object_], vocabulary: Vocabulary
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(answers, weights), both (N, K), NaN where not audited or not decided."""
    state = audit["answer"].astype("object").map(_normalised).map(_ANSWERS)
    present = state.map({State.PRESENT: 1.0, State.ABSENT: 0.0}).astype("float64")
    filled = audit.assign(present=present, weight=1 / audit["inclusion_probability"].astype("float64"))
    return (
        matrix(filled, "present", image_ids, vocabulary).astype(np.float64),
        matrix(filled, "weight", image_ids, vocabulary).astype(np.float64),
    )


def _advice(kappa: Interval, auroc: Interval, n_cells: int, options: AuditOptions) -> dict[str, object]:
    if math.isnan(kappa.value):
        return {"recommendation": str(Verdict.ASK_AGAIN), "n_more_cells": None}
    if kappa.low >= options.keep_kappa:
        verdict = Verdict.KEEP
    elif kappa.high < options.keep_kappa:
        verdict = Verdict.RETHRESHOLD if auroc.low >= options.rethreshold_auroc else Verdict.DROP
    else:
        return {"recommendation": str(Verdict.ASK_AGAIN), "n_more_cells": _n_more(kappa, n_cells, options.keep_kappa)}
    return {"recommendation": str(verdict), "n_more_cells": 0}


def _n_more(kappa: Interval, n_cells: int, limit: float) -> int | None:
    """Cells still to ask until the interval, which shrinks with the root of their number, leaves the limit."""
    distance = abs(kappa.value - limit)
    reach = (kappa.high - kappa.low) / 2
    if distance < 0.01:
        return None  # on the limit itself no number of cells settles it
    return max(math.ceil(n_cells * ((reach / distance) ** 2 - 1)), 1)
