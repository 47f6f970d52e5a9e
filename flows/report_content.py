"""Everything a run knows, gathered for the report page. Missing parts stay empty: half a run has a report too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from PIL import Image

from data_contracts.errors import ImageRejected, InputRefused
from data_contracts.ports import PixelReader
from data_contracts.spreadsheet import read_csv
from data_contracts.store import RunFolder
from flows.chain import Context
from flows.compared import systems_for_report
from flows.steps.fuse import AGREEMENT_CSV, LEAKS_CSV
from flows.steps.images import accepted, image_reader
from flows.summary import metrics_of
from pipeline.report.content import ConceptExamples, ReportContent, Tile
from pipeline.report.evidence import EVIDENCE, TRUST, Spec

_TILES_PER_ROW = 3
_CLASS_TILES = 4
_SHOWN_DISAGREEMENTS = 12
TRUTH_AGREEMENT_CSV = "truth_agreement.csv"


class _Cell(NamedTuple):
    image_id: str
    concept_id: str
    caption: str


def gather(context: Context) -> ReportContent:
    """The content of `report.html` for this run."""
    run, manifest = context.run, context.run.read_manifest()
    images = _optional(run.read_images)
    labels = _optional(run.read_labels)
    metrics = metrics_of(run)
    test = metrics.get("test", {})
    read = image_reader(context)
    return ReportContent(
        name=manifest.name,
        made_at=datetime.now(UTC),
        modality=context.settings.source.modality,
        synthetic=manifest.synthetic,
        images=images,
        class_examples=_class_examples(images, read),
        concepts=_optional(run.read_concepts),
        labels=labels,
        agreement=_agreement(run),
        leaks=_csv(run.path / LEAKS_CSV),
        trust=_trust(run),
        label_reliability=_label_reliability(run),
        examples=_concept_examples(run, labels, read),
        history=_csv(run.model_dir / "curves.csv"),
        chosen_epochs={int(seed): int(epoch) for seed, epoch in metrics.get("chosen_epochs", {}).items()},
        metrics=_scalars(metrics),
        per_class=_frame(test.get("per_class")),
        confusion=_confusion(test, metrics.get("class_names")),
        calibration=_frame(test.get("calibration")),
        concept_metrics=_frame(test.get("concepts")),
        systems=systems_for_report(run.path / "comparison.csv"),
        rules=_csv(run.explanations_dir / "rules.csv"),
        evidence=_evidence(run),
        evidence_pictures=_evidence_pictures(run),
        rules_text=_text_of(run.explanations_dir / "rules.txt"),
        concept_use_text=_text_of(run.explanations_dir / "concept_use.md"),
        saliency=_saliency(run),
        manifest=manifest.model_dump(mode="json"),
        limits=_limits(run, manifest.synthetic),
    )


def _tables(run: RunFolder, specs: Mapping[str, Spec]) -> dict[str, pd.DataFrame]:
    found = {name: _csv(run.path / spec.file) for name, spec in specs.items()}
    return {name: table for name, table in found.items() if table is not None}


def _trust(run: RunFolder) -> dict[str, pd.DataFrame]:
    """Tables about the labels: of an audit the fused labels' rows, of disagreements the first."""
    found = _tables(run, TRUST)
    if "audit" in found:
        found["audit"] = found["audit"][found["audit"]["witness"] == "fused"]
    if "disagreements" in found:
        head = found["disagreements"].head(_SHOWN_DISAGREEMENTS)
        # Never a file name: those can name patients.
        found["disagreements"] = head.assign(image=head["image_id"].str[:8])
    return found


def _label_reliability(run: RunFolder) -> pd.DataFrame | None:
    table = _csv(run.path / "reliability.csv")
    return None if table is None else table[table["source"] == "fused"]


def _evidence(run: RunFolder) -> dict[str, pd.DataFrame]:
    """Tables about the classifier: of the reject option the threshold in use."""
    found = _tables(run, EVIDENCE)
    if "reject" in found:
        found["reject"] = found["reject"][found["reject"]["in_use"].astype(bool)]
    return found


def _evidence_pictures(run: RunFolder) -> list[tuple[str, bytes]]:
    shown = {
        "interventions.png": "Accuracy when a person corrects concepts, rightly and wrongly",
        "knock_out.png": "Accuracy that is lost when one concept is hidden",
    }
    paths = {run.explanations_dir / name: text for name, text in shown.items()}
    return [(text, path.read_bytes()) for path, text in paths.items() if path.is_file()]


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    spread = metrics.get("test", {}).get("over_seeds", {})
    return {name: value for name, value in spread.items() if value.get("mean") is not None}


def _confusion(saved: Mapping[str, Any], names: list[str] | None) -> pd.DataFrame | None:
    matrix = saved.get("confusion")
    return pd.DataFrame(matrix, index=names, columns=names) if matrix and names else None


def _agreement(run: RunFolder) -> pd.DataFrame | None:
    between = _csv(run.path / AGREEMENT_CSV)
    tables = [between.rename(columns={"witness": "first", "reference": "second"})] if between is not None else []
    truth = _csv(run.path / TRUTH_AGREEMENT_CSV)
    if truth is not None:
        # The comparison with the truth stands first: it is the one the overview shows.
        known = truth.dropna(subset=["kappa"])
        tables.insert(0, known.assign(first="label", second="known truth"))
    found = [table for table in tables if len(table)]
    return pd.concat(found, ignore_index=True) if found else None


def _class_examples(images: pd.DataFrame | None, read: PixelReader) -> dict[str, list[Tile]]:
    if images is None or images["label"].isna().all():
        return {}
    shown = accepted(images).dropna(subset=["label"])
    return {
        str(name): _tiles([_Cell(i, "", f"{i[:8]}") for i in rows["image_id"].sort_values().head(_CLASS_TILES)], read)
        for name, rows in shown.groupby("label")
    }


def _concept_examples(run: RunFolder, labels: pd.DataFrame | None, read: PixelReader) -> dict[str, ConceptExamples]:
    if labels is None or labels.empty:
        return {}
    chosen = {str(concept_id): _chosen(rows) for concept_id, rows in labels.groupby("concept_id")}
    maps = _heatmaps(run, {(c.image_id, c.concept_id) for rows in chosen.values() for row in rows for c in row})
    return {
        concept_id: ConceptExamples(*(_tiles(row, read, maps) for row in rows)) for concept_id, rows in chosen.items()
    }


def _chosen(rows: pd.DataFrame) -> tuple[list[_Cell], list[_Cell], list[_Cell]]:
    """Strongest, weakest and most disputed images of one concept; ties go by image id, so that pages repeat."""
    strongest = rows.sort_values(["probability", "image_id"], ascending=[False, True])
    weakest = rows.sort_values(["probability", "image_id"])
    disputed = rows[rows["disagreement"] > 0].sort_values(["disagreement", "image_id"], ascending=[False, True])
    return _cells(strongest), _cells(weakest), _cells(disputed)


def _cells(rows: pd.DataFrame) -> list[_Cell]:
    return [
        _Cell(row.image_id, row.concept_id, f"{row.image_id[:8]} · p {row.probability:.2f}")
        for row in rows.head(_TILES_PER_ROW).itertuples()
    ]


def _heatmaps(run: RunFolder, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], np.ndarray]:
    """Heatmaps (h, w) of these cells only; parts are read one by one."""
    image_ids = sorted({image_id for image_id, _ in wanted})
    found = {}
    for part in run.iterate_alignment(["image_id", "concept_id", "grid_h", "grid_w", "heatmap"]):
        near = part.filter(
            pc.is_in(part.column("image_id"), value_set=pc.cast(image_ids, part.schema.field("image_id").type))
        )
        for row in near.to_pylist():
            key = (row["image_id"], row["concept_id"])
            if key in wanted and row["grid_h"] * row["grid_w"] > 1:
                found[key] = np.asarray(row["heatmap"], np.float32).reshape(row["grid_h"], row["grid_w"])
    return found


def _tiles(
    cells: Sequence[_Cell], read: PixelReader, maps: Mapping[tuple[str, str], np.ndarray] | None = None
) -> list[Tile]:
    tiles = []
    for cell in cells:
        try:
            pixels = read(cell.image_id)
        except ImageRejected:
            # The file changed since it was ingested; the page goes on without its picture.
            continue
        tiles.append(Tile(cell.caption, pixels, (maps or {}).get((cell.image_id, cell.concept_id))))
    return tiles


def _saliency(run: RunFolder) -> list[Tile]:
    """The class maps that the explain step drew."""
    table = _csv(run.explanations_dir / "maps.csv")
    if table is None:
        return []
    drawn = [row for row in table.itertuples() if row.target == "class"]
    return [
        Tile(
            f"{row.image_id[:8]} · {row.caption}",
            np.asarray(Image.open(run.explanations_dir / row.file).convert("RGB")),
        )
        for row in drawn
        if (run.explanations_dir / row.file).is_file()
    ]


def _limits(run: RunFolder, synthetic: bool) -> list[str]:
    found = []
    if synthetic:
        found.append(
            "The images are generated. Numbers on this page say that the machinery works, nothing about patients."
        )
    judged = _optional(run.read_judgements)
    if judged is not None and len(judged) and not (judged["witness"] == "expert").any():
        found.append("No expert has looked at the labels of this run yet; agreement between machines is no truth.")
    if judged is not None and judged["witness_model"].str.startswith("medmicn-embedded").any():
        found.append(
            "Images were judged by the embedded model, which measures colour, size, shape and texture; "
            "it knows no medicine."
        )
    return found


def _frame(rows: list[dict[str, Any]] | None) -> pd.DataFrame | None:
    return pd.DataFrame(rows) if rows else None


def _csv(path: Path) -> pd.DataFrame | None:
    return read_csv(path) if path.is_file() else None


def _optional(read: Callable[[], pd.DataFrame]) -> pd.DataFrame | None:
    try:
        return read()
    except InputRefused:
        return None
