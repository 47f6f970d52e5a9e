"""Honesty tests: does a concept's score follow the concept, or would any score do as well?

The same images are scored by controls that ought to know less: prompts that name nothing, the denied concept, other
concepts, and, where heads were fitted to judgements, heads fitted in the same way to judgements that were dealt out
to other images. Without the last one the test would be vacuous: a fitted head beats any text. A concept whose
score does not separate judged-present from judged-absent images better than every deciding control may not label.

The class is a control for information only: the sign of one disease is no less visible for it. What the class
explains is the leak test's matter (see `leaks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from annotation.alignment.nulls import Null, NullKind
from annotation.trust.agreement import Z_95
from annotation.trust.pairs import Pairs, count_pairs

COLUMNS = (
    "concept_id",
    "null",
    "n",
    "auroc",
    "null_auroc",
    "difference",
    "difference_low",
    "difference_high",
    "decides",
    "verdict",
    "n_needed",
)
"""Of the table that `honesty_table` gives."""

_SAID = {
    NullKind.NULL_PROMPT: "a prompt that names nothing reaches",
    NullKind.NEGATION: "the denied concept reaches",
    NullKind.SHUFFLED: "other concepts' scores reach",
    NullKind.PERMUTATION: "heads fitted to judgements of other images reach",
    NullKind.CLASS_NAME: "the class alone reaches",
}


class Verdict(StrEnum):
    """What came out for one concept."""

    PASSES = "passes"
    FAILS = "fails"
    TOO_FEW = "too_few"
    """Too few judged images to tell: neither shown to be honest nor to be not."""


class HonestyOptions(BaseModel):
    """When a concept's score beats its nulls."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    margin: float = Field(0.02, ge=0, le=0.5)
    """AUROC by which a score must beat its null; the difference's 95 % interval must be above 0 as well."""
    max_reach: float = Field(0.075, gt=0, le=0.5)
    """A difference known no better than ± this fails no concept: there are too few judged images to tell."""


class NullPairs(NamedTuple):
    """Pairs of one null over all concepts."""

    kind: NullKind
    decides: bool
    pairs: Pairs
    z_squares: float = 0.0
    """Sum of squared z of an exchangeable null's own areas against 1/2."""
    n_z: int = 0

    @property
    def inflation(self) -> float:
        """How many times wider than DeLong's intervals must be, at least 1.

        His variance takes a head as given. Cross-fitted heads share judgements across folds, so their areas stray
        further; the areas of heads that have nothing to find show how far.
        """
        return max(1.0, (self.z_squares / self.n_z) ** 0.5) if self.n_z else 1.0


Counts = list[NullPairs]
"""Pairs of every null, in their order; those of shards add up with `added`."""


def count_nulls(
    own: npt.NDArray[np.floating],
    answers: npt.NDArray[np.floating],
    nulls: Sequence[Null],
    *,
    strata: npt.NDArray[np.integer] | None = None,
    groups: npt.NDArray[np.integer] | None = None,
) -> Counts:
    """Pairs of (n, K) scores and each null over (n, K) answers (1, 0 or NaN), of one shard; see `count_pairs`."""
    return [_counted(own, answers, null, strata, groups) for null in nulls]


def _counted(
    own: npt.NDArray[np.floating],
    answers: npt.NDArray[np.floating],
    null: Null,
    strata: npt.NDArray[np.integer] | None,
    groups: npt.NDArray[np.integer] | None,
) -> NullPairs:
    pairs = count_pairs(
        own, answers, null.scores, null.answers, strata=strata, groups=groups, pool_null=null.exchangeable
    )
    if not null.exchangeable:
        return NullPairs(null.kind, null.decides, pairs)
    said = [answers] * len(null.scores) if null.answers is None else list(null.answers)
    z = [_z(count_pairs(s, a, strata=strata, groups=groups)) for s, a in zip(null.scores, said, strict=True)]
    known = np.concatenate(z)[np.isfinite(np.concatenate(z))]
    return NullPairs(null.kind, null.decides, pairs, float((known**2).sum()), len(known))


def _z(pairs: Pairs) -> npt.NDArray[np.float64]:
    """(K,) distance of each area from 1/2 in standard deviations."""
    value, low, high = pairs.interval((1, 0)).T
    with np.errstate(invalid="ignore", divide="ignore"):
        return (value - 0.5) / ((high - low) / (2 * Z_95))


def added(first: Counts, second: Counts) -> Counts:
    """The counts of two shards together; their nulls stand in the same order."""
    return [
        NullPairs(one.kind, one.decides, one.pairs + other.pairs, one.z_squares + other.z_squares, one.n_z + other.n_z)
        for one, other in zip(first, second, strict=True)
    ]


def honesty_table(counts: Counts, concept_ids: Sequence[str], options: HonestyOptions | None = None) -> pd.DataFrame:
    """One row per concept and kind of null (the strongest of its kind); columns as `COLUMNS`.

    AUROCs are over judged-present against judged-absent images within strata; the interval of the difference is
    DeLong's, over groups of images that belong together, as much wider as an exchangeable null shows to be needed.
    """
    settings = options or HonestyOptions()
    rows = [row for null in counts for row in _rows(null, concept_ids, settings)]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    # Nulls of one kind, such as several prompts, are alternatives: the concept must beat the strongest.
    strongest = table.sort_values("difference_low", kind="stable", na_position="first").drop_duplicates(
        ["concept_id", "null"]
    )
    return table.loc[strongest.index.sort_values()].reset_index(drop=True)


def verdicts(table: pd.DataFrame) -> dict[str, Verdict]:
    """Concept id → what came out over all deciding nulls of an `honesty_table`."""
    result: dict[str, Verdict] = {}
    for concept_id, rows in table.groupby("concept_id", sort=False):
        found = set(rows.loc[rows["decides"].astype(bool), "verdict"])
        worst = next((v for v in (Verdict.FAILS, Verdict.TOO_FEW) if v in found), Verdict.PASSES)
        result[str(concept_id)] = worst
    return result


def refusals(table: pd.DataFrame, names: Mapping[str, str] | None = None) -> dict[str, str]:
    """Concept id → why it may not label, in words, for the concepts that fail; the null it is furthest below speaks."""
    failed = table[table["decides"].astype(bool) & (table["verdict"] == Verdict.FAILS)]
    worst = failed.sort_values("difference", kind="stable").drop_duplicates("concept_id")
    return {str(row["concept_id"]): _sentence(row, names or {}) for row in worst.to_dict("records")}


def _rows(null: NullPairs, concept_ids: Sequence[str], options: HonestyOptions) -> list[dict[str, object]]:
    pairs = null.pairs
    areas, difference = pairs.areas, pairs.interval((1, -1))
    difference[:, 1:] = difference[:, :1] + null.inflation * (difference[:, 1:] - difference[:, :1])
    return [
        {
            "concept_id": concept_id,
            "null": str(null.kind),
            "n": int(pairs.n[k]),
            "auroc": float(areas[k, 0]),
            "null_auroc": float(areas[k, 1]),
            "difference": float(difference[k, 0]),
            "difference_low": float(difference[k, 1]),
            "difference_high": float(difference[k, 2]),
            "decides": null.decides,
            "verdict": str(_verdict(difference[k], options)),
            "n_needed": _n_needed(difference[k], int(pairs.n[k]), options),
        }
        for k, concept_id in enumerate(concept_ids)
    ]


def _verdict(difference: npt.NDArray[np.float64], options: HonestyOptions) -> Verdict:
    value, low, high = difference
    if value >= options.margin and low > 0:
        return Verdict.PASSES
    # Where it is not a number (one answer throughout, or none) nothing can be told either.
    return Verdict.FAILS if (high - low) / 2 <= options.max_reach else Verdict.TOO_FEW


def _n_needed(difference: npt.NDArray[np.float64], n: int, options: HonestyOptions) -> float:
    """Judged images after which the difference would be known well enough to tell, 0 where it is; NaN if unknown."""
    _, low, high = difference
    if not np.isfinite(high - low):
        return float("nan")
    if _verdict(difference, options) != Verdict.TOO_FEW:
        return 0.0
    return float(np.ceil(n * ((high - low) / (2 * options.max_reach)) ** 2))


def untested(table: pd.DataFrame, names: Mapping[str, str] | None = None) -> dict[str, str]:
    """Concept id → why nothing can be told of its honesty, and how many judged images it would take, in words."""
    open_ones = table[table["decides"].astype(bool) & (table["verdict"] == Verdict.TOO_FEW)]
    failed = set(table.loc[table["decides"].astype(bool) & (table["verdict"] == Verdict.FAILS), "concept_id"])
    open_ones = open_ones[~open_ones["concept_id"].isin(failed)]
    # The null that asks for the most images speaks; where no number can be told, that is the first thing to say.
    first = open_ones.sort_values("n_needed", ascending=False, na_position="first", kind="stable")
    rows = first.drop_duplicates("concept_id").to_dict("records")
    return {str(row["concept_id"]): _untold(row, names or {}) for row in rows}


def _untold(row: Mapping[str, object], names: Mapping[str, str]) -> str:
    concept_id, n = str(row["concept_id"]), row["n"]
    name = f"concept {names.get(concept_id, concept_id)!r}"
    if np.isnan(float(str(row["n_needed"]))):
        return (
            f"{name}: its honesty could not be tested, because its {n} judged images do not hold both answers, or too "
            "few of one; it labels untested."
        )
    reach = (float(str(row["difference_high"])) - float(str(row["difference_low"]))) / 2
    return (
        f"{name}: its honesty could not be tested; on {n} judged images the difference from what "
        f"{_SAID[NullKind(str(row['null']))]} is known to "
        f"± {reach:.2f} only. About {float(str(row['n_needed'])):.0f} judged images would tell; it labels untested."
    )


def _sentence(row: Mapping[str, object], names: Mapping[str, str]) -> str:
    concept_id = str(row["concept_id"])
    return (
        f"concept {names.get(concept_id, concept_id)!r}: expected its score to tell judged-present from judged-absent "
        f"images better than its nulls do, got AUROC {row['auroc']:.2f} where {_SAID[NullKind(str(row['null']))]} "
        f"{row['null_auroc']:.2f} (difference {row['difference']:+.3f}, 95 % interval {row['difference_low']:+.3f} to "
        f"{row['difference_high']:+.3f}, {row['n']} images); it may not label."
    )
