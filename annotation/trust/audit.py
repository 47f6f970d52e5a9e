"""The expert audit: which cells to ask an expert, and what the answers say of every witness and every concept.

Reading a filled sheet back is `annotation.trust.audit_sheet`; how cells are drawn and weighted `sampling`; how sure the
numbers are `intervals`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from annotation.trust.agreement import FUSED, Agreement, Source, note_of, sources_of
from annotation.trust.audit_sheet import AUDIT_EVIDENCE, answer_of, check_sheet
from annotation.trust.fuse import FuseOptions, fuse
from annotation.trust.intervals import Sample, audited
from annotation.trust.sampling import allocated, answered_weights, inclusion, systematic
from annotation.votes import latest, matrix
from data_contracts.concepts import Vocabulary
from data_contracts.tables import Split, State, Witness

SHEET_COLUMNS = ["image_id", "path", "concept_id", "concept", "definition", "answer"]
"""What an expert sees; nothing in it depends on what the machine said of the cell."""
DESIGN_COLUMNS = ["image_id", "concept_id", "round", "stratum", "inclusion_probability"]
"""How a cell was drawn; kept apart from the sheet, because likely cells and unlikely ones differ in these."""
COLUMNS = [*SHEET_COLUMNS, "round", "stratum", "inclusion_probability"]
_BANDS = (0.35, 0.65)
_LEAST_INFORMATION = 0.02
_CELLS_OF_RARER_ANSWER = 5
_ON_THE_LIMIT = 0.01


class AuditOptions(BaseModel):
    """How cells are drawn, and what their answers decide."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_cells: int = Field(200, ge=1)
    """Cells the expert is asked to fill."""
    seed: int = 0
    """Decides the draw."""
    splits: tuple[Split, ...] = (Split.TRAIN, Split.VAL)
    """Splits drawn from. The test split stays out: an expert's answer becomes part of the labels."""
    even_share: float = Field(0.5, gt=0, le=1)
    """Share of the cells that is drawn evenly within a stratum; the rest goes where an answer would change most. It
    bounds every weight: no cell stands for more than 1 / `even_share` times what it would stand for in an even draw."""
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


def draw(
    labels: pd.DataFrame,
    images: pd.DataFrame,
    vocabulary: Vocabulary,
    options: AuditOptions,
    *,
    asked: pd.DataFrame | None = None,
    need: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """The cells for an expert to fill: `COLUMNS`, `answer` empty, in random order.

    Cells are stratified by concept and by what the machine believes (absent, unsure, present) and spread over classes
    within each stratum. `even_share` of a stratum's probability is even; the rest is in proportion to how much an
    answer would change: the entropy of the fused probability and how far the witnesses disagree. So every cell has a
    known, positive probability, and weights of its inverse undo the choice (see `sampling` for several rounds).
    Cells that a person decided are not drawn.

    Args:
        labels: LABELS.
        images: IMAGES.
        vocabulary: The concepts.
        options: Size, seed and shares.
        asked: Cells of earlier rounds (`DESIGN_COLUMNS`): they are never asked again, and the new rows are the next
            round's.
        need: How much is to be asked of each concept, beside the others; 0 for nothing. All alike if None.
    """
    cells = _population(labels, images, vocabulary, options, asked)
    round_number = 1 if asked is None or asked.empty else int(asked["round"].max()) + 1
    rng = np.random.default_rng([options.seed, round_number])
    code, sizes = cells["code"].to_numpy(np.int64), np.bincount(cells["code"], minlength=3 * len(vocabulary))
    information = cells["information"].to_numpy(np.float64)
    quota = allocated(_measure(code, sizes, information, vocabulary, need, options), sizes, options.n_cells, rng)
    rows, probability = _drawn(cells, sizes, quota, options, rng)
    number = rng.permutation(len(sizes))
    shuffle = rng.permutation(len(rows))
    drawn = cells.iloc[rows[shuffle]]
    return pd.DataFrame(
        {
            "image_id": drawn["image_id"].to_numpy(),
            "path": drawn["path"].to_numpy(),
            "concept_id": drawn["concept_id"].to_numpy(),
            "concept": [vocabulary[c].name for c in drawn["concept_id"]],
            "definition": [vocabulary[c].definition for c in drawn["concept_id"]],
            "answer": pd.Series([""] * len(drawn), dtype="str"),
            "round": round_number,
            "stratum": pd.Series([f"r{round_number}-s{number[c]:03d}" for c in drawn["code"]], dtype="str"),
            "inclusion_probability": probability[shuffle],
        },
        columns=COLUMNS,
    )


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
    vocabulary: Vocabulary,
    options: AuditOptions | None = None,
    fuse_options: FuseOptions | None = None,
) -> pd.DataFrame:
    """One row per witness and concept: its agreement with the expert, with intervals, and a recommendation.

    Fused labels are made anew without the expert's own answers, or they would be compared with themselves. Cells are
    weighted by the inverse of their inclusion probability, answered ones standing for the unanswered ones of their
    stratum. `recommendation`, its `reason` in words and `n_more_cells` stand on the rows of `fused`; the last is how
    many more answers would settle a concept that is still open, if its kappa stays (0: settled; none: no number will).

    Args:
        audit: The drawn cells of all rounds, with `DESIGN_COLUMNS` (round and stratum may be missing: one round, one
            stratum a concept) and answers.
        judgements: The ledger.
        alignment: ALIGNMENT columns, or None.
        vocabulary: The concepts and their order.
        options: Limits.
        fuse_options: How labels are fused.
    """
    settings = options or AuditOptions()
    machine = judgements[judgements["witness"] != Witness.EXPERT]
    labels = fuse(machine, alignment, vocabulary, fuse_options)
    cells = answered_cells(audit, vocabulary)
    image_ids = np.asarray(pd.unique(cells["image_id"]), object)
    sources = sources_of(latest(machine), alignment, labels, image_ids, vocabulary)
    rows = []
    for name, source in sources.items():
        found = audited(samples_of(cells, source, image_ids, vocabulary))
        for concept_id, numbers in zip(vocabulary.ids, found, strict=True):
            row = {"witness": name, "concept_id": concept_id} | numbers.flat() | {"note": note_of(numbers)}
            rows.append(row | (advice(numbers, settings) if name == FUSED else {}))
    return pd.DataFrame(rows)


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


def _population(
    labels: pd.DataFrame,
    images: pd.DataFrame,
    vocabulary: Vocabulary,
    options: AuditOptions,
    asked: pd.DataFrame | None,
) -> pd.DataFrame:
    """image_id, path, concept_id, class_code, information and code (3 × concept + band) of every cell to draw from."""
    usable = images[images["rejected"].isna() & (images["split"].isna() | images["split"].isin(options.splits))]
    place = pd.Index(usable["image_id"]).get_indexer(labels["image_id"])
    concept = pd.Index(vocabulary.ids).get_indexer(labels["concept_id"])
    by_person = labels["decided_by"].isin([Witness.EXPERT, Witness.GIVEN]).to_numpy(bool)
    open_rows = np.flatnonzero((place >= 0) & (concept >= 0) & ~by_person)
    if asked is not None and len(asked):
        done = pd.MultiIndex.from_frame(asked[["image_id", "concept_id"]].astype("object"))
        candidates = open_rows[labels["image_id"].iloc[open_rows].isin(asked["image_id"]).to_numpy(bool)]
        keys = pd.MultiIndex.from_frame(labels.iloc[candidates][["image_id", "concept_id"]].astype("object"))
        open_rows = np.setdiff1d(open_rows, candidates[keys.isin(done)])
    probability = np.clip(labels["probability"].to_numpy(np.float64)[open_rows], 0, 1)
    disagreement = labels["disagreement"].to_numpy(np.float64)[open_rows] if "disagreement" in labels else 0.0
    image = place[open_rows]
    classes = usable["label"].astype("object").fillna("").astype("category").cat.codes.to_numpy()
    return pd.DataFrame(
        {
            "image_id": usable["image_id"].to_numpy()[image],
            "path": usable["path"].to_numpy()[image],
            "concept_id": np.asarray(vocabulary.ids, object)[concept[open_rows]],
            "class_code": classes[image],
            "information": (_entropy(probability) + disagreement) / 2 + _LEAST_INFORMATION,
            "code": 3 * concept[open_rows] + np.digitize(probability, _BANDS),
        }
    )


def _measure(
    code: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    information: npt.NDArray[np.float64],
    vocabulary: Vocabulary,
    need: Mapping[str, float] | None,
    options: AuditOptions,
) -> npt.NDArray[np.float64]:
    """How much is to be asked of each stratum, beside the others.

    The root of its size asks more of small strata than their share: rare answers are where precision and recall are
    decided. Times how much its cells tell, and how much its concept needs.
    """
    mean = np.bincount(code, information, minlength=len(sizes)) / np.maximum(sizes, 1)
    overall = information.mean() if len(information) else 1.0
    wanted = np.array([1.0 if need is None else max(need.get(c, 0.0), 0.0) for c in vocabulary.ids])
    worth = options.even_share + (1 - options.even_share) * mean / overall
    return np.asarray(np.sqrt(sizes) * worth * np.repeat(wanted, 3), np.float64)


def _drawn(
    cells: pd.DataFrame,
    sizes: npt.NDArray[np.int64],
    quota: npt.NDArray[np.int64],
    options: AuditOptions,
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Row numbers of the drawn cells, and their inclusion probabilities."""
    # Sorted by class within a stratum, in random order within a class: a systematic draw then spreads over classes.
    order = np.lexsort((rng.random(len(cells)), cells["class_code"], cells["code"]))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    information = cells["information"].to_numpy(np.float64)
    rows, probabilities = [np.zeros(0, np.int64)], [np.zeros(0)]
    for stratum in np.flatnonzero(quota):
        members = order[starts[stratum] : starts[stratum + 1]]
        told = information[members]
        size = options.even_share / len(members) + (1 - options.even_share) * told / told.sum()
        probability = inclusion(size, int(quota[stratum]))
        hit = systematic(probability, rng, int(quota[stratum]), len(members)) > 0
        rows.append(members[hit])
        probabilities.append(probability[hit])
    return np.concatenate(rows), np.concatenate(probabilities)


def _entropy(probability: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """In bits."""
    inside = np.clip(probability, 1e-12, 1 - 1e-12)
    return np.asarray(-inside * np.log2(inside) - (1 - inside) * np.log2(1 - inside), np.float64)
