"""A SOURCE folder in, one `Entry` per image file out: which layout it is, and what it says of each image.

Layouts, in the order in which they are looked for: DDI, SkinCon or Fitzpatrick17k tables
(`layouts_skin`), a CSV that lists files (`layouts_csv`), class sub-folders, unlabelled images.
No image is opened here, but for the first bytes of files whose names say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from data_contracts.errors import RejectReason, SourceRefused
from data_contracts.tables import Split, State
from pipeline.decode import FOREIGN_EXTENSIONS, IMAGE_EXTENSIONS, sniff
from pipeline.paths import is_regular_file, table_path, walk

_PLAIN_NAMES = """
    csv tsv txt md rst json jsonl xml yaml yml toml ini html htm pdf doc docx xls xlsx parquet npy npz pkl pt pth
    h5 hdf5 mat zip gz tar 7z rar py ipynb sh log bib tex db sqlite license safetensors
"""
_PLAIN_EXTENSIONS = frozenset(f".{name}" for name in _PLAIN_NAMES.split())
"""Names that say "no image": passed over without a look inside."""

_WRAPPERS = frozenset({"images", "image", "imgs", "img", "data", "photos", "pictures", "dicom"})
SPLIT_WORDS = {
    "train": Split.TRAIN,
    "training": Split.TRAIN,
    "val": Split.VAL,
    "valid": Split.VAL,
    "validation": Split.VAL,
    "dev": Split.VAL,
    "test": Split.TEST,
    "testing": Split.TEST,
}


@dataclass(frozen=True)
class Entry:
    """One image file and what SOURCE says of it."""

    path: str
    """Relative to SOURCE, as `paths.table_path` writes it."""
    label: str | None = None
    split: Split | None = None
    group_id: str | None = None
    concepts: dict[str, State] = field(default_factory=dict)
    """Concept name → what SOURCE says; a concept that is not in here was not spoken of."""
    rejected: RejectReason | None = None
    """Why the file is not even opened (missing, excluded, contradictory)."""
    detail: str | None = None


@dataclass(frozen=True)
class SourceListing:
    """What lies in SOURCE, before any image is read."""

    layout: str
    """csv, class_folders, unlabelled, ddi, skincon_ddi or fitzpatrick17k."""
    root: Path
    entries: list[Entry]
    """Sorted by path; each path once."""
    concept_names: list[str] = field(default_factory=list)
    """Names of given concepts, in the order of their columns."""
    warnings: list[str] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    """The CSV files that were read."""


@dataclass(frozen=True)
class Files:
    """The image files under a SOURCE, to be found by path, by name, or by name without extension."""

    root: Path
    paths: list[str]
    """Relative, as the file system has them, sorted."""

    @cached_property
    def known(self) -> frozenset[str]:
        """The paths, for look-ups."""
        return frozenset(self.paths)

    @cached_property
    def by_name(self) -> dict[str, list[str]]:
        """File name → the paths that end with it."""
        return _grouped(self.paths, lambda path: path.rpartition("/")[2])

    @cached_property
    def by_stem(self) -> dict[str, list[str]]:
        """File name without extension → the paths that it fits."""
        return _grouped(self.paths, lambda path: path.rpartition("/")[2].rpartition(".")[0])


def list_source(source: Path, *, exclude: Collection[Path] = ()) -> SourceListing:
    """Every image that SOURCE holds or names; raises `SourceRefused` if it cannot be read as any layout.

    `exclude` are folders that are not part of SOURCE although they lie in it, such as a run folder.
    """
    # These modules build on this one's classes.
    from pipeline import layouts_csv, layouts_skin  # noqa: PLC0415

    if not source.is_dir():
        state = "a file" if source.exists() else "nothing"
        raise SourceRefused(
            f"SOURCE {source}: expected a folder, got {state}.", remedy="Give the folder that holds the images."
        )
    found = walk(source, exclude=exclude)
    files = Files(source, [path for path in found.files if is_image_file(source, path)])
    listing = layouts_skin.listed(files) or layouts_csv.listed(files) or _from_folders(files)
    if not listing.entries:
        raise SourceRefused(
            f"SOURCE {source}: no image in {len(found.files)} file(s).",
            remedy="Give a folder with PNG, JPEG, TIFF, BMP, WebP, GIF or DICOM files.",
        )
    listing.warnings.extend(found.warnings)
    return listing


def folder_labels(files: Files) -> tuple[str, dict[str, tuple[str | None, Split | None]]]:
    """Layout and path → (label, split) as the folders say it; labels are None where they say nothing."""
    depth = _class_depth(files.paths)
    if depth is None:
        return "unlabelled", {path: (None, None) for path in files.paths}
    folders = {path.split("/")[depth] for path in files.paths if path.count("/") > depth}
    if folders and all(name.lower() in SPLIT_WORDS for name in folders):
        return _split_folders(files, depth)
    return "class_folders", {path: (_folder(path, depth), None) for path in files.paths}


def _from_folders(files: Files) -> SourceListing:
    layout, said = folder_labels(files)
    entries = [Entry(table_path(path), label, split) for path, (label, split) in said.items()]
    listing = SourceListing(layout, files.root, entries)
    if layout == "class_folders":
        stray = [entry.path for entry in entries if entry.label is None]
        if stray:
            listing.warnings.append(
                f"{len(stray)} image(s) beside the class folders have no label, such as {stray[0]!r}."
            )
    elif any("/" in path for path in files.paths):
        listing.warnings.append("The folders of SOURCE were not read as classes: images are unlabelled.")
    return listing


def _split_folders(files: Files, depth: int) -> tuple[str, dict[str, tuple[str | None, Split | None]]]:
    """`train/<class>/…` and the like: the first folder is the split, the second, where there is one, the class."""
    labelled = any(path.count("/") > depth + 1 for path in files.paths)

    def said(path: str) -> tuple[str | None, Split | None]:
        word = _folder(path, depth)
        return (_folder(path, depth + 1) if labelled else None), (SPLIT_WORDS[word.lower()] if word else None)

    return ("class_folders" if labelled else "unlabelled"), {path: said(path) for path in files.paths}


def _class_depth(paths: Sequence[str]) -> int | None:
    """Which folder of a path is the class: 0 the first, 1 inside a wrapper such as `images/`; None: none is."""
    depth = 0
    while True:
        folders = {_folder(path, depth) for path in paths}
        names = sorted(name for name in folders if name is not None)
        if len(names) >= 2:
            return depth
        if None in folders or not names:
            return None
        flat = all(_folder(path, depth + 1) is None for path in paths)
        if flat and names[0].lower() not in _WRAPPERS:
            return depth  # one class folder, named as such: ingest says that one class is not enough
        depth += 1


def _folder(path: str, depth: int) -> str | None:
    parts = path.split("/")[:-1]
    return table_path(parts[depth]) if len(parts) > depth else None


def is_image_file(root: Path, path: str) -> bool:
    """True if a file is to be listed: its name says image, or says nothing and its bytes say image."""
    name = path.rpartition("/")[2].lower()
    dot, extension = name.rpartition(".")[1:]
    if dot and (f".{extension}" in IMAGE_EXTENSIONS | FOREIGN_EXTENSIONS or name.endswith(".nii.gz")):
        return True
    if dot and f".{extension}" in _PLAIN_EXTENSIONS:
        return False
    if not is_regular_file(root / path):
        return False
    try:
        with (root / path).open("rb") as stream:
            return sniff(stream.read(512)) is not None
    except OSError:
        return False


def _grouped(paths: Sequence[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(key(path), []).append(path)
    return groups
