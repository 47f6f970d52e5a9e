"""What the fuse step learns before it labels: reliabilities, cuts, and how both do on what experts answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.spreadsheet import read_csv
from data_contracts.store import RunFolder
from data_contracts.tables import Split, Witness
from flows.chain import Context
from flows.steps.corrections import AUDIT_DESIGN_CSV
from flows.steps.honesty import refused_of
from flows.steps.thresholds import (
    ALIGNMENT,
    FUSED,
    THRESHOLD_COLUMNS,
    Fitted,
    aligner_name,
    fit_alignment,
    shift_warnings,
    with_stored,
)

if TYPE_CHECKING:
    from annotation.trust.cuts import Cuts
    from annotation.trust.fuse import LearnedFusion
    from annotation.trust.gather import Voter


class Said(NamedTuple):
    """What is said of some images."""

    judgements: pd.DataFrame
    scores: pd.DataFrame


@dataclass(frozen=True)
class LearnedLabels:
    """Everything that labels are made with."""

    fusion: LearnedFusion
    heard: Said
    """The sample that all was learned from, without what refused witnesses say."""
    cells: pd.DataFrame
    """`expert_cells` outside the test split."""
    held_out: pd.DataFrame
    """The labels of these cells as they are without the expert's own answer."""
    fitted: tuple[Fitted, ...]
    warnings: list[str] = field(default_factory=list)

    def threshold_rows(self) -> pd.DataFrame:
        """`thresholds.csv`."""
        parts = [fitted.rows() for fitted in self.fitted]
        return pd.concat(parts, ignore_index=True).reindex(columns=THRESHOLD_COLUMNS)


def learn_labels(
    context: Context, images: pd.DataFrame, vocabulary: Vocabulary, sample: Said, voters: tuple[Voter, ...]
) -> LearnedLabels:
    """Reliabilities and cuts from a sample of the run; nothing is learned from the test split."""
    from annotation.trust.expert_cells import expert_cells
    from annotation.trust.refuse import silenced

    heard = Said(*silenced(*sample, refused_of(context.run)))
    outside = outside_test(images)["image_id"].tolist()
    known = sample.judgements[sample.judgements["image_id"].isin(outside)]
    cells = expert_cells(known, _design(context.run), vocabulary, groups=_groups(images))
    warnings: list[str] = []
    alignment = _alignment(context, vocabulary, heard, cells, outside)
    if alignment is not None:
        alignment, told = _stored(context, alignment)
        warnings += told + _test_shift(alignment, _scores(heard.scores, alignment.cuts, _test(images), vocabulary))
    cuts = None if alignment is None else alignment.cuts
    fusion, held_out = _fusion(context, vocabulary, heard, voters, cells, cuts, outside)
    fused, told = _stored(context, _fused(context, fusion, heard))
    fusion = replace(fusion, calls=fused.cuts)
    warnings += told + _test_shift(fused, _probabilities(fusion, heard, _test(images)))
    parts = [part for part in (alignment, fused) if part is not None]
    return LearnedLabels(fusion, heard, cells, held_out, tuple(parts), warnings)


def outside_test(images: pd.DataFrame) -> pd.DataFrame:
    """The images that anything may be learned from."""
    return images[images["split"].isna() | (images["split"] != Split.TEST)]


def _alignment(
    context: Context, vocabulary: Vocabulary, heard: Said, cells: pd.DataFrame, outside: list[str]
) -> Fitted | None:
    cuts = fit_alignment(context, *heard, vocabulary, cells=cells, learn_from=outside)
    if cuts is None:
        return None
    # A fitted aligner scores as the judges answer, an untouched one does not know them.
    fitted_for = _fitted_for(context, vocabulary, heard, judged=_is_fitted(context))
    scores_of = partial(_scores, heard.scores, image_ids=outside, vocabulary=vocabulary)
    return Fitted(ALIGNMENT, cuts, scores_of, fitted_for)


def _fusion(
    context: Context,
    vocabulary: Vocabulary,
    heard: Said,
    voters: tuple[Voter, ...],
    cells: pd.DataFrame,
    cuts: Cuts | None,
    outside: list[str],
) -> tuple[LearnedFusion, pd.DataFrame]:
    """The fusion with its calls, and the labels of audited cells without the expert's own answer."""
    from annotation.trust.calls import HeldOut, fit_calls, held_out_labels
    from annotation.trust.fuse import FuseOptions, learn_fusion
    from annotation.trust.gather import BY_THRESHOLD

    settings = context.settings.labels
    options = FuseOptions.model_validate(settings.model_dump(include=set(FuseOptions.model_fields)))
    names = voters if cuts is None else (*voters, BY_THRESHOLD)
    tables = HeldOut(heard.judgements, heard.scores, cuts, outside, names)
    fusion = learn_fusion(*heard, vocabulary, options, thresholds=cuts, learn_from=outside, voters=names)
    held_out = held_out_labels(tables, vocabulary, options, cells)
    return replace(fusion, calls=fit_calls(fusion, cells, held_out)), held_out


def _fused(context: Context, fusion: LearnedFusion, heard: Said) -> Fitted:
    ids = fusion.vocabulary.ids
    scores = {c: column[np.isfinite(column)] for c, column in zip(ids, fusion.undecided.T, strict=True)}

    def scores_of(_cuts: Cuts) -> Mapping[str, np.ndarray]:
        return scores

    return Fitted(FUSED, fusion.calls, scores_of, _fitted_for(context, fusion.vocabulary, heard, judged=True))


def _stored(context: Context, fitted: Fitted) -> tuple[Fitted, list[str]]:
    file = context.settings.labels.thresholds_file
    return (fitted, []) if file is None else with_stored(fitted, file)


def _test_shift(fitted: Fitted, scores: Mapping[str, np.ndarray]) -> list[str]:
    here = fitted.rows()
    # Stored cuts were compared with the whole run already.
    own = here[~here["method"].str.startswith("stored")]
    return shift_warnings(own, fitted.source, scores, "that cuts were fitted on, in the images of the test split")


def _scores(scores: pd.DataFrame, cuts: Cuts, image_ids: list[str], vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """Concept id → the scores that are cut."""
    from annotation.trust.cuts import score_columns

    kinds = cuts.table.set_index("concept_id")["score"]
    found = score_columns(scores, kinds, np.asarray(image_ids, object), vocabulary)
    return {c: column[np.isfinite(column)] for c, column in zip(vocabulary.ids, found.T, strict=True)}


def _probabilities(fusion: LearnedFusion, heard: Said, image_ids: list[str]) -> dict[str, np.ndarray]:
    """Concept id → the fused probabilities of these images, where no person decided."""
    from annotation.trust.fuse import NOBODY

    here = [table[table["image_id"].isin(image_ids)] for table in heard]
    labels = fusion.labels(*here)
    by_machine = labels[~labels["decided_by"].isin([Witness.EXPERT, Witness.GIVEN, NOBODY])]
    return {str(c): rows.to_numpy(np.float64) for c, rows in by_machine.groupby("concept_id")["probability"]}


def _fitted_for(context: Context, vocabulary: Vocabulary, heard: Said, *, judged: bool) -> pd.Series:
    from annotation.trust.validity import fingerprints

    settings = context.settings.align
    return fingerprints(
        vocabulary, heard.judgements, aligner=aligner_name(settings), templates=settings.templates, judged=judged
    )


def _is_fitted(context: Context) -> bool:
    from annotation.alignment.options import AlignOptions

    return AlignOptions(model=context.settings.align.model).adapts


def _test(images: pd.DataFrame) -> list[str]:
    return images.loc[images["split"] == Split.TEST, "image_id"].tolist()


def _groups(images: pd.DataFrame) -> dict[str, str]:
    """Image id → what must stay on one side of a fit: the patient, or the cluster of near duplicates."""
    group = images["group_id"].fillna(images["near_duplicate_of"]).fillna(images["image_id"])
    return dict(zip(images["image_id"], group, strict=True))


def _design(run: RunFolder) -> pd.DataFrame | None:
    """How the audit's cells were drawn; None where none were."""
    path = run.path / AUDIT_DESIGN_CSV
    if not path.is_file():
        return None
    # As text: an id may look like a number.
    return read_csv(path, as_text=True).astype({"round": "int64", "inclusion_probability": "float64"})
