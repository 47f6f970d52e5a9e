"""The honesty and leak tests of the align step: who may not label what, and which concepts nobody is left for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.spreadsheet import read_csv, write_csv
from data_contracts.store import RunFolder
from data_contracts.tables import Split, Witness
from flows.chain import Context
from flows.steps.images import image_reader

if TYPE_CHECKING:
    from annotation.alignment.options import AlignOptions

HONESTY_CSV = "honesty.csv"
WITNESS_LEAKS_CSV = "witness_leaks.csv"
REFUSED_CSV = "refused.csv"


def tested_witnesses(
    context: Context,
    images: pd.DataFrame,
    vocabulary: Vocabulary,
    judgements: pd.DataFrame,
    options: AlignOptions,
    groups: Mapping[str, str],
) -> tuple[list[Path], list[str]]:
    """Files written and warnings; concepts that no witness is left for are dropped from the concepts table.

    `judgements` are those that heads may be fitted to.
    """
    from annotation.alignment.controls import controls
    from annotation.trust.honesty import HonestyOptions, count_nulls, honesty_table
    from annotation.trust.leaks import LeakOptions, class_leak
    from annotation.trust.refuse import refused_witnesses, unwitnessed, without_refused

    run, settings = context.run, context.settings.align
    machine = judgements[judgements["witness"] == Witness.VLM]
    if not settings.honesty_tests or machine.empty:
        return [], []
    known = images[images["label"].notna() & (images["split"] != Split.TEST)]
    labels = dict(zip(known["image_id"], known["label"], strict=True))
    found = controls(
        images["image_id"].tolist(),
        image_reader(context),
        vocabulary,
        judgements,
        options,
        groups=groups,
        labels=labels,
        cache_dir=run.cache_dir,
    )
    patients = pd.factorize(pd.Series([groups[i] for i in found.image_ids]))[0]
    counts = count_nulls(found.own, found.answers, found.nulls, strata=found.folds, groups=patients)
    honesty = honesty_table(counts, vocabulary.ids, HonestyOptions(margin=settings.honesty_margin))
    limits = LeakOptions(max_explained_fraction=settings.leak_max_explained_fraction)
    here = machine[machine["concept_id"].isin(vocabulary.ids)]
    leaks = class_leak(here, images, limits, scores=found.scores(vocabulary))
    if known["label"].nunique() < 2:
        leaks = leaks.iloc[:0]
    names = dict(zip(vocabulary.ids, vocabulary.names, strict=True))
    refused = refused_witnesses(honesty, leaks, judgements, fitted=options.adapts, names=names)
    dropped = unwitnessed(refused, judgements, len(images))
    tables = {HONESTY_CSV: honesty, WITNESS_LEAKS_CSV: leaks, REFUSED_CSV: refused}
    for name, table in tables.items():
        write_csv(run.path / name, table)
    run.write_concepts(without_refused(run.read_concepts(), dropped))
    return [run.path / name for name in tables], refused["detail"].drop_duplicates().tolist()


def refused_of(run: RunFolder) -> pd.DataFrame:
    """Who may not label what; no row where nothing was tested."""
    from annotation.trust.refuse import COLUMNS

    path = run.path / REFUSED_CSV
    return read_csv(path) if path.is_file() else pd.DataFrame(columns=list(COLUMNS), dtype="object")
