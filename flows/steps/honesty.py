"""The honesty and leak tests of the align step: who may not label what, and which concepts nobody is left for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from data_contracts.spreadsheet import read_csv, write_csv
from data_contracts.store import RunFolder
from data_contracts.tables import Split, Witness
from flows.chain import Context

if TYPE_CHECKING:
    from annotation.alignment.inputs import AlignmentInputs

HONESTY_CSV = "honesty.csv"
WITNESS_LEAKS_CSV = "witness_leaks.csv"
REFUSED_CSV = "refused.csv"
_SHOWN = 3


@dataclass(frozen=True)
class Tested:
    """What the tests found."""

    files: list[Path] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    """In words, each once."""
    untested: list[str] = field(default_factory=list)
    """Of which concepts nothing could be told, in words."""
    n_untested: int = 0


def tested_witnesses(
    context: Context,
    images: pd.DataFrame,
    inputs: AlignmentInputs,
    groups: Mapping[str, str],
    localisation: pd.DataFrame | None,
) -> Tested:
    """Tests every witness; concepts that no witness is left for are dropped from the concepts table.

    `localisation` is the table of maps against marked regions, where there are any.
    """
    from annotation.trust.honesty import untested
    from annotation.trust.localisation import unplaced
    from annotation.trust.refuse import refused_witnesses, unwitnessed, without_refused

    run, vocabulary = context.run, inputs.vocabulary
    machine = inputs.judgements[inputs.judgements["witness"] == Witness.VLM]
    if not context.settings.align.honesty_tests or (machine.empty and localisation is None):
        return Tested()
    names = dict(zip(vocabulary.ids, vocabulary.names, strict=True))
    honesty, leaks = _tables(context, images, inputs, machine, groups)
    refused = refused_witnesses(
        honesty, leaks, inputs.judgements, fitted=inputs.options.adapts, names=names, localisation=localisation
    )
    dropped = unwitnessed(refused, inputs.judgements, len(images))
    tables = {HONESTY_CSV: honesty, WITNESS_LEAKS_CSV: leaks, REFUSED_CSV: refused}
    for name, table in tables.items():
        write_csv(run.path / name, table)
    run.write_concepts(without_refused(run.read_concepts(), dropped))
    untold = untested(honesty, names)
    unseen = unplaced(localisation, names) if localisation is not None else {}
    return Tested(
        [run.path / name for name in tables],
        refused["detail"].drop_duplicates().tolist(),
        [*_few(list(untold.values())), *_few(list(unseen.values()))],
        len({*untold, *unseen}),
    )


def refused_of(run: RunFolder) -> pd.DataFrame:
    """Who may not label what; no row where nothing was tested."""
    from annotation.trust.refuse import COLUMNS

    path = run.path / REFUSED_CSV
    return read_csv(path) if path.is_file() else pd.DataFrame(columns=list(COLUMNS), dtype="object")


def _tables(
    context: Context,
    images: pd.DataFrame,
    inputs: AlignmentInputs,
    machine: pd.DataFrame,
    groups: Mapping[str, str],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Honesty of the scores, and how far the class explains the machines' answers; empty where no machine answered."""
    from annotation.alignment.controls import controls
    from annotation.trust.honesty import HonestyOptions, count_nulls, honesty_table
    from annotation.trust.leaks import LeakOptions, class_leak

    settings, ids = context.settings.align, inputs.vocabulary.ids
    limits = LeakOptions(max_explained_fraction=settings.leak_max_explained_fraction)
    if machine.empty:
        return honesty_table([], ids), class_leak(machine, images, limits)
    known = images[images["label"].notna() & (images["split"] != Split.TEST)]
    found = controls(inputs, labels=dict(zip(known["image_id"], known["label"], strict=True)))
    patients = pd.factorize(pd.Series([groups[i] for i in found.image_ids]))[0]
    counts = count_nulls(found.own, found.answers, found.nulls, strata=found.folds, groups=patients)
    honesty = honesty_table(counts, ids, HonestyOptions(margin=settings.honesty_margin))
    here = machine[machine["concept_id"].isin(ids)]
    leaks = class_leak(here, images, limits, scores=found.scores(inputs.vocabulary))
    return honesty, leaks.iloc[:0] if known["label"].nunique() < 2 else leaks


def _few(sentences: list[str]) -> list[str]:
    """The first sentences, and how many more there are: all of them stand in the tables."""
    more = len(sentences) - _SHOWN
    return [*sentences[:_SHOWN], *([f"… and {more} more concepts; see {HONESTY_CSV}, n_needed"] if more > 0 else [])]
