"""Thresholds of the fuse step: fitted, or taken from another run after a look at what they were fitted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.errors import ConfigurationError, ContractViolation
from data_contracts.files import sha256_of_file
from data_contracts.manifest import content_hash
from data_contracts.spreadsheet import read_csv
from flows.chain import Context
from flows.settings import AlignSettings

if TYPE_CHECKING:
    from annotation.trust.cuts import Cuts

THRESHOLDS_CSV = "thresholds.csv"
ALIGNMENT, FUSED = "alignment", "fused"
"""`source` of the rows of `thresholds.csv`: whose scores are cut."""
THRESHOLD_COLUMNS = [
    *("source", "concept_id", "score", "threshold", "abstain_low", "abstain_high", "method", "n", "n_audited"),
    *("precision", "precision_low", "npv", "npv_low", "coverage", "expected_precision", "expected_npv"),
    *("fitted_for", "score_quantiles"),
]
"""The columns of `thresholds.csv`."""
_NEEDED = ("source", "concept_id", "score", "threshold", "abstain_low", "abstain_high", "method", "n", "fitted_for")
_SHOWN = 5
_UNASKED_PRECISION = 0.9
_LOCAL = "local-dir:"


class Fitted(NamedTuple):
    """The cuts of one source, and what they belong to."""

    source: str
    cuts: Cuts
    scores_of: Callable[[Cuts], Mapping[str, np.ndarray]]
    """Concept id → the scores of the images that cuts are fitted on, as the cuts want them."""
    fitted_for: pd.Series
    """Concept id → everything that the scale of the scores hangs on, as it is now."""

    def rows(self) -> pd.DataFrame:
        """The rows of `thresholds.csv`; a limit that nothing reaches is empty."""
        from annotation.trust.validity import quantiles_of

        table, scores = self.cuts.table.replace([np.inf, -np.inf], np.nan), self.scores_of(self.cuts)
        own = pd.Series([quantiles_of(scores.get(c, np.zeros(0))) for c in table["concept_id"]], table.index)
        # Stored cuts keep the distribution that they were fitted on.
        known = table["score_quantiles"].fillna(own) if "score_quantiles" in table else own
        fitted_for = self.fitted_for.reindex(table["concept_id"]).to_numpy()
        return table.assign(source=self.source, fitted_for=fitted_for, score_quantiles=known)


def fit_alignment(
    context: Context,
    judgements: pd.DataFrame,
    scores: pd.DataFrame,
    vocabulary: Vocabulary,
    *,
    cells: pd.DataFrame | None = None,
    learn_from: list[str] | None = None,
) -> Cuts | None:
    """The cuts by which alignment votes, as `[labels]` asks for; None where it contributes its score."""
    from annotation.trust.thresholds import ThresholdMethod, ThresholdOptions, fit_thresholds

    settings = context.settings.labels
    if settings.threshold == "none":
        return None
    options = ThresholdOptions(
        method=ThresholdMethod(settings.threshold),
        fixed=settings.fixed_threshold,
        min_precision=settings.min_precision or _UNASKED_PRECISION,
        min_npv=settings.min_npv or _UNASKED_PRECISION,
    )
    return fit_thresholds(judgements, scores, vocabulary, options, cells=cells, learn_from=learn_from)


def require_own_number(context: Context) -> None:
    """Raise `ConfigurationError` where the fixed threshold was set for another alignment model."""
    settings, now = context.settings.labels, aligner_name(context.settings.align)
    if settings.threshold != "fixed":
        return
    if settings.fixed_threshold_model is not None:
        meant, remedy = settings.fixed_threshold_model, "Set both keys for the model in use."
        is_other = meant != context.settings.align.model
    else:
        meant = _number_used_with(context)
        is_other = meant is not None and meant != now
        own = f'labels.fixed_threshold_model = "{context.settings.align.model}"'
        remedy = f"If it holds for this model too, say so: {own}."
    if is_other:
        raise ConfigurationError(
            f"labels.fixed_threshold {settings.fixed_threshold}: it belongs to the alignment model {meant!r}, and the "
            f"model is now {now!r}, whose scores have another scale; no label was made.",
            remedy=f'{remedy} Or let it be fitted: labels.threshold = "otsu", "agreement" or "audited".',
        )


def with_stored(fitted: Fitted, file: Path) -> tuple[Fitted, list[str]]:
    """The cuts with those of `file` in place of fitted ones wherever these still hold, and warnings in words.

    Raises:
        ConfigurationError: The file was fitted for another model.
        ContractViolation: It is no table of thresholds.
    """
    from annotation.trust.cuts import LIMITS

    stored = _read(file)
    stored = stored[stored["source"] == fitted.source].set_index("concept_id")
    valid, warnings = _still_valid(stored, fitted, file)
    kept = stored.loc[valid]
    table = fitted.cuts.table.set_index("concept_id")
    plain = kept["method"].astype(str).str.removeprefix("stored (").str.removesuffix(")")
    taken = kept.drop(columns=["source", "fitted_for"]).assign(method="stored (" + plain + ")")
    never = {"threshold": np.inf, "abstain_low": -np.inf, "abstain_high": np.inf}
    taken = taken.assign(**{name: taken[name].astype("float64").fillna(never[name]) for name in LIMITS})
    together = pd.concat([table.drop(index=[c for c in valid if c in table.index]), taken])
    together = together.loc[[c for c in fitted.fitted_for.index if c in together.index]]
    held_out = fitted.cuts.held_out[~fitted.cuts.held_out["concept_id"].isin(valid)]
    cuts = replace(fitted.cuts, table=together.rename_axis("concept_id").reset_index(), held_out=held_out)
    where = f"that {file.name} was fitted on, in the images of this run"
    return fitted._replace(cuts=cuts), warnings + shift_warnings(
        kept.reset_index(), fitted.source, fitted.scores_of(cuts), where
    )


def shift_warnings(fitted_on: pd.DataFrame, source: str, scores: Mapping[str, np.ndarray], where: str) -> list[str]:
    """A sentence where the scores of some images are not distributed as those that cuts were fitted on."""
    from annotation.trust.validity import FALSE_ALARM, shifted

    found = shifted(fitted_on, scores)
    alarms = found[found["alarm"]].sort_values("distance", ascending=False)
    if alarms.empty:
        return []
    named = _listed([f"{row.concept_id!r} (distance {row.distance:.2f})" for row in alarms.itertuples()])
    return [
        f"{_SPOKEN[source]}: scores have shifted away from those {where}, for {len(alarms)} of "
        f"{len(found)} concepts: {named}. Calls there may be less right than stated. Audit some of these images "
        f"(`medmicn audit draw`) or fit anew. (Kolmogorov-Smirnov; where nothing shifted, one run in "
        f"{round(1 / FALSE_ALARM)} would say so.)"
    ]


_SPOKEN = {ALIGNMENT: "thresholds of alignment", FUSED: "calls of the fused label"}


def aligner_name(settings: AlignSettings) -> str:
    """The alignment model and what else decides the scale of its scores; changes with the files of a local model."""
    looks = {"values": settings.value_features, "tiles": settings.tile_above is not None}
    extra = "".join(f"+{name}" for name, on in looks.items() if on)
    folder = Path(settings.model.removeprefix(_LOCAL))
    if not settings.model.startswith(_LOCAL) or not folder.is_dir():
        return settings.model + extra
    files = {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in _files(folder)}
    return f"{settings.model}@{content_hash(files)[:12]}{extra}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _still_valid(stored: pd.DataFrame, fitted: Fitted, file: Path) -> tuple[list[str], list[str]]:
    """Concepts whose stored cuts hold, and what is said of the others."""
    from annotation.trust.validity import MODEL_PARTS, changes

    valid: list[str] = []
    changed: dict[str, list[str]] = {}
    missing: list[str] = []
    for concept_id, now in fitted.fitted_for.items():
        if concept_id not in stored.index:
            missing.append(repr(concept_id))
            continue
        found = changes(str(stored.loc[concept_id, "fitted_for"]), str(now))
        if other_models := [change for change in found if change.part in MODEL_PARTS]:
            raise ConfigurationError(
                f"labels.thresholds_file {file}: concept {concept_id!r}: {'; '.join(map(str, other_models))}; a "
                "threshold belongs to the model it was fitted for, so none was applied and no label was made.",
                remedy="Leave labels.thresholds_file out to fit thresholds here, or use the model of the file.",
            )
        if found:
            changed.setdefault(" and ".join(change.in_words for change in found), []).append(repr(concept_id))
        else:
            valid.append(str(concept_id))
    spoken = _SPOKEN[fitted.source]
    told = [
        f"{spoken}: {_listed(concepts)}: {what} changed since {file.name} was fitted, so its thresholds were not "
        "applied there and others were fitted. Audit these concepts, or go back to what the file was fitted for."
        for what, concepts in changed.items()
    ]
    if missing:
        told.append(f"{spoken}: {file.name} has none for {_listed(missing)}; these were fitted here.")
    return valid, told


def _number_used_with(context: Context) -> str | None:
    """The alignment model with which the same fixed number made this run's last labels."""
    path, number = context.run.path / THRESHOLDS_CSV, context.settings.labels.fixed_threshold
    if not path.is_file():
        return None
    before = _read(path)
    same = before[(before["method"] == "fixed") & (before["threshold"] == number)]
    for text in same["fitted_for"].astype(str):
        return text.partition("aligner=")[2].partition(";")[0] or None
    return None


def _read(file: Path) -> pd.DataFrame:
    if not file.is_file():
        raise ConfigurationError(f"labels.thresholds_file: expected a file, found none at {file}.")
    table = read_csv(file)
    if faults := [f"column {name!r} is missing" for name in _NEEDED if name not in table]:
        raise ContractViolation(str(file), faults, remedy="Name the thresholds.csv of a run folder.")
    return table if "score_quantiles" in table else table.assign(score_quantiles="")


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
