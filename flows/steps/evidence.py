"""Rules as evidence, and whether the concepts are used: read on training images, measured on held-out ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from data_contracts.dataset import AlignedDataset
from data_contracts.files import write_bytes, write_text, write_with
from data_contracts.spreadsheet import read_csv, write_csv
from data_contracts.tables import Split
from flows.chain import Context, StepResult
from flows.steps.prepared import prepared_for

if TYPE_CHECKING:
    from model.explain.class_rules import ClassRule
    from model.explain.concept_use import ConceptUse
    from model.explain.paths import Seen, Subject
    from model.fit import TrainedRun
    from model.network import Head
    from model.outputs import Outputs
    from model.predict import Classifier
    from model.prepare import Prepared

RULES_FILE = "rules.csv"
RULE_CLASSES_FILE = "rule_classes.csv"
RULES_PAGE = "rules.txt"
IMAGE_RULES_FILE = "image_rules.csv"
IMAGE_RULES_TABLE = "image_rules.parquet"
CONCEPT_USE_FILE = "concept_use.csv"
CONCEPT_USE_PAGE = "concept_use.md"
KNOCK_OUT_FILE = "knock_out.csv"
INTERVENTIONS_FILE = "interventions.csv"
KNOCK_OUT_PLOT = "knock_out.png"
INTERVENTIONS_PLOT = "interventions.png"

_LARGE = 20_000
"""Image rules beyond so many images are written as Parquet: no spreadsheet opens them."""
_SEED_RULES = "rules_seed_{}.csv"
_DIGITS = 5


class _Read(NamedTuple):
    """A classifier and its images, read once for all evidence."""

    classifier: Classifier
    prepared: Prepared
    subject: Subject
    held_out: AlignedDataset
    train_outputs: Outputs
    outputs: Outputs
    """Of the held-out images."""


# ---- at training ---------------------------------------------------------------------------------------------


def write_seed_rules(folder: Path, trained: TrainedRun) -> list[Path]:
    """`rules_seed_N.csv` of each seed beside the model, to compare rules across seeds; none for a system without rules.

    Only now are the networks of all seeds there: the checkpoint keeps one.
    """
    from model.evaluate import outputs_of
    from model.explain.class_rules import read_class_rules
    from model.explain.rule_evidence import seed_table

    for stale in folder.glob(_SEED_RULES.format("*")):
        stale.unlink()
    written = []
    rows = trained.prepared.dataset.rows(Split.TRAIN)
    for fitted in trained.seeds:
        outputs = outputs_of(trained, fitted, rows)
        if not outputs.has_rules:
            return []
        rules = read_class_rules(outputs, trained.vocabulary, trained.class_names)
        written.append(folder / _SEED_RULES.format(fitted.seed))
        write_csv(written[-1], seed_table(fitted.seed, rules, trained.vocabulary))
    return written


def rules_of_other_seeds(folder: Path, seed: int) -> Mapping[int, list[ClassRule]]:
    """The rules of every seed's network but this one, as training wrote them down."""
    from model.explain.rule_evidence import rules_of

    found = {}
    for path in sorted(folder.glob(_SEED_RULES.format("*"))):
        number = int(path.stem.rpartition("_")[2])
        if number != seed:
            found[number] = rules_of(read_csv(path))
    return found


# ---- at explaining -------------------------------------------------------------------------------------------


def write_evidence(context: Context, classifier: Classifier, dataset: AlignedDataset) -> StepResult:
    """All files about rules and the use of concepts, in `explanations/`."""
    folder = context.run.explanations_dir
    for name in (RULES_FILE, RULE_CLASSES_FILE, RULES_PAGE, IMAGE_RULES_FILE, IMAGE_RULES_TABLE, CONCEPT_USE_FILE,
                 CONCEPT_USE_PAGE, KNOCK_OUT_FILE, INTERVENTIONS_FILE, KNOCK_OUT_PLOT, INTERVENTIONS_PLOT):  # fmt: skip
        (folder / name).unlink(missing_ok=True)
    read = _read(context, classifier, dataset)
    rules, use = _write_rules(context, read), _write_concept_use(context, read)
    return StepResult([*rules.outputs, *use.outputs], {**rules.counts, **use.counts}, [*rules.warnings, *use.warnings])


def _read(context: Context, classifier: Classifier, dataset: AlignedDataset) -> _Read:
    from model.data import FeatureInputs
    from model.explain.paths import Subject, features_of, seen_of
    from model.outputs import collect

    split, frozen = str(context.settings.explain.split), classifier.config.freeze_backbone
    prepared = prepared_for(context, classifier, dataset, "reading rules")
    readable = prepared.dataset
    seen: dict[str, Seen] = {}
    for name in dict.fromkeys((str(Split.TRAIN), str(Split.VAL), split)):
        rows = readable.rows(name)
        features = features_of(prepared.inputs, rows, classifier.backbone, frozen=frozen, device=classifier.device)
        seen[name] = seen_of(readable, rows, features)
    train, val, held = seen[str(Split.TRAIN)], seen[str(Split.VAL)], seen[split]
    outputs = [
        collect(classifier.network, FeatureInputs(one.features.numpy(), np.arange(len(one))), np.arange(len(one)),
                classifier.device)
        for one in (train, held)
    ]  # fmt: skip
    subject = Subject(
        classifier.network, classifier.config, readable.vocabulary, readable.class_names, train, val, held, split
    )
    return _Read(classifier, prepared, subject, readable.take(readable.rows(split)), *outputs)


def _write_rules(context: Context, read: _Read) -> StepResult:
    from model.explain.bootstrap import Resampling
    from model.explain.class_rules import read_class_rules
    from model.explain.rule_evidence import Measured, class_rules, class_summary, faithfulness
    from model.explain.rule_page import RulePage, rules_page
    from model.explain.rules import image_rules

    folder, settings, subject = context.run.explanations_dir, context.settings.explain, read.subject
    if not read.outputs.has_rules:
        write_text(folder / RULES_PAGE, _NO_RULES.format(family=subject.config.family))
        return StepResult([folder / RULES_PAGE], {}, ["this system forms no rules; maps are drawn all the same"])
    vocabulary, names, held = subject.vocabulary, subject.class_names, subject.held_out
    rules = read_class_rules(read.train_outputs, vocabulary, names, max_rules_per_class=settings.max_rules_per_class)
    others = rules_of_other_seeds(context.run.model_dir, read.classifier.seed)
    table = class_rules(rules, read.outputs, held.y, vocabulary, names, groups=held.groups, other_seeds=others)
    measured = Measured(read.outputs, held.y, vocabulary, names, Resampling(len(held), held.groups))
    summary = class_summary(rules, measured, others)
    page = RulePage(table, summary, faithfulness(measured), subject.config, vocabulary, subject.split, len(held))
    write_csv(folder / RULES_FILE, table.round(_DIGITS))
    write_csv(folder / RULE_CLASSES_FILE, summary.round(_DIGITS))
    write_text(folder / RULES_PAGE, rules_page(page))
    of_images = image_rules(read.outputs, read.held_out.image_ids, vocabulary, names)
    return StepResult(
        [folder / RULES_FILE, folder / RULE_CLASSES_FILE, folder / RULES_PAGE, _write_image_rules(folder, of_images)],
        {"class_rules": len(table), "image_rules": len(of_images)},
        _without_rules(summary),
    )


_NO_RULES = (
    "RULES OF THE CLASSIFIER\n\nNone: a system of the family `{family}` has no logic layer and forms no rules.\n"
)


def _without_rules(summary: pd.DataFrame) -> list[str]:
    names = summary.loc[summary["n_rules"] == 0, "class"].tolist()
    if not names:
        return []
    return [f"no rule tells {', '.join(names)} from the other classes; {RULES_PAGE} says why."]


def _write_image_rules(folder: Path, table: pd.DataFrame) -> Path:
    if len(table) <= _LARGE:
        write_csv(folder / IMAGE_RULES_FILE, table)
        return folder / IMAGE_RULES_FILE
    write_with(folder / IMAGE_RULES_TABLE, lambda file: table.to_parquet(file, index=False))
    return folder / IMAGE_RULES_TABLE


def _write_concept_use(context: Context, read: _Read) -> StepResult:
    from model.explain.concept_use import concept_use
    from model.explain.concept_use_page import concept_use_page

    folder, n_images = context.run.explanations_dir, context.settings.explain.n_evidence_images
    if not n_images:
        return StepResult()
    held = read.subject.held_out
    chosen = np.sort(np.random.default_rng(0).permutation(len(held))[:n_images])
    subject = replace(read.subject, held_out=held.take(chosen.astype(np.int64)))
    with context.console.bar("testing the use of concepts", 2) as advance:
        random_head = _random_head(context, read)
        advance(1)
        use = concept_use(subject, random_head)
        advance(1)
    write_text(folder / CONCEPT_USE_PAGE, concept_use_page(use, subject.config, subject.split))
    return StepResult([folder / CONCEPT_USE_PAGE, *_write_tables(folder, use)], _counts(use), use.remarks)


def _random_head(context: Context, read: _Read) -> Head | None:
    """The head that learns nonsense, where it is wanted and costs no pass of the backbone."""
    from model.explain.random_concepts import random_concept_head

    config = read.classifier.config
    wanted = context.settings.explain.random_concept_control and config.freeze_backbone
    if not (wanted and read.outputs.has_concepts and len(read.subject.held_out)):
        return None
    here = {"device": context.settings.train.device, "processes": 1, "logger": "none"}
    return random_concept_head(
        read.prepared, read.classifier.backbone, config.model_copy(update=here), read.classifier.seed
    )


def _write_tables(folder: Path, use: ConceptUse) -> list[Path]:
    from model.explain.curves import rows_of
    from pipeline.report.evidence_plots import intervention_curves_png, knock_out_png

    tables = {CONCEPT_USE_FILE: use.table, KNOCK_OUT_FILE: use.knock_out, INTERVENTIONS_FILE: rows_of(use.curves)}
    written = []
    for name, table in tables.items():
        if len(table):
            write_csv(folder / name, table.round(_DIGITS))
            written.append(folder / name)
    if len(use.knock_out):
        write_bytes(folder / KNOCK_OUT_PLOT, knock_out_png(use.knock_out))
        written.append(folder / KNOCK_OUT_PLOT)
    if use.curves:
        write_bytes(folder / INTERVENTIONS_PLOT, intervention_curves_png(tables[INTERVENTIONS_FILE]))
        written.append(folder / INTERVENTIONS_PLOT)
    return written


def _counts(use: ConceptUse) -> dict[str, float]:
    share = use.of("share_through_concepts")
    return {} if share is None else {"share_through_concepts": round(share.interval.value, 3)}
