"""The published layouts of skin images: DDI, and the SkinCon concepts on DDI and on Fitzpatrick17k.

| files in SOURCE | images | label |
|---|---|---|
| `ddi_metadata.csv` or `ddi_metadata_concept.csv` | `DDI_file`, in SOURCE or `images/` | malignant / benign |
| `annotations_ddi.csv` (SkinCon), best with one of the above | `ImageID` | from DDI's table, else none |
| `fitzpatrick17k.csv`, `annotations_fitzpatrick17k.csv` (SkinCon) | `<md5hash>.jpg` | `three_partition_label` |

SkinCon's `Do not consider this image` excludes an image; its other columns are given concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_contracts.errors import RejectReason, SourceRefused
from data_contracts.tables import State
from pipeline.csv_table import Table, concept_columns, read_table, states
from pipeline.layouts import Entry, Files, SourceListing
from pipeline.layouts_csv import find, merged, warn_of_unlisted
from pipeline.paths import table_path

_EXCLUDED = "Do not consider this image"
_DDI_TABLES = ("ddi_metadata_concept.csv", "ddi_metadata.csv")
_DDI_SKINCON = "annotations_ddi.csv"
_FITZPATRICK = "fitzpatrick17k.csv"
_FITZPATRICK_SKINCON = "annotations_fitzpatrick17k.csv"
_DDI_MALIGNANT = ("malignant", "malignancy(malig=1)")
_NOT_CONCEPTS = ("DDI_ID", "DDI_file", "skin_tone", "malignant", "malignancy(malig=1)", "disease", "ImageID", _EXCLUDED)


@dataclass
class _Sheet:
    """What a layout's tables say: labels and concept rows by image file name."""

    layout: str
    labels: dict[str, str | None] = field(default_factory=dict)
    concepts: dict[str, dict[str, str]] = field(default_factory=dict)
    concept_names: list[str] = field(default_factory=list)
    optional: frozenset[str] = frozenset()
    """Names that are only listed if their file is there."""
    tables: list[Path] = field(default_factory=list)


def listed(files: Files) -> SourceListing | None:
    """The listing of a SOURCE in one of the published layouts, or None if it has none of their tables."""
    sheets = [sheet for sheet in (_ddi(files.root), _fitzpatrick(files.root)) if sheet is not None]
    listings = [_listing(files, sheet) for sheet in sheets]
    present = [listing for listing in listings if any(e.rejected is None for e in listing.entries)]
    if len(present) > 1:
        raise SourceRefused(
            f"SOURCE {files.root}: expected the images of one data set, got those of DDI and of Fitzpatrick17k.",
            remedy="Their labels do not mean the same; put each into a folder of its own.",
        )
    if listings and not present:
        names = ", ".join(table.name for listing in listings for table in listing.tables)
        raise SourceRefused(
            f"SOURCE {files.root}: none of the images that {names} name lies there.",
            remedy="Put the images into SOURCE or its folder images/; they are published apart from the tables.",
        )
    return present[0] if present else None


def _ddi(root: Path) -> _Sheet | None:
    tables = _tables(root, (*_DDI_TABLES, _DDI_SKINCON))
    if not tables:
        return None
    sheet = _Sheet("ddi", tables=[table.path for table in tables])
    for table in tables:
        if table.path.name == _DDI_SKINCON:
            sheet.layout = "skincon_ddi"
            _add_concepts(sheet, table, "ImageID")
            continue
        file_column = _required(table, ("DDI_file",))
        malignant = _required(table, _DDI_MALIGNANT)
        for row in table.rows:
            sheet.labels[row[file_column].strip()] = _malignant_or_benign(row[malignant])
        if table.path.name == "ddi_metadata_concept.csv" and len(tables) < 3:
            _add_concepts(sheet, table, file_column)
    return sheet


def _fitzpatrick(root: Path) -> _Sheet | None:
    tables = {table.path.name: table for table in _tables(root, (_FITZPATRICK, _FITZPATRICK_SKINCON))}
    if not tables:
        return None
    sheet = _Sheet("fitzpatrick17k", tables=[table.path for table in tables.values()])
    if _FITZPATRICK in tables:
        table = tables[_FITZPATRICK]
        key, label = _required(table, ("md5hash",)), _required(table, ("three_partition_label",))
        sheet.labels = {f"{row[key].strip()}.jpg": row[label].strip() or None for row in table.rows}
    if _FITZPATRICK_SKINCON in tables:
        _add_concepts(sheet, tables[_FITZPATRICK_SKINCON], "ImageID")
        # Most people have only the part with concepts: the other rows are no missing files.
        sheet.optional = frozenset(sheet.labels.keys() - sheet.concepts.keys())
    return sheet


def _listing(files: Files, sheet: _Sheet) -> SourceListing:
    warnings: list[str] = []
    entries = []
    n_absent = 0
    for name in sorted(sheet.labels.keys() | sheet.concepts.keys()):
        path, reason, detail = find(files, name)
        if path is None and name in sheet.optional:
            n_absent += 1
            continue
        entries.append(_entry(sheet, name, path, reason, detail))
    if n_absent:
        warnings.append(f"{sheet.tables[0].name}: {n_absent} row(s) without concepts have no image in SOURCE.")
    where = " and ".join(table.name for table in sheet.tables)
    entries = merged(entries, warnings, where)
    warn_of_unlisted(files, entries, warnings, where)
    return SourceListing(sheet.layout, files.root, entries, sheet.concept_names, warnings, sheet.tables)


def _entry(sheet: _Sheet, name: str, path: str | None, reason: RejectReason | None, detail: str | None) -> Entry:
    row = sheet.concepts.get(name, {})
    if states(row, [_EXCLUDED]).get(_EXCLUDED) is State.PRESENT:
        reason, detail = RejectReason.EXCLUDED_BY_SOURCE, f"{_EXCLUDED!r} is set"
    where = table_path(path if path is not None else name)
    return Entry(where, sheet.labels.get(name), None, None, states(row, sheet.concept_names), reason, detail)


def _add_concepts(sheet: _Sheet, table: Table, key: str) -> None:
    column = _required(table, (key,))
    sheet.concept_names = concept_columns(table, _NOT_CONCEPTS)[0]
    sheet.concepts = {row[column].strip(): row for row in table.rows}


def _tables(root: Path, names: Sequence[str]) -> list[Table]:
    return [read_table(root / name) for name in names if (root / name).is_file()]


def _required(table: Table, names: Sequence[str]) -> str:
    """The first of the columns that the table has; raises `SourceRefused` if it has none."""
    for name in names:
        if name in table.columns:
            return name
    shown = ", ".join(table.columns[:8])
    raise SourceRefused(f"{table.path.name}: expected a column {names[0]!r}, got {shown}; nothing was read.")


def _malignant_or_benign(cell: str) -> str | None:
    state = states({"": cell}, [""]).get("")
    return {State.PRESENT: "malignant", State.ABSENT: "benign"}.get(state) if state is not None else None
