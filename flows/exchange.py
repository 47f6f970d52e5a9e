"""The labels of a run, written for another program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from data_contracts.errors import ImageRejected
from data_contracts.files import write_bytes, write_text
from data_contracts.pixels import encode
from flows.chain import Context
from flows.steps.images import accepted, image_reader
from pipeline.exchange.coco import write_coco
from pipeline.exchange.fiftyone import write_fiftyone
from pipeline.exchange.label_studio import labelling_config, tasks
from pipeline.exchange.records import Address, Record, records, write_json_list

Program = Literal["label-studio", "fiftyone", "coco"]
PIXELS_FOLDER = "pixels"
PIXELS_SIDE_PX = 2048
_SHOWN_EVERYWHERE = frozenset({"PNG", "JPEG", "BMP", "WEBP"})


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    n_images: int
    n_unreadable: int
    """Images whose pixels could not be written."""
    n_foreign: int
    """Images in formats that browsers do not show, such as DICOM; 0 where pixels were written."""
    next_steps: tuple[str, ...]


def export_labels(context: Context, program: Program, folder: Path, *, pixels: bool) -> Exported:
    """Write the run's labels for `program` into `folder`.

    With `pixels`, images are re-encoded as PNG under their ids, without names or metadata; otherwise the export
    refers to the files of SOURCE.
    """
    run = context.run
    images, vocabulary = run.read_images(), run.vocabulary()
    unreadable: set[str] = set()
    found = records(images, run.read_labels(), vocabulary)
    if pixels:
        found = _with_pixels(context, found, folder, unreadable)
    address = _address(context, program, pixels=pixels)
    if program == "label-studio":
        write_text(folder / "labelling.xml", labelling_config(vocabulary))
        n_images = write_json_list(folder / "tasks.json", tasks(found, address, f"medmicn {run.path.name}"))
    elif program == "fiftyone":
        n_images = write_fiftyone(folder, found, address, vocabulary)
    else:
        n_images = write_coco(folder / "coco.json", found, address, vocabulary, run.path.name)
    foreign = 0 if pixels else int((~accepted(images)["format"].str.upper().isin(_SHOWN_EVERYWHERE)).sum())
    return Exported(folder, n_images, len(unreadable), foreign, _next_steps(context, program, folder, pixels=pixels))


def _with_pixels(context: Context, found: Iterator[Record], folder: Path, unreadable: set[str]) -> Iterator[Record]:
    """The records whose pixels could be written."""
    read = image_reader(context)
    with context.console.bar("writing pixels", None) as advance:
        for record in found:
            path = folder / PIXELS_FOLDER / f"{record.file_stem}.png"
            try:
                if not path.is_file():  # ids are hashes of the image: a file that is there is the right one
                    write_bytes(path, encode(read(record.image_id), PIXELS_SIDE_PX))
            except ImageRejected as error:
                context.console.warn(f"image {record.image_id[:12]} was left out: {error.reason}")
                unreadable.add(record.image_id)
                continue
            finally:
                advance(1)
            yield record


def _address(context: Context, program: Program, *, pixels: bool) -> Address:
    def relative(record: Record) -> str:
        return f"{PIXELS_FOLDER}/{record.file_stem}.png" if pixels else record.path

    if program == "label-studio":
        return lambda record: f"/data/local-files/?d={quote(relative(record))}"
    if program == "fiftyone" and not pixels:
        source = context.source
        return lambda record: str(source / record.path)
    return relative


def _next_steps(context: Context, program: Program, folder: Path, *, pixels: bool) -> tuple[str, ...]:
    if program == "fiftyone":
        return (f"python {folder / 'load.py'}   (where FiftyOne is installed)",)
    if program == "coco":
        return ()
    root = folder if pixels else context.source
    return (
        f"LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={root} label-studio",
        f"paste {folder / 'labelling.xml'} as labelling interface, import {folder / 'tasks.json'}",
        "export as CSV when done, then: medmicn import-labels FILE.csv --reviewer NAME",
    )
