"""Saliency maps: drawn as PNG for a few images, and tested on more: agreement, deletion, insertion, with controls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from data_contracts.errors import ImageRejected, InputRefused, StepFailed
from data_contracts.files import write_bytes
from data_contracts.pixels import encode
from data_contracts.ports import Pixels
from data_contracts.spreadsheet import write_csv
from data_contracts.store import RunFolder
from flows.chain import Context, StepResult
from flows.steps.images import image_reader
from flows.steps.localisation import regions_path

if TYPE_CHECKING:
    from model.predict import Classifier, Prediction

MAPS_FILE = "maps.csv"
ALIGNMENT_FILE = "map_alignment.csv"
EVIDENCE_FILE = "map_evidence.csv"
REGIONS_FILE = "map_regions.csv"
MAP_SIDE_PX = 448

_N_CONCEPTS = 3


def write_maps(context: Context, classifier: Classifier) -> StepResult:
    """Maps as PNG for a few held-out images of each class, listed in `maps.csv`."""
    rows: list[dict[str, str]] = []
    warnings: list[str] = []
    chosen = chosen_images(context, n_per_class=context.settings.explain.n_maps_per_class)
    read, folder = image_reader(context), context.run.explanations_dir
    with context.console.bar("drawing maps", len(chosen)) as advance:
        for image_id in chosen:
            try:
                pixels = read(image_id)
                rows += draw_maps(classifier, image_id, pixels, _explained(context, classifier, [pixels])[0], folder)
            except ImageRejected as error:
                warnings.append(f"image {image_id[:12]} has no map: {error.reason}")
            except InputRefused as error:
                warnings.append(f"image {image_id[:12]} has no map: {error.message}")
            advance(1)
    maps = pd.DataFrame(rows, columns=["image_id", "target", "file", "caption"])
    write_csv(folder / MAPS_FILE, maps)
    outputs = [folder / MAPS_FILE, *(folder / name for name in maps["file"])]
    return StepResult(outputs, {"maps": len(maps)}, warnings)


def draw_maps(
    classifier: Classifier, image_id: str, pixels: Pixels, prediction: Prediction, folder: Path
) -> list[dict[str, str]]:
    """Write a prediction's class map and concept maps to `folder/maps`; one row a map: what it is, and where.

    Names hold the image's id, a hash of its bytes; the PNG is encoded anew and holds nothing but pixels.
    """
    from model.explain.saliency import overlay

    titles = {"class": f"{prediction.class_name} ({prediction.confidence:.2f})"} | {
        concept_id: f"{classifier.vocabulary[concept_id].name} ({prediction.concept_probabilities[concept_id]:.2f})"
        for concept_id in prediction.concept_maps
    }
    maps = dict(prediction.concept_maps)
    if prediction.class_map is not None:
        maps["class"] = prediction.class_map
    rows = []
    for target, heat in maps.items():
        name = f"maps/{image_id[:16]}{_frame_of(image_id)}-{target}.png"
        write_bytes(folder / name, encode(overlay(pixels, heat), MAP_SIDE_PX))
        rows.append({"image_id": image_id, "target": target, "file": name, "caption": titles[target]})
    return rows


def write_map_evidence(context: Context, classifier: Classifier) -> StepResult:
    """`map_alignment.csv`, one row a map, and `map_evidence.csv`, one row a question with its control."""
    from model.explain.maps import MapOptions, map_evidence

    settings, folder = context.settings.explain, context.run.explanations_dir
    if not settings.n_map_evidence_images:
        return StepResult()
    frame = context.run.read_dataset().frame
    chosen = chosen_images(context, n_images=settings.n_map_evidence_images)
    groups = frame.dropna(subset=["group_id"]).set_index("image_id")["group_id"].to_dict()
    options = MapOptions(tuple(settings.map_methods), _N_CONCEPTS)
    with context.console.bar("testing maps", len(chosen) * len(options.methods)) as advance:
        found = map_evidence(
            classifier,
            chosen,
            image_reader(context),
            options,
            clip_maps=aligner_maps(context.run, chosen),
            groups=groups,
            advance=advance,
        )
    write_csv(folder / ALIGNMENT_FILE, found.table.round(4))
    write_csv(folder / EVIDENCE_FILE, _with_caution(context, found.summary).round(4))
    return StepResult(
        [folder / ALIGNMENT_FILE, folder / EVIDENCE_FILE], {"maps_tested": len(found.table)}, found.warnings
    )


def write_region_overlap(context: Context, classifier: Classifier) -> StepResult:
    """`map_regions.csv`: concept maps of held-out images against regions that people marked, where `align.regions` is.

    Columns are those of `model.explain.regions`; `by_chance` is what a map that knows nothing would score.
    """
    from model.explain.regions import region_table
    from model.explain.saliency import concept_maps
    from pipeline.regions import read_regions

    path = context.run.explanations_dir / REGIONS_FILE
    path.unlink(missing_ok=True)
    where, vocabulary = regions_path(context), classifier.vocabulary
    if where is None or not classifier.has_concepts:
        return StepResult()
    regions = read_regions(where, context.run.read_images(), vocabulary)
    marked: dict[str, list[str]] = {}
    for image_id, concept_id in sorted(regions.cells):
        marked.setdefault(image_id, []).append(concept_id)
    in_turn = chosen_images(context, n_images=len(context.run.read_dataset()))
    chosen = [i for i in in_turn if i in marked][: context.settings.explain.n_map_evidence_images]
    read, method = image_reader(context), context.settings.explain.map_methods[0]
    tables: list[pd.DataFrame] = []
    warnings: list[str] = []
    with context.console.bar("comparing maps with regions", len(chosen)) as advance:
        for image_id in chosen:
            try:
                maps = concept_maps(classifier, read(image_id), marked[image_id], method=method)
            except InputRefused as error:
                warnings.append(f"image {image_id[:12]} is not compared with its regions: {error.message}")
                continue
            masks = {(image_id, c): mask for c in maps if (mask := regions.mask(image_id, c)).any()}
            tables.append(region_table({(image_id, c): heat for c, heat in maps.items()}, masks))
            advance(1)
    if not tables:
        return StepResult(warnings=[*warnings, "no held-out image has a marked region to compare its maps with."])
    table = pd.concat(tables, ignore_index=True)
    write_csv(path, table.round(4))
    return StepResult([path], {"regions_compared": len(table)}, warnings)


def _with_caution(context: Context, summary: pd.DataFrame) -> pd.DataFrame:
    """The summary, saying where network and aligner look through the same eyes."""
    if not (context.settings.align.model == "embedded" and context.settings.train.backbone == "embedded"):
        return summary
    with_aligner = summary["measure"].str.contains("aligner")
    caution = " Here both read the same frozen backbone, so that some agreement comes of itself."
    return summary.assign(meaning=summary["meaning"].where(~with_aligner, summary["meaning"] + caution))


def aligner_maps(run: RunFolder, image_ids: Collection[str]) -> dict[tuple[str, str], np.ndarray]:
    """The aligner's heatmap (h, w) of every concept of these images, by (image id, concept id); parts one by one."""
    found = {}
    for part in run.iterate_alignment(["image_id", "concept_id", "grid_h", "grid_w", "heatmap"]):
        ids = pc.cast(sorted(image_ids), part.schema.field("image_id").type)
        for row in part.filter(pc.is_in(part.column("image_id"), value_set=ids)).to_pylist():
            if row["grid_h"] * row["grid_w"] > 1:
                heat = np.asarray(row["heatmap"], np.float32).reshape(row["grid_h"], row["grid_w"])
                found[row["image_id"], row["concept_id"]] = heat
    return found


def chosen_images(context: Context, *, n_per_class: int | None = None, n_images: int | None = None) -> list[str]:
    """Held-out images: so many of each class, or so many in all with the classes in turn.

    By id, which is a hash: a sample that is drawn as if at random, and the same one every time. Raises `StepFailed`
    where the split has no image.
    """
    frame = context.run.read_dataset().frame
    held_out = frame[frame["split"] == context.settings.explain.split].sort_values("image_id")
    if held_out.empty:
        raise StepFailed(
            f"Explanations: expected images in the {context.settings.explain.split} split, found none.",
            remedy="Choose the other one: --set explain.split=val.",
        )
    turn = held_out.groupby("label").cumcount()
    if n_per_class is not None:
        return held_out.loc[turn < n_per_class, "image_id"].tolist()
    return held_out.assign(turn=turn).sort_values(["turn", "image_id"])["image_id"].head(n_images or 0).tolist()


def _explained(context: Context, classifier: Classifier, images: Sequence[Pixels]) -> list[Prediction]:
    return classifier.predict(
        images, maps=True, n_concept_maps=_N_CONCEPTS, map_method=context.settings.explain.map_methods[0]
    )


def _frame_of(image_id: str) -> str:
    """`_3` for the third frame of a file: the start of the id is the file's, not the frame's."""
    _, mark, frame = image_id.partition("#")
    return f"_{frame}" if mark else ""
