"""Reading an audit sheet back: what the expert answered, and every fault that a person or a spreadsheet made."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.errors import ContractViolation
from data_contracts.tables import JUDGEMENTS, State, Witness

AUDIT_EVIDENCE = "audit"
"""`evidence` of a judgement that was given blind to the machine's answer, on a drawn cell."""
_TRUE = ("true", "wahr", "vrai", "verdadero", "verdadeiro", "vero", "waar")
_PRESENT = ("1", "1.0", "1,0", "present", "yes", "y", "x", "ja", "oui", "si", "sí", *_TRUE)
_ABSENT = ("0", "0.0", "0,0", "absent", "no", "n", "false", "falsch", "faux", "falso", "onwaar", "nein", "non")
ANSWERS: Mapping[str, State] = {
    **dict.fromkeys(_PRESENT, State.PRESENT),
    **dict.fromkeys(_ABSENT, State.ABSENT),
    **dict.fromkeys(("?", "uncertain", "unsure", "unclear"), State.UNCERTAIN),
    **dict.fromkeys(("not_assessed", "not assessed", "skip"), State.NOT_ASSESSED),
}
"""What an answer may be, in lower case; spreadsheets write 1 as `1,0` or TRUE, some of them translated."""
_NEEDED = ("image_id", "concept_id", "answer")
_EXPECTED = "present, absent, uncertain or nothing"
_MONTH = r"jan|feb|mar|mär|apr|may|mai|jun|jul|aug|sep|oct|okt|nov|dec|dez"
_DATE = re.compile(
    rf"\d{{1,4}}[-./]\d{{1,2}}([-./]\d{{1,4}})?( .*)?|\d{{1,2}}[-. ]*({_MONTH})\w*.*|({_MONTH})\w*[-. ]*\d+"
)
_SHORTENED = re.compile(r"\d+([.,]\d+)?e[+-]?\d+", re.IGNORECASE)


def answer_of(text: object) -> State | None:
    """What an answer cell says; None for nothing, and for what is no answer."""
    return ANSWERS.get(_text(text).casefold())


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a sheet."""

    row: int
    """As a spreadsheet counts: the header is row 1."""
    column: str
    problem: str

    def __str__(self) -> str:
        """`row 7, column 'answer': …`."""
        return f"row {self.row}, column {self.column!r}: {self.problem}"


@dataclass(frozen=True)
class SheetReading:
    """A sheet, completely checked."""

    answers: pd.DataFrame
    """image_id, concept_id, state, row of the valid answered rows, each cell once."""
    faults: tuple[Fault, ...]
    """Everything that is wrong, in order of rows."""
    rejected: pd.DataFrame
    """`row`, `problems`, then the row as it came, for every row with a fault."""
    n_empty: int
    """Rows without an answer."""

    def judgements(self, reviewer: str, created_at: datetime) -> pd.DataFrame:
        """JUDGEMENTS of the answers, by the expert `reviewer`."""
        content = {
            "image_id": self.answers["image_id"],
            "concept_id": self.answers["concept_id"],
            "witness": str(Witness.EXPERT),
            "witness_model": reviewer,
            "prompt_sha256": None,
            "state": self.answers["state"],
            "probability": np.nan,
            "evidence": AUDIT_EVIDENCE,
            "request_id": None,
            "created_at": pd.Timestamp(created_at),
            "supersedes": None,
        }
        return pd.DataFrame(content).reindex(columns=JUDGEMENTS.column_names)

    def require(self, where: str = "audit.csv") -> None:
        """Raise `ContractViolation` with every fault, if there is one."""
        if self.faults:
            raise ContractViolation(
                where,
                [str(fault) for fault in self.faults],
                remedy="Nothing was imported; correct these cells and give the same command again, "
                "or take the valid rows alone with --partial.",
            )


def check_sheet(
    filled: pd.DataFrame,
    images: pd.DataFrame,
    vocabulary: Vocabulary,
    *,
    drawn: pd.DataFrame | None = None,
    row_numbers: Sequence[int] | None = None,
) -> SheetReading:
    """What a sheet of text cells says, and everything that is wrong with it; columns it does not know are ignored.

    Two rows that answer one cell differently are both at fault. A row whose answer is empty says nothing, but its
    image and concept are checked all the same.

    Args:
        filled: The sheet.
        images: The images that may be answered about.
        vocabulary: The concepts as they are now; where a name or a definition changed, an answer was to another
            question.
        drawn: The cells that were drawn (image_id, concept_id), if only these may be answered.
        row_numbers: Where each row stood in the file; counted on from 2 if None.

    Raises:
        ContractViolation: A column is missing.
    """
    missing = [name for name in _NEEDED if name not in filled]
    if missing:
        found = ", ".join(repr(str(name)) for name in list(filled)[:8])
        raise ContractViolation(
            "audit.csv",
            [f"header: column {name!r} is missing" for name in missing],
            remedy=f"Nothing was imported. Found: {found}.",
        )
    cells = filled.reset_index(drop=True).astype("object").map(_text)
    numbers = list(row_numbers) if row_numbers is not None else list(range(2, len(cells) + 2))
    checks = _Checks(images, vocabulary, drawn)
    faults = [fault for row, (_, cell) in zip(numbers, cells.iterrows(), strict=True) for fault in checks(row, cell)]
    state = cells["answer"].map(answer_of).fillna("").astype("str")
    said = pd.DataFrame({"image_id": cells["image_id"], "concept_id": cells["concept_id"], "state": state})
    said["row"] = numbers
    bad_rows = {fault.row for fault in faults}
    valid = said[(said["state"] != "") & ~said["row"].isin(bad_rows)]
    conflicts = list(_conflicts(valid))
    faults = sorted([*faults, *conflicts], key=lambda fault: fault.row)
    good = valid[~valid["row"].isin({fault.row for fault in conflicts})]
    good = good.drop_duplicates(["image_id", "concept_id"]).reset_index(drop=True)
    return SheetReading(good, tuple(faults), _rejected(cells, numbers, faults), int((cells["answer"] == "").sum()))


class _Checks:
    """The checks of one row."""

    def __init__(self, images: pd.DataFrame, vocabulary: Vocabulary, drawn: pd.DataFrame | None) -> None:
        self._vocabulary = vocabulary
        self._path = dict(zip(images["image_id"], images["path"], strict=True)) if "path" in images else {}
        self._images = set(images["image_id"])
        self._drawn = None if drawn is None else set(zip(drawn["image_id"], drawn["concept_id"], strict=True))

    def __call__(self, row: int, cell: pd.Series) -> Iterator[Fault]:
        """Every fault of a row."""
        image_id, concept_id = cell["image_id"], cell["concept_id"]
        where = [*self._image(image_id, cell.get("path", "")), *self._concept(concept_id, cell)]
        if not where and self._drawn is not None and (image_id, concept_id) not in self._drawn:
            where.append(("concept_id", f"this cell was not drawn (image {image_id[:12]}…, concept {concept_id!r})"))
        answer = cell["answer"]
        if answer and answer.casefold() not in ANSWERS:
            where.append(("answer", f"expected {_EXPECTED}, got {answer[:40]!r}{_damage(answer)}"))
        yield from (Fault(row, column, problem) for column, problem in where)

    def _image(self, image_id: str, path: str) -> Iterator[tuple[str, str]]:
        if image_id not in self._images:
            yield "image_id", f"{image_id[:40]!r} is not in this run{_damage(image_id)}"
        elif path and self._path and _plain(path) != _plain(self._path[image_id]):
            yield "path", f"{path[:60]!r} is another image than image_id {image_id[:12]}… ({self._path[image_id]!r})"

    def _concept(self, concept_id: str, cell: pd.Series) -> Iterator[tuple[str, str]]:
        if concept_id not in self._vocabulary:
            near = difflib.get_close_matches(concept_id, self._vocabulary.ids, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else _damage(concept_id)
            yield "concept_id", f"{concept_id[:40]!r} is no concept of this run{hint}"
            return
        now = self._vocabulary[concept_id]
        for column, text in (("concept", now.name), ("definition", now.definition)):
            asked = cell.get(column, "")
            if asked and _plain(asked) != _plain(text):
                yield column, f"concept {concept_id!r} was asked as {asked[:60]!r}, and is now {text[:60]!r}"


def _conflicts(valid: pd.DataFrame) -> Iterator[Fault]:
    for (image_id, concept_id), rows in valid.groupby(["image_id", "concept_id"], sort=False):
        if rows["state"].nunique() > 1:
            others = ", ".join(str(row) for row in rows["row"])
            for row in rows["row"]:
                problem = f"rows {others} answer image {image_id[:12]}…, concept {concept_id!r} twice, differently"
                yield Fault(row, "answer", problem)


def _rejected(cells: pd.DataFrame, numbers: Sequence[int], faults: Sequence[Fault]) -> pd.DataFrame:
    problems: dict[int, list[str]] = {}
    for fault in faults:
        problems.setdefault(fault.row, []).append(f"{fault.column}: {fault.problem}")
    kept = cells.assign(row=numbers)
    kept = kept[kept["row"].isin(problems)]
    told = kept.assign(problems=["; ".join(problems[row]) for row in kept["row"]])
    return told[["row", "problems", *cells.columns]].reset_index(drop=True)


def _text(value: object) -> str:
    """A cell as text; empty for what spreadsheets make of nothing."""
    return "" if pd.isna(value) else str(value).replace("\xa0", " ").strip()


def _damage(text: str) -> str:
    """What a spreadsheet has probably done to a cell, as the end of a message."""
    if _SHORTENED.fullmatch(text):
        return " (a spreadsheet took it for a number and shortened it; format the column as text)"
    if _DATE.fullmatch(text.casefold()):
        return " (a spreadsheet took it for a date; format the column as text)"
    return ""


def _plain(text: str) -> str:
    """Text without what spreadsheets and encodings change: letters and digits of ASCII only, in lower case."""
    return re.sub(r"[^a-z0-9]", "", text.casefold())
