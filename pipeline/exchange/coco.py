"""COCO-style JSON: concepts are categories, and an annotation is one concept in one image.

COCO knows no image-level labels: these annotations have no box. What the label is stands in `attributes`, so that
absent, uncertain and present do not collapse into "annotated".
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from data_contracts.concepts import Vocabulary
from data_contracts.files import write_with
from pipeline.exchange.records import Address, Cell, Record, as_json


def write_coco(path: Path, found: Iterable[Record], address: Address, vocabulary: Vocabulary, name: str) -> int:
    """Write one JSON file; returns the number of images. Annotations are not held in memory beside each other."""
    count = 0

    def fill(temporary: Path) -> None:
        nonlocal count
        spilled = temporary.with_name(temporary.name + ".annotations")
        try:
            with temporary.open("w", encoding="utf-8") as file, spilled.open("w+", encoding="utf-8") as annotations:
                count = _write(file, annotations, found, address, vocabulary, name)
        finally:
            spilled.unlink(missing_ok=True)

    write_with(path, fill)
    return count


def _write(
    file: TextIO, annotations: TextIO, found: Iterable[Record], address: Address, vocabulary: Vocabulary, name: str
) -> int:
    head = {"description": f"Concept labels of {name}, by medmicn. No boxes: labels are of whole images."}
    file.write(f'{{"info": {as_json(head)},\n"licenses": [],\n"categories": {as_json(_categories(vocabulary))},\n')
    file.write('"images": [')
    n_images = n_annotations = 0
    for record in found:
        n_images += 1
        file.write(("," if n_images > 1 else "") + "\n" + as_json(_image(record, n_images, address)))
        for cell in record.cells:
            n_annotations += 1
            item = _annotation(cell, n_annotations, n_images, vocabulary)
            annotations.write(("," if n_annotations > 1 else "") + "\n" + as_json(item))
    file.write('\n],\n"annotations": [')
    annotations.seek(0)
    for line in annotations:
        file.write(line)
    file.write("\n]}\n")
    return n_images


def _categories(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    return [
        {
            "id": position + 1,
            "name": concept.name,
            "supercategory": concept.group or "concept",
            "concept_id": concept.concept_id,
            "definition": concept.definition,
        }
        for position, concept in enumerate(vocabulary)
    ]


def _image(record: Record, number: int, address: Address) -> dict[str, Any]:
    return {
        "id": number,
        "file_name": address(record),
        "width": record.width_px,
        "height": record.height_px,
        "image_id": record.image_id,
        "class": record.label,
        "split": record.split,
    }


def _annotation(cell: Cell, number: int, image_number: int, vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image_number,
        "category_id": vocabulary.position(cell.concept_id) + 1,
        "score": round(cell.probability, 4),
        "attributes": {"state": cell.state, "decided_by": cell.decided_by},
    }
