"""The concepts step: given, taken from a file, or proposed by the vision-language model, then filtered."""

from __future__ import annotations

import asyncio
import csv
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from annotation.vlm.budget import Budget
from data_contracts.concepts import slug
from data_contracts.errors import ConfigurationError, StepFailed
from data_contracts.files import sha256_of_file
from data_contracts.tables import CONCEPTS, ConceptOrigin, ConceptStatus, Split
from flows.chain import Context, ShardRunner, Step, StepResult
from flows.ledger import merge_concepts, was_given
from flows.steps.images import accepted, image_reader

UNLABELLED = "images"
"""Stands for the class where a folder has none."""


def _inputs(context: Context) -> Mapping[str, Any]:
    # Images are no input: a vocabulary stays as it is when images are added, so that labels stay comparable.
    vlm, run = context.settings.vlm, context.run
    file = context.settings.concepts.file
    return {
        "settings": context.settings.concepts.model_dump(mode="json"),
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
    cost = 0.0
    if settings.file is not None:
        concepts = merge_concepts(
            stored if stored is not None and was_given(stored) else None, read_concepts(settings.file)
        )
    elif stored is not None and was_given(stored):
        concepts = stored
    else:
        concepts, cost = _proposed(context)
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
    return StepResult([], {"concepts_kept": int(kept.sum()), "dropped": int((~kept).sum())}, cost_usd=cost)


def _proposed(context: Context) -> tuple[pd.DataFrame, float | None]:
    """Proposed and filtered concepts, and what the endpoint charged."""
    from annotation.filter import FilterOptions, filter_concepts
    from annotation.propose import ProposeOptions, propose
    from annotation.text import minilm_embedder
    from flows.vlm import open_client

    settings, source = context.settings.concepts, context.settings.source
    images = accepted(context.run.read_images())
    samples = sample_training_images(images, settings.samples_per_class, settings.seed)
    budget = Budget(context.settings.vlm)

    async def ask() -> pd.DataFrame:
        async with open_client(context, budget) as client:
            return await propose(
                samples,
                image_reader(context),
                client,
                source.modality,
                ProposeOptions(
                    n_per_class=settings.samples_per_class,
                    n_concepts=settings.proposed_per_class,
                    name_characters=settings.max_name_characters,
                    seed=settings.seed,
                ),
            )

    proposed = asyncio.run(ask())
    options = FilterOptions(
        max_name_characters=settings.max_name_characters,
        like_class_cosine=settings.like_class_cosine,
        like_each_other_cosine=settings.like_each_other_cosine,
    )
    class_names = [name for name in samples if name != UNLABELLED]
    return filter_concepts(proposed, class_names, minilm_embedder(), options), budget.spent_usd


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
    """The user's own concepts: CSV with `name[,definition,group]`, or text with one name a line.

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
        }
    )


CONCEPTS_STEP = Step("concepts", "Finding concepts", _inputs, _work)
