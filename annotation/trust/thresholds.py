"""From alignment scores to answers: a threshold per concept, with a band around it in which nothing is said."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from annotation.trust.cuts import PROBABILITY, SIMILARITY, Cuts, band, otsu_cut, score_columns
from annotation.trust.expert_cells import CELL_COLUMNS
from annotation.trust.fitted_cuts import (
    AUDITED,
    Asked,
    CellScores,
    Curve,
    cell_scores,
    fitted_cuts,
    held_cuts,
)
from annotation.trust.gather import gather, voters_of
from annotation.trust.label_model import LabelModel, fit_label_model
from annotation.trust.sample import sample_shards
from annotation.votes import alignment_scores, score_matrix
from data_contracts.concepts import Vocabulary
from data_contracts.errors import ConfigurationError
from data_contracts.tables import Witness


class ThresholdMethod(StrEnum):
    """How thresholds are found."""

    FIXED = "fixed"
    OTSU = "otsu"
    AGREEMENT = "agreement"
    AUDITED = "audited"


class ThresholdOptions(BaseModel):
    """How scores become answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: ThresholdMethod = ThresholdMethod.OTSU
    """`fixed`: one number for all. `otsu`: per concept, between the two modes of its scores. `agreement`: where the
    other witnesses, as reliable as the label model finds them, leave calls as right as asked. `audited`: the same,
    corrected by what experts answered."""
    fixed: float | None = None
    """The number for `fixed`. It is a property of the model: 0.45 belongs to BioViL, not to yours."""
    abstain_fraction: float = Field(0.1, ge=0, lt=1)
    """`fixed` and `otsu`: share of images nearest to the threshold about which nothing is said."""
    min_precision: float = Field(0.9, gt=0.5, lt=1)
    """`agreement` and `audited`: precision that answers of presence are to have."""
    min_npv: float = Field(0.9, gt=0.5, lt=1)
    """The same for answers of absence."""
    max_fit_images: int = Field(5_000, ge=1)
    """Images that the curves of `agreement` and `audited` are fitted on at most."""
    seed: int = 0
    """Decides which these are."""


def fit_thresholds(
    judgements: pd.DataFrame,
    alignment: pd.DataFrame | pa.Table | None,
    vocabulary: Vocabulary,
    options: ThresholdOptions | None = None,
    *,
    cells: pd.DataFrame | None = None,
    learn_from: Collection[str] | None = None,
) -> Cuts:
    """Cuts and their quality, one row a concept that alignment scores; `method` is the one really used.

    `fixed` and `otsu` cut the similarity, as the paper does; `agreement` and `audited` the fitted probability where
    there is one. A concept that no other witness speaks of gets Otsu's cut.

    Args:
        judgements: The ledger.
        alignment: ALIGNMENT columns, or None.
        vocabulary: The concepts and their order.
        options: Method and what calls must keep.
        cells: `expert_cells`; without any, `audited` is `agreement`, and no precision is known.
        learn_from: Images that cuts are fitted on: leave the test split out. All if None.

    Raises:
        ConfigurationError: `fixed` without a number.
    """
    settings = options or ThresholdOptions()
    if settings.method is ThresholdMethod.FIXED and settings.fixed is None:
        raise ConfigurationError(
            "thresholds: method 'fixed' expects a number in `fixed`, got none.",
            remedy="Set it for your model, or use the method 'otsu'.",
        )
    audited = pd.DataFrame(columns=CELL_COLUMNS) if cells is None else cells
    scores = alignment_scores(alignment)
    if settings.method in (ThresholdMethod.FIXED, ThresholdMethod.OTSU):
        own = scores if learn_from is None else scores[scores["image_id"].isin(list(learn_from))]
        return _plain(own, scores, audited, vocabulary, settings)
    return _by_curves(judgements, scores, audited, vocabulary, settings, learn_from)


def _by_curves(
    judgements: pd.DataFrame,
    scores: pd.DataFrame,
    cells: pd.DataFrame,
    vocabulary: Vocabulary,
    options: ThresholdOptions,
    learn_from: Collection[str] | None,
) -> Cuts:
    machine = judgements[judgements["witness"] != Witness.EXPERT]
    own, own_scores = sample_shards([(machine, scores)], options.max_fit_images, seed=options.seed, among=learn_from)
    gathered = gather(own, own_scores, vocabulary, voters_of([own], None))
    model = fit_label_model(gathered.evidence)
    taught = (gathered.evidence.weight > 0).any((0, 1)) | np.isfinite(gathered.evidence.decided).any(0)
    kinds = _kinds(scores, vocabulary)
    curve = Curve(
        score_columns(own_scores, kinds, gathered.image_ids, vocabulary), _log_odds(model, gathered.evidence.score)
    )
    method = pd.Series(np.where(taught, ThresholdMethod.AGREEMENT, ThresholdMethod.OTSU), vocabulary.ids)
    known = cells if options.method is ThresholdMethod.AUDITED else cells.iloc[:0]
    fitted = fitted_cuts(
        curve,
        _scored(known, scores, kinds, model, vocabulary),
        vocabulary,
        Asked(options.min_precision, options.min_npv),
        score=kinds,
        method=method,
    )
    # Nobody answered, so no curve: a score's slope would be an invention, and with it every promised precision.
    bare = method.index[(method == ThresholdMethod.OTSU) & ~method.index.isin(_own(fitted))]
    plain = _plain(own_scores, scores, cells, vocabulary, options.model_copy(update={"method": ThresholdMethod.OTSU}))
    return fitted.of(method.index.difference(bare)).completed(plain.of(bare), vocabulary)


def _own(cuts: Cuts) -> pd.Series:
    """The concepts whose own cells decided."""
    return cuts.table.loc[cuts.table["method"] == AUDITED, "concept_id"]


def _plain(
    own: pd.DataFrame, scores: pd.DataFrame, cells: pd.DataFrame, vocabulary: Vocabulary, options: ThresholdOptions
) -> Cuts:
    """Cuts of the similarity that no answer was looked at for."""
    kinds = pd.Series(SIMILARITY, vocabulary.ids)
    image_ids = np.asarray(pd.unique(own["image_id"]), object)
    score = score_columns(own, kinds, image_ids, vocabulary)
    limits = np.array([_plain_limits(column[np.isfinite(column)], options) for column in score.T]).reshape(-1, 3).T
    return held_cuts(
        Curve(score, np.full_like(score, np.nan)),
        (limits[0], limits[1], limits[2]),
        _scored(cells, scores, kinds, None, vocabulary),
        vocabulary,
        score=kinds,
        method=pd.Series(str(options.method), vocabulary.ids),
    )


def _plain_limits(score: np.ndarray, options: ThresholdOptions) -> tuple[float, float, float]:
    if not len(score):
        return (float("nan"),) * 3
    is_fixed = options.method is ThresholdMethod.FIXED and options.fixed is not None
    cut = float(options.fixed) if is_fixed and options.fixed is not None else otsu_cut(score)
    return cut, *band(score, cut, options.abstain_fraction)


def _kinds(scores: pd.DataFrame, vocabulary: Vocabulary) -> pd.Series:
    """Concept id → the column to cut: the probability where one was fitted."""
    fitted = scores.loc[scores[PROBABILITY].notna(), "concept_id"].unique()
    return pd.Series([PROBABILITY if c in set(fitted) else SIMILARITY for c in vocabulary.ids], vocabulary.ids)


def _log_odds(model: LabelModel, score: np.ndarray) -> np.ndarray:
    """(N, K) log-odds of presence by the score; NaN where there is none, or where it says the same of every image."""
    says = np.isfinite(score) & (model.slope > 0)
    return np.where(says, model.prior_log_odds(score), np.nan)


def _scored(
    cells: pd.DataFrame, scores: pd.DataFrame, kinds: pd.Series, model: LabelModel | None, vocabulary: Vocabulary
) -> CellScores:
    """The cells with the scores of their images, and the log-odds a model without experts gives them."""
    image_ids = np.asarray(pd.unique(cells["image_id"]), object)
    score = score_columns(scores, kinds, image_ids, vocabulary)
    log_odds = score if model is None else _log_odds(model, score_matrix(scores, image_ids, vocabulary))
    row = pd.Index(image_ids).get_indexer(cells["image_id"])
    column = pd.Index(vocabulary.ids).get_indexer(cells["concept_id"])
    return cell_scores(cells, vocabulary, score[row, column], log_odds[row, column])
