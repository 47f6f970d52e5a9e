"""Where fused probabilities become calls: the abstain band of every concept, held against what experts answered."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.special import logit

from annotation.trust.cuts import PROBABILITY, Cuts
from annotation.trust.fitted_cuts import Asked, Curve, cell_scores, fitted_cuts, held_cuts
from annotation.trust.fuse import FuseOptions, LearnedFusion, learn_fusion
from annotation.trust.gather import Voter
from annotation.votes import alignment_scores
from data_contracts.concepts import Vocabulary
from data_contracts.tables import Witness

EXPECTED = "expected"
"""Method of calls that no expert corrected: the fused probabilities themselves say how right they are."""
CHOSEN = "chosen"
"""Method of calls by the abstain band of the options, where no precision was asked for."""
_CERTAIN = 1e-6


class HeldOut(NamedTuple):
    """What is needed to make labels again without some experts' answers."""

    judgements: pd.DataFrame
    """The ledger, or a sample that holds every audited image."""
    alignment: pd.DataFrame | pa.Table | None
    thresholds: Cuts | None = None
    learn_from: Collection[str] | None = None
    voters: tuple[Voter, ...] | None = None


def held_out_labels(tables: HeldOut, vocabulary: Vocabulary, options: FuseOptions, cells: pd.DataFrame) -> pd.DataFrame:
    """LABELS of the audited images, fused and learned as ever, but without any expert's answer on their own fold.

    So the fused label can be held against an expert who had no part in it, though experts corrected the fusion.

    Args:
        tables: What the labels are made from.
        vocabulary: The concepts.
        options: How labels are fused.
        cells: `expert_cells`.
    """
    judgements, scores = tables.judgements, alignment_scores(tables.alignment)
    by_expert = judgements["witness"] == Witness.EXPERT
    parts = []
    for fold in np.unique(cells["fold"]):
        image_ids = cells.loc[cells["fold"] == fold, "image_id"].unique()
        here = judgements["image_id"].isin(image_ids)
        learned = learn_fusion(
            judgements[~(by_expert & here)],
            scores,
            vocabulary,
            options,
            thresholds=tables.thresholds,
            learn_from=tables.learn_from,
            voters=tables.voters,
        )
        parts.append(learned.labels(judgements[here & ~by_expert], scores[scores["image_id"].isin(image_ids)]))
    if not parts:
        return learn_fusion(judgements.iloc[:0], None, vocabulary, options).labels(judgements.iloc[:0], None)
    return pd.concat(parts, ignore_index=True)


def fit_calls(learned: LearnedFusion, cells: pd.DataFrame, held_out: pd.DataFrame) -> Cuts:
    """The fused label's cuts of every concept, with their quality: `calls` of a `LearnedFusion`.

    Where a precision is asked for and experts answered, the probabilities are first corrected as far as these
    contradict them, concept by concept and drawn to what all have in common. Else the cuts are those the fusion has
    already. Without an expert no precision is known.

    Args:
        learned: The fusion whose labels are called.
        cells: `expert_cells`.
        held_out: From `held_out_labels`, for these cells.
    """
    vocabulary, options = learned.vocabulary, learned.options
    machine = held_out[~held_out["decided_by"].isin([Witness.EXPERT, Witness.GIVEN])]
    known = cells.merge(machine[["image_id", "concept_id", "probability"]], on=["image_id", "concept_id"], how="inner")
    probability = known["probability"].to_numpy(np.float64)
    curve = Curve(learned.undecided, _log_odds(learned.undecided))
    audited = cell_scores(known, vocabulary, probability, _log_odds(probability))
    score = pd.Series(PROBABILITY, vocabulary.ids)
    is_asked = options.min_precision is not None or options.min_npv is not None
    method = pd.Series(EXPECTED if is_asked else CHOSEN, vocabulary.ids)
    low, high = (limit[0] for limit in learned.calls.limits([""], vocabulary))
    limits = (np.full(len(vocabulary), 0.5), low, high)
    plain = held_cuts(curve, limits, audited, vocabulary, score=score, method=method)
    if not is_asked or not len(audited.true):
        return plain
    asked = Asked(options.min_precision, options.min_npv, options.abstain_low, options.abstain_high)
    fitted = fitted_cuts(curve, audited, vocabulary, asked, score=score, method=method)
    return fitted.completed(plain, vocabulary)


def _log_odds(probability: np.ndarray) -> np.ndarray:
    return np.asarray(logit(np.clip(probability, _CERTAIN, 1 - _CERTAIN)), np.float64)
