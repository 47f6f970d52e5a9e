"""Label Studio: one task an image, one choice (present, absent, uncertain) a concept.

The machine's labels are *predictions*, which an annotator may take over; those that an expert decided are
*annotations*. A CSV export of the finished project comes back with `medmicn import-labels`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from xml.etree import ElementTree

from data_contracts.concepts import Concept, Vocabulary
from data_contracts.tables import State, Witness
from pipeline.exchange.records import Address, Cell, Record

IMAGE = "picture"
"""Name of the image's tag, which every choice refers to. Not `image`: columns of the CSV are named by tags."""
SAYABLE = (State.PRESENT, State.ABSENT, State.UNCERTAIN)


def labelling_config(vocabulary: Vocabulary) -> str:
    """The XML that is pasted into the project's labelling interface."""
    view = ElementTree.Element("View", style="display: flex")
    left = ElementTree.SubElement(view, "View", style="flex: 60%; position: sticky; top: 0")
    ElementTree.SubElement(left, "Image", name=IMAGE, value="$image", zoom="true", zoomControl="true")
    right = ElementTree.SubElement(view, "View", style="flex: 40%; padding-left: 1em")
    for concept in vocabulary:
        _choice(right, concept)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"


def _choice(parent: ElementTree.Element, concept: Concept) -> None:
    ElementTree.SubElement(parent, "Header", value=concept.name, size="5")
    if concept.definition:
        ElementTree.SubElement(parent, "Header", value=concept.definition, size="6")
    choices = ElementTree.SubElement(
        parent, "Choices", name=concept.concept_id, toName=IMAGE, choice="single", showInline="true"
    )
    for state in SAYABLE:
        ElementTree.SubElement(choices, "Choice", value=state.value)


def tasks(found: Iterable[Record], address: Address, model_version: str) -> Iterator[dict[str, Any]]:
    """Label Studio's tasks: `data`, `predictions`, and `annotations` where an expert decided."""
    for record in found:
        sayable = [cell for cell in record.cells if cell.state in SAYABLE]
        by_expert = [cell for cell in sayable if cell.decided_by == Witness.EXPERT]
        task: dict[str, Any] = {
            "data": {
                "image": address(record),
                "image_id": record.image_id,
                **({"split": record.split} if record.split else {}),
            },
            "predictions": [
                {
                    "model_version": model_version,
                    "score": _least_sure(sayable),
                    "result": [_result(cell) for cell in sayable],
                }
            ],
        }
        if by_expert:
            task["annotations"] = [{"result": [_result(cell) for cell in by_expert]}]
        yield task


def _result(cell: Cell) -> dict[str, Any]:
    return {
        "id": cell.concept_id,
        "from_name": cell.concept_id,
        "to_name": IMAGE,
        "type": "choices",
        "score": _sureness(cell),
        "value": {"choices": [cell.state]},
    }


def _sureness(cell: Cell) -> float:
    return round(max(cell.probability, 1 - cell.probability), 4)


def _least_sure(cells: list[Cell]) -> float:
    """Label Studio orders tasks by this number: the image with the doubtful concept comes first."""
    return min(map(_sureness, cells), default=0.0)
