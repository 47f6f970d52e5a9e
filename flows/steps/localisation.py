"""Heatmaps against regions that people marked: part of the align step, where `align.regions` names them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from data_contracts.manifest import content_hash
from data_contracts.spreadsheet import write_csv
from flows.chain import Context

if TYPE_CHECKING:
    from annotation.alignment.inputs import AlignmentInputs
    from pipeline.regions import Regions

LOCALISATION_CSV = "localisation.csv"
_CELLS = ["image_id", "concept_id"]


def regions_path(context: Context) -> Path | None:
    """Where regions are, if anywhere: as given, else in SOURCE."""
    given = context.settings.align.regions
    return None if given is None else context.source / given  # an absolute path stays itself


def regions_fingerprint(context: Context) -> str | None:
    """Hash over the name, size and time of every file of regions."""
    path = regions_path(context)
    if path is None:
        return None
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    found = [(str(f.relative_to(path)), f.stat()) for f in files if f.is_file()]
    return content_hash({"files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]})


def read_marked(context: Context, inputs: AlignmentInputs) -> Regions | None:
    """The regions, completely checked; None where none are configured."""
    from pipeline.regions import read_regions

    path = regions_path(context)
    return None if path is None else read_regions(path, context.run.read_images(), inputs.vocabulary)


def write_localisation(
    context: Context, images: pd.DataFrame, inputs: AlignmentInputs, regions: Regions, groups: Mapping[str, str]
) -> pd.DataFrame:
    """`localisation.csv`, written and given back: every concept's maps against its regions, and null maps beside."""
    from annotation.trust.localisation import LocalisationOptions, localisation_table

    options = LocalisationOptions(margin=context.settings.align.honesty_margin)
    scores = _scores(context, inputs, regions)
    table = localisation_table(scores, inputs.vocabulary.ids, images, groups, options)
    write_csv(context.run.path / LOCALISATION_CSV, table)
    return table


def _scores(context: Context, inputs: AlignmentInputs, regions: Regions) -> pd.DataFrame:
    """image_id, concept_id and the scores of the map and its null, for every cell with a region."""
    from annotation.alignment.null_maps import NullMaps
    from annotation.trust.localisation import map_scores

    null_maps = NullMaps(inputs)
    rows = []
    for part in context.run.iterate_alignment([*_CELLS, "grid_h", "grid_w", "heatmap"]):
        keys = part.select(_CELLS).to_pandas()
        marked = [i for i, cell in enumerate(keys.itertuples(index=False, name=None)) if cell in regions.cells]
        found = part.take(marked).to_pandas()
        nulls = null_maps(found["image_id"].unique().tolist())
        for image_id, concept_id, height, width, heatmap in found.itertuples(index=False, name=None):
            mask = regions.mask(image_id, concept_id)
            if mask.any():
                own = heatmap.astype("float32").reshape(height, width)
                null = nulls[image_id][inputs.vocabulary.position(concept_id)]
                rows.append({"image_id": image_id, "concept_id": concept_id, **map_scores(own, null, mask)})
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=_CELLS)
