"""The concepts step: given, taken from a file, or proposed by the vision-language model, then filtered."""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from annotation.vlm.estimate import Estimate, Work, estimate
from data_contracts.concepts import Concept, Vocabulary, slug
from data_contracts.errors import ConfigurationError, StepFailed
from data_contracts.files import sha256_of_file
from data_contracts.spreadsheet import write_csv
from data_contracts.tables import CONCEPTS, ConceptOrigin, ConceptStatus, Split, vocabulary_of
from flows.chain import Context, ShardRunner, Step, StepResult, is_fresh
from flows.ledger import asked_vocabulary, keep_edits, merge_concepts, was_given
from flows.settings import ConceptSettings
from flows.steps.images import accepted, image_reader

if TYPE_CHECKING:
    from annotation.propose import ProposeOptions

COVERAGE_CSV = "coverage.csv"
"""Which concepts tell which classes apart."""

_USUAL_DEFINITION = "One sentence that says what to look for in the image."

UNLABELLED = "images"
"""Stands for the class where a folder has none."""


def _inputs(context: Context) -> Mapping[str, Any]:
    # Images are no input: a vocabulary stays as it is when images are added, so that labels stay comparable.
    vlm, run = context.settings.vlm, context.run
    file = context.settings.concepts.file
    return {
        # Scales are for comparing experts: they change no concept.
        "settings": context.settings.concepts.model_dump(mode="json", exclude={"ordinal_groups"}),
        "file": sha256_of_file(file) if file and file.is_file() else None,
        "modality": context.settings.source.modality,
        "endpoint": [vlm.base_url, vlm.model],
        "classes": sorted(accepted(run.read_images())["label"].dropna().unique()),
        "there": run.table_path(CONCEPTS).is_file(),
        "given": was_given(run.read_concepts()) if run.table_path(CONCEPTS).is_file() else False,
    }


def _work(context: Context, _shards: ShardRunner) -> StepResult:
    run, settings = context.run, context.settings.concepts
    stored = run.read_concepts() if run.table_path(CONCEPTS).is_file() else None
    cost: float | None = 0.0
    warnings: list[str] = []
    if settings.file is not None:
        concepts = merge_concepts(
            stored if stored is not None and was_given(stored) else None, read_concepts(settings.file)
        )
    elif stored is not None and was_given(stored):
        concepts = stored
    else:
        proposed, warnings, cost = _proposed(context)
        concepts = keep_edits(stored, proposed)
    run.write_concepts(concepts)
    kept = concepts["status"] == ConceptStatus.KEPT
    if not kept.any():
        raise StepFailed(
            f"Concepts: expected at least one to be kept, all {len(concepts)} were dropped; "
            f"see {run.path}/concepts.csv.",
            remedy="Give your own with --concepts FILE, or relax the filters under [concepts].",
        )
    for row in concepts[kept].itertuples():
        context.console.say(f"  · {row.name}" + (f": {row.definition}" if row.definition else ""))
    counts: dict[str, float] = {"concepts_kept": int(kept.sum()), "dropped": int((~kept).sum())}
    return StepResult([], counts, warnings, cost_usd=cost)


def _proposed(context: Context) -> tuple[pd.DataFrame, list[str], float | None]:
    """Proposed and filtered concepts, which classes they do not tell apart, and what the endpoint charged."""
    from annotation.coverage import coverage, uncovered
    from annotation.filter import FilterOptions, filter_concepts
    from annotation.propose import propose
    from annotation.text import minilm_embedder
    from annotation.vlm.preflight import price_of
    from flows.vlm import SESSIONS, ready

    settings, source = context.settings.concepts, context.settings.source
    samples, options = _samples(context), propose_options(settings)
    embed = minilm_embedder()
    read, before = image_reader(context), SESSIONS.spent(context)
    session = SESSIONS.begin(context)
    try:
        ready(context, session, 0, estimate_proposing(context))
        proposed = session.call(lambda client: propose(samples, read, client, source.modality, options, embed))
    finally:
        spent = SESSIONS.end(context)
    filters = FilterOptions(
        max_name_characters=settings.max_name_characters,
        like_class_cosine=settings.like_class_cosine,
        like_each_other_cosine=settings.like_each_other_cosine,
    )
    class_names = [name for name in samples if name != UNLABELLED]
    concepts = filter_concepts(proposed, class_names, embed, filters)
    write_csv(context.run.path / COVERAGE_CSV, coverage(concepts, class_names))
    cost = None if price_of(context.settings.vlm) is None else spent.usd - before.usd
    return concepts, uncovered(concepts, class_names), cost


def will_propose(context: Context) -> bool:
    """Whether the step would ask the model for concepts now."""
    run = context.run
    stored = run.read_concepts() if run.table_path(CONCEPTS).is_file() else None
    is_given = context.settings.concepts.file is not None or (stored is not None and was_given(stored))
    return not is_given and not is_fresh(CONCEPTS_STEP, context)


def estimate_proposing(context: Context) -> Estimate:
    """What proposing concepts would send now; nothing where concepts are given or still hold."""
    from annotation.propose import planned_requests
    from annotation.vlm.preflight import price_of

    settings, works = context.settings, list[Work]()
    if will_propose(context):
        options, limit = propose_options(settings.concepts), settings.vlm.max_output_tokens
        requests = planned_requests(_n_samples(context), settings.source.modality, options, limit)
        works = [Work(request, 1) for request in requests]
    return estimate(works, settings.vlm.model_copy(update={"batch": False}), price_of(settings.vlm))


def expected_vocabulary(context: Context) -> tuple[Vocabulary, bool]:
    """The concepts that images will be asked about, and whether they are known: else as many as there can be."""
    from annotation.propose import most_concepts

    settings = context.settings.concepts
    if will_propose(context):
        names = [f"a visual concept {i}" for i in range(most_concepts(_n_samples(context), propose_options(settings)))]
        return Vocabulary.of(Concept(slug(name), name, _USUAL_DEFINITION) for name in names), False
    if settings.file is not None and not is_fresh(CONCEPTS_STEP, context):
        return vocabulary_of(read_concepts(settings.file)), True
    return asked_vocabulary(context.run), True


def propose_options(settings: ConceptSettings) -> ProposeOptions:
    """How concepts are asked for, from the configuration."""
    from annotation.propose import ProposeOptions

    return ProposeOptions(
        n_per_class=settings.samples_per_class,
        max_images_per_request=settings.max_images_per_request,
        n_concepts=settings.proposed_per_class,
        rounds=settings.rounds,
        contrast_pairs=settings.contrast_pairs,
        n_contrast=settings.proposed_per_pair,
        merge_cosine=settings.merge_cosine,
        name_characters=settings.max_name_characters,
        seed=settings.seed,
    )


def _n_samples(context: Context) -> dict[str, int]:
    return {name: len(ids) for name, ids in _samples(context).items()}


def _samples(context: Context) -> dict[str, list[str]]:
    """Images for all rounds."""
    settings = context.settings.concepts
    images = accepted(context.run.read_images())
    return sample_training_images(images, settings.samples_per_class * settings.rounds, settings.seed)


def sample_training_images(images: pd.DataFrame, n_per_class: int, seed: int) -> dict[str, list[str]]:
    """Class name → image ids sampled from the training split only; near duplicates are left out."""
    usable = images[images["near_duplicate_of"].isna()]
    if usable["label"].notna().any():
        usable = usable[(usable["split"] == Split.TRAIN) & usable["label"].notna()]
        groups = {str(name): ids for name, ids in usable.groupby("label")["image_id"]}
    else:
        groups = {UNLABELLED: usable["image_id"]}
    chosen = {}
    for name, ids in groups.items():
        # Sorted first: the sample must not depend on the order of the table.
        pool = sorted(ids)
        chosen[name] = random.Random(f"{seed}:{name}").sample(pool, min(n_per_class, len(pool)))
    return chosen


def read_concepts(path: Path) -> pd.DataFrame:
    """The user's own concepts: CSV with `name[,definition,group,synonyms,contrast]`, or text with one name a line.

    Several synonyms stand in one cell, separated by `;`.

    Raises:
        ConfigurationError: the file is missing, empty, names a concept twice, or has no column `name`.
    """
    if not path.is_file():
        raise ConfigurationError(f"--concepts: expected a file, found none at {path}.")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".csv":
        rows = list(csv.DictReader(text.splitlines()))
        if rows and "name" not in rows[0]:
            raise ConfigurationError(f"{path}: expected a column 'name', got {', '.join(map(str, rows[0]))}.")
    else:
        rows = [{"name": line} for line in text.splitlines()]
    rows = [row for row in rows if (row.get("name") or "").strip() and not row["name"].lstrip().startswith("#")]
    ids = [slug(row["name"]) for row in rows]
    twice = sorted({concept_id for concept_id in ids if ids.count(concept_id) > 1})
    if not rows or twice:
        problem = f"concept {twice[0]!r} is named twice" if twice else "no concept is named"
        raise ConfigurationError(f"{path}: expected one concept a line, each once; {problem}.")
    return pd.DataFrame(
        {
            "concept_id": ids,
            "name": [row["name"].strip() for row in rows],
            "definition": [(row.get("definition") or "").strip() for row in rows],
            "group": pd.array([(row.get("group") or "").strip() or None for row in rows], dtype="str"),
            "proposed_for": [[] for _ in rows],
            "origin": ConceptOrigin.USER.value,
            "status": ConceptStatus.KEPT.value,
            "reason": pd.array([None] * len(rows), dtype="str"),
            "nearest": pd.array([None] * len(rows), dtype="str"),
            "similarity": pd.array([None] * len(rows), dtype="Float64"),
            "position": range(len(rows)),
            "synonyms": [[s.strip() for s in (row.get("synonyms") or "").split(";") if s.strip()] for row in rows],
            "contrast": [(row.get("contrast") or "").strip() for row in rows],
            "provenance": [[f"given in {path.name}"] for _ in rows],
        }
    )


CONCEPTS_STEP = Step("concepts", "Finding concepts", _inputs, _work)
