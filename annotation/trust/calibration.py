"""How far stated probabilities can be taken at their word: Brier score, expected calibration error, reliability curve.

All are held against what experts answered, each cell standing for as many as it was drawn for. A vision-language
model that answers plainly states 1 or 0. The fused label is taken as it was before the expert's answer
(`calls.held_out_labels`). Intervals are by bootstrap over images, since the cells of one image err together.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from annotation.trust.agreement import proportion, sources_of
from annotation.votes import latest
from data_contracts.concepts import Vocabulary
from data_contracts.tables import Witness

Array = npt.NDArray[np.float64]

N_BINS = 10
"""Bins of equal width, as in scikit-learn's `calibration_curve`."""
ALL = "all"
"""`concept_id` of the rows over all concepts."""
CALIBRATION_COLUMNS = [
    *("source", "concept_id", "n", "ece", "ece_low", "ece_high", "brier", "brier_low", "brier_high", "note"),
]
RELIABILITY_COLUMNS = ["source", "bin", "n", "confidence", "observed", "low", "high"]
FEW_CELLS = 30
_N_DRAWS = 500
_UNKNOWN = "not known: no expert has answered a cell of which this source says how likely it is"


def stated_probabilities(
    cells: pd.DataFrame,
    judgements: pd.DataFrame,
    alignment: pd.DataFrame | pa.Table | None,
    held_out: pd.DataFrame,
    vocabulary: Vocabulary,
) -> pd.DataFrame:
    """source, image_id, concept_id, probability, true, weight of every audited cell and source that speaks of it.

    Sources are `witness:model`, `alignment` where it has a probability (a bare similarity is none), and `fused`. One
    that speaks of no audited cell has one row without any number, so that it is not forgotten.

    Args:
        cells: `expert_cells`.
        judgements: The ledger.
        alignment: ALIGNMENT columns, or None.
        held_out: `held_out_labels` of the cells.
        vocabulary: The concepts.
    """
    image_ids = np.asarray(pd.unique(cells["image_id"]), object)
    machine = latest(judgements[judgements["witness"] != Witness.EXPERT])
    row = pd.Index(image_ids).get_indexer(cells["image_id"])
    column = pd.Index(vocabulary.ids).get_indexer(cells["concept_id"])
    parts = []
    for name, source in sources_of(machine, alignment, held_out, image_ids, vocabulary).items():
        said = source.score
        if name == Witness.ALIGNMENT:
            said = np.where(np.isfinite(source.answers), said, np.nan)
        probability = said[row, column].astype(np.float64)
        spoken = cells.assign(source=name, probability=probability)[np.isfinite(probability)]
        parts.append(spoken if len(spoken) else pd.DataFrame({"source": [name]}))
    columns = ["source", "image_id", "concept_id", "probability", "true", "weight"]
    return pd.concat(parts, ignore_index=True).reindex(columns=columns)


def calibration_table(stated: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """`CALIBRATION_COLUMNS`: one row per source over all concepts, then one for each concept that was audited.

    `ece` is the mean distance of stated and observed shares over `N_BINS` bins, `brier` the mean squared error, both
    weighted; 95 % intervals. Chance alone makes an ECE of few cells large, which its interval takes off (basic
    bootstrap): it may lie below the number itself, and begins at 0 where probabilities that hold exactly would show as
    much (Bröcker and Smith, 2007). Numbers are NaN, with a `note`, where no expert answered.

    Args:
        stated: From `stated_probabilities`.
        seed: Of the bootstrap.
    """
    rows: list[dict[str, object]] = []
    for source, part in stated.groupby("source", sort=False):
        answered = part.dropna(subset=["probability"])
        rows.append(_row(str(source), ALL, answered, seed))
        rows += [_row(str(source), str(c), own, seed) for c, own in answered.groupby("concept_id", sort=False)]
    return pd.DataFrame(rows, columns=CALIBRATION_COLUMNS)


def reliability_table(stated: pd.DataFrame) -> pd.DataFrame:
    """`RELIABILITY_COLUMNS`: the reliability curve of every source over all concepts; no row where none is known.

    `bin` counts from 0, `n` cells fell into it, `confidence` is what was stated of them on average and `observed` how
    often the expert said present, with Wilson's 95 % interval on Kish's number of cells.
    """
    rows = []
    for source, part in stated.dropna(subset=["probability"]).groupby("source", sort=False):
        probability, true, weight = _columns(part)
        number = _bins(probability)
        for b in np.unique(number):
            here = number == b
            share = float(np.average(true[here], weights=weight[here]))
            n_effective = float(weight[here].sum() ** 2 / (weight[here] ** 2).sum())
            between = proportion(share * n_effective, n_effective)
            confidence = float(np.average(probability[here], weights=weight[here]))
            rows.append((source, int(b), int(here.sum()), confidence, share, between.low, between.high))
    return pd.DataFrame(rows, columns=RELIABILITY_COLUMNS)


def brier_score(probability: Array, true: Array, weight: Array) -> float:
    """Weighted mean of (probability - truth)²."""
    return float(np.average((probability - true) ** 2, weights=weight))


def expected_calibration_error(probability: Array, true: Array, weight: Array) -> float:
    """Weighted mean over bins of |mean probability - share of presence| (Naeini, Cooper and Hauskrecht, 2015)."""
    return float(_ece(probability, true, weight[None])[0])


def _row(source: str, concept_id: str, part: pd.DataFrame, seed: int) -> dict[str, object]:
    row: dict[str, object] = {"source": source, "concept_id": concept_id, "n": len(part)}
    if part.empty:
        return row | {"note": _UNKNOWN}
    probability, true, weight = _columns(part)
    drawn = weight * _draws(pd.factorize(part["image_id"])[0], seed)
    drawn = drawn[drawn.sum(1) > 0]
    error = (probability - true) ** 2
    brier = np.quantile((drawn * error).sum(1) / drawn.sum(1), (0.025, 0.975))
    ece = expected_calibration_error(probability, true, weight)
    high, low = 2 * ece - np.quantile(_ece(probability, true, drawn), (0.025, 0.975))
    low = 0.0 if ece <= _ece_by_chance(probability, weight, seed) else low
    row |= {"ece": ece, "ece_low": np.clip(low, 0, 1), "ece_high": np.clip(high, 0, 1)}
    row |= {"brier": brier_score(probability, true, weight), "brier_low": brier[0], "brier_high": brier[1]}
    return row | {"note": f"only {len(part)} cells: hardly known" if len(part) < FEW_CELLS else ""}


def _ece(probability: Array, true: Array, weights: Array) -> Array:
    """(D,) expected calibration error for each row of (D, n) weights."""
    inside = np.eye(N_BINS)[_bins(probability)]
    gap = np.abs((weights * (probability - true)) @ inside).sum(1)
    return np.asarray(gap / weights.sum(1), np.float64)


def _ece_by_chance(probability: Array, weight: Array, seed: int) -> float:
    """The ECE that only one in forty samples exceeds if every stated probability holds."""
    truths = np.random.default_rng(seed).random((_N_DRAWS, len(probability))) < probability
    gap = np.abs((weight * (probability - truths)) @ np.eye(N_BINS)[_bins(probability)]).sum(1)
    return float(np.quantile(gap / weight.sum(), 0.975))


def _bins(probability: Array) -> npt.NDArray[np.int64]:
    edges = np.linspace(0, 1, N_BINS + 1)
    return np.asarray(np.searchsorted(edges[1:-1], probability), np.int64)


def _draws(image: npt.NDArray[np.integer], seed: int) -> Array:
    """(D, n) how often each cell's image is drawn, with replacement."""
    n_images = int(image.max()) + 1
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_images, np.full(n_images, 1 / n_images), _N_DRAWS)[:, image].astype(np.float64)


def _columns(part: pd.DataFrame) -> tuple[Array, Array, Array]:
    probability, true, weight = (part[c].to_numpy(np.float64) for c in ("probability", "true", "weight"))
    return probability, true, weight
