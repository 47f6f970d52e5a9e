"""FiftyOne: a `FiftyOneImageClassificationDataset`, with every concept of an image in one multi-label field."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_contracts.concepts import Vocabulary
from data_contracts.files import write_text
from data_contracts.tables import State
from pipeline.exchange.records import Address, Cell, Record, as_json

CONCEPTS_JSON, CLASSES_JSON, DATA_JSON = "labels.json", "classes.json", "data.json"

LOAD_PY = '''"""Open this export in FiftyOne: python load.py"""

from pathlib import Path

import fiftyone as fo

FOLDER = Path(__file__).resolve().parent
KIND = fo.types.FiftyOneImageClassificationDataset

dataset = fo.Dataset()
for labels, field in (("labels.json", "concepts"), ("classes.json", "ground_truth")):
    if (FOLDER / labels).exists():
        dataset.merge_dir(
            dataset_dir=str(FOLDER), dataset_type=KIND, data_path="data.json", labels_path=labels, label_field=field
        )
if __name__ == "__main__":
    fo.launch_app(dataset).wait()
'''
"""Written beside the export, so that nobody has to know the format's name."""


def write_fiftyone(folder: Path, found: Iterable[Record], address: Address, vocabulary: Vocabulary) -> int:
    """Write `labels.json`, `classes.json`, `data.json` and `load.py`; returns the number of images.

    An uncertain concept is there with the tag `uncertain`; one that is absent is not.
    """
    concepts: dict[str, list[dict[str, Any]]] = {}
    classes: dict[str, str] = {}
    places: dict[str, str] = {}
    for record in found:
        shown = [*record.of_state(State.PRESENT), *record.of_state(State.UNCERTAIN)]
        concepts[record.file_stem] = [_classification(cell, vocabulary) for cell in shown]
        places[record.file_stem] = address(record)
        if record.label is not None:
            classes[record.file_stem] = record.label
    _write(folder / CONCEPTS_JSON, {"classes": list(vocabulary.names), "labels": concepts})
    _write(folder / DATA_JSON, places)
    if classes:
        _write(folder / CLASSES_JSON, {"classes": sorted(set(classes.values())), "labels": classes})
    write_text(folder / "load.py", LOAD_PY)
    return len(concepts)


def _classification(cell: Cell, vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "label": vocabulary[cell.concept_id].name,
        "confidence": round(cell.probability, 4),
        "attributes": {
            "concept_id": cell.concept_id,
            "decided_by": cell.decided_by,
            "tags": ["uncertain"] if cell.state == State.UNCERTAIN else [],
        },
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text(path, as_json(content))
