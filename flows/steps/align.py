"""The align step: a CLIP-like model looks for every concept in the pixels of every image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from data_contracts.errors import ImageRejected, StepFailed
from data_contracts.manifest import content_hash
from data_contracts.tables import Split, State, Witness, vocabulary_of
from flows.chain import Context, ShardRunner, Step, StepResult
from flows.devices import resolve_device
from flows.ledger import asked_concepts
from flows.steps.honesty import tested_witnesses
from flows.steps.images import accepted, image_reader
from flows.steps.localisation import LOCALISATION_CSV, read_marked, regions_fingerprint, write_localisation

if TYPE_CHECKING:
    from annotation.alignment.options import AlignOptions


def _inputs(context: Context) -> Mapping[str, Any]:
    images = accepted(context.run.read_images())
    return {
        "images": content_hash({"ids": images["image_id"].tolist()}),
        "vocabulary": vocabulary_of(asked_concepts(context.run.read_concepts())).sha256,
        "ledger": sorted(path.name for path in context.run.judgements_dir.glob("part-*.parquet")),
        "settings": context.settings.align.model_dump(mode="json", exclude={"device", "batch_size", "regions"}),
        "regions": regions_fingerprint(context),
    }


def _work(context: Context, _shards: ShardRunner) -> StepResult:
    from annotation.alignment.align import align
    from annotation.alignment.inputs import AlignmentInputs

    run = context.run
    images = accepted(run.read_images())
    judgements, groups = without_people_on_test(run.read_judgements(), images), _groups(images)
    inputs = AlignmentInputs(
        images["image_id"].tolist(),
        image_reader(context),
        vocabulary_of(asked_concepts(run.read_concepts())),
        judgements,
        _options(context),
        run.cache_dir,
        groups,
    )
    if inputs.options.adapts:
        _require_answers(judgements)
    regions = read_marked(context, inputs)
    unread: list[str] = []

    def note(image_id: str, error: ImageRejected) -> None:
        unread.append(f"image {image_id[:12]} was not aligned: {error.reason}")

    with context.console.bar("aligning", len(images)) as advance:
        n_rows = run.write_alignment(align(inputs, advance=advance, on_rejected=note))
    localisation = None if regions is None else write_localisation(context, images, inputs, regions, groups)
    tested = tested_witnesses(context, images, inputs, groups, localisation)
    counts: dict[str, float] = {
        "cells": n_rows,
        "images": len(images) - len(unread),
        "concepts": len(inputs.vocabulary),
        "unseen_concepts": _drop_unseen(context),
        "refused": len(tested.refusals),
        "untested": tested.n_untested,
    }
    files = [*run.alignment_parts(), *tested.files]
    files += [run.path / LOCALISATION_CSV] if localisation is not None else []
    shown = {name: n for name, n in counts.items() if n or name in ("cells", "images", "concepts")}
    return StepResult(files, shown, [*unread, *tested.refusals, *tested.untested])


def _options(context: Context) -> AlignOptions:
    from annotation.alignment.options import AlignOptions

    settings = context.settings.align
    return AlignOptions(
        model=settings.model,
        device=resolve_device(settings.device),
        batch_size=settings.batch_size,
        shard_size=context.settings.flow.shard_size,
        n_folds=settings.n_folds,
        seed=settings.seed,
        templates=settings.templates,
        value_features=settings.value_features,
        tile_above=settings.tile_above,
        tile_overlap=settings.tile_overlap,
        max_tiles_per_side=settings.max_tiles_per_side,
    )


def _require_answers(judgements: pd.DataFrame) -> None:
    """Raise `StepFailed` where everything was asked in vain: there is nothing that an aligner could be fitted to."""
    if not len(judgements) or (judgements["state"] != State.NOT_ASSESSED).any():
        return
    cells = judgements.drop_duplicates(["image_id", "concept_id", "witness_model"], keep="last")
    reasons = ", ".join(f"{n} {code}" for code, n in cells["evidence"].value_counts().items())
    raise StepFailed(
        f"Judging: expected a usable answer about some image and concept, got none ({reasons}); no label was made, and "
        "every answer is in the journal.",
        remedy="Check vlm.base_url and vlm.model, choose a model that follows instructions, or give it more room with "
        "vlm.max_output_tokens.",
    )


def without_people_on_test(judgements: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """The judgements that heads may be fitted to: what people say of test images stays out of every fit."""
    test = set(images.loc[images["split"] == Split.TEST, "image_id"])
    by_person = judgements["witness"].isin([Witness.EXPERT, Witness.GIVEN])
    return judgements[~(by_person & judgements["image_id"].isin(test))]


def _groups(images: pd.DataFrame) -> dict[str, str]:
    """Image id → what must stay on one side of a fit: the patient, or the cluster of near duplicates."""
    group = images["group_id"].fillna(images["near_duplicate_of"]).fillna(images["image_id"])
    return dict(zip(images["image_id"], group, strict=True))


def _drop_unseen(context: Context) -> int:
    """The paper's projection filter, where a threshold is configured; returns how many concepts it dropped."""
    minimum = context.settings.concepts.projection_min_similarity
    if minimum is None:
        return 0
    from annotation.filter import FilterOptions, drop_unseen

    best = context.run.read_alignment_scores().groupby("concept_id")["similarity"].max().to_dict()
    before = asked_concepts(context.run.read_concepts())
    after = drop_unseen(before, best, FilterOptions(projection_min_similarity=minimum))
    context.run.write_concepts(after)
    return int((before["status"] != after["status"]).sum())


ALIGN = Step("align", "Aligning concepts with pixels", _inputs, _work)
