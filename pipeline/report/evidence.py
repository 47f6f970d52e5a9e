"""Tables of trust and evidence as the page shows them: which columns, in which words, and what they mean.

Each is a CSV that a step wrote. A table that is not there leaves no trace on the page, a column that is not there no
column: reports of older runs stay readable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from pipeline.report import words

Row = dict[str, Any]
MAX_ROWS = 40


@dataclass(frozen=True)
class Column:
    """One column of a page's table."""

    name: str
    """Of the CSV."""
    title: str
    kind: str = "text"
    """`text`, `words` (a code), `percent`, `decimal` (two places), `fine` (three), `signed`, or `count`."""
    interval: tuple[str, str] | None = None
    """Columns that hold the ends of its 95 % interval."""

    @property
    def is_number(self) -> bool:
        """Whether it is set flush right."""
        return self.kind not in ("text", "words")

    def shown(self, row: Mapping[str, Any]) -> str:
        """The cell in words."""
        value = row.get(self.name)
        text = _SHOWN[self.kind](value)
        if self.interval is None or not words.known(value):
            return text
        low, high = (row.get(name) for name in self.interval)
        if not (words.known(low) and words.known(high)):
            return text
        return f"{text} ({_SHOWN[self.kind](low)} to {_SHOWN[self.kind](high)})"


@dataclass(frozen=True)
class Spec:
    """How one CSV is shown."""

    title: str
    caption: str
    columns: Sequence[Column]
    file: str = ""
    """Where all rows are, for tables that are longer than the page's."""


@dataclass(frozen=True)
class TableView:
    """A table ready for the template."""

    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    n_more: int = 0
    file: str = field(default="")


def _text(value: Any) -> str:
    return words.NOTHING if value is None or (not isinstance(value, str) and pd.isna(value)) else str(value)


def _signed(value: Any) -> str:
    return f"{float(value):+.3f}" if words.known(value) else words.NOTHING


def _code(value: Any) -> str:
    return words.words(_text(value))


def _percent(value: Any) -> str:
    return words.percent(value, 1)


def _fine(value: Any) -> str:
    return words.decimal(value, 3)


_SHOWN: Mapping[str, Callable[[Any], str]] = {
    "text": _text,
    "words": _code,
    "percent": _percent,
    "decimal": words.decimal,
    "fine": _fine,
    "signed": _signed,
    "count": words.count,
}


def _estimate(title: str, name: str, kind: str = "decimal") -> Column:
    return Column(name, title, kind, (f"{name}_low", f"{name}_high"))


_CONCEPT = Column("concept_id", "Concept")

TRUST: Mapping[str, Spec] = {
    "audit": Spec(
        "What the experts found",
        "Labels as the machines alone make them, against the experts' blind answers to a random sample whose chances "
        "are known; 95 % intervals. “More cells” is how many further answers would settle an undecided concept.",
        (
            _CONCEPT,
            Column("n", "Cells", "count"),
            _estimate("Kappa", "kappa"),
            _estimate("Sensitivity", "sensitivity", "percent"),
            _estimate("Specificity", "specificity", "percent"),
            _estimate("PPV", "ppv", "percent"),
            _estimate("NPV", "npv", "percent"),
            _estimate("AUROC", "auroc"),
            Column("recommendation", "Advice", "words"),
            Column("n_more_cells", "More cells", "count"),
        ),
        "audit_scores.csv",
    ),
    "experts": Spec(
        "How experts agree among themselves",
        "The ceiling of what any label can reach: where experts differ, a machine cannot be right by both.",
        (
            Column("concept_id", "Concept or group"),
            Column("first", "One"),
            Column("second", "The other"),
            Column("n", "Cells", "count"),
            _estimate("Kappa", "kappa"),
            Column("alpha", "Alpha", "decimal"),
        ),
        "audit_experts.csv",
    ),
    "refused": Spec(
        "Witnesses that may not label",
        "Tested against answers at random, and against the class alone. These lost, so their word was not used.",
        (
            _CONCEPT,
            Column("source", "Witness"),
            Column("reason", "Reason", "words"),
            Column("detail", "What was found"),
        ),
        "refused.csv",
    ),
    "honesty": Spec(
        "Does the score follow the pixels?",
        "Each concept's score beside the same score for a null: a nonsense word, a negation, the class name, or "
        "answers dealt out at random. A score that does not beat its null shows something else than the concept.",
        (
            _CONCEPT,
            Column("null", "Null", "words"),
            Column("n", "Images", "count"),
            Column("auroc", "AUROC", "decimal"),
            Column("null_auroc", "Of the null", "decimal"),
            _estimate("Difference", "difference"),
            Column("verdict", "Verdict", "words"),
            Column("n_needed", "Images needed", "count"),
        ),
        "honesty.csv",
    ),
    "localisation": Spec(
        "Do the maps point at the right place?",
        "Concept maps against the regions that were given. Chance is what a random cell of the map would hit; images "
        "outside the test split decide.",
        (
            _CONCEPT,
            Column("images", "Images"),
            Column("n", "Number", "count"),
            _estimate("Hits", "pointing_game", "percent"),
            Column("chance", "Chance", "percent"),
            Column("iou", "Overlap", "decimal"),
            Column("verdict", "Verdict", "words"),
        ),
        "localisation.csv",
    ),
    "calibration": Spec(
        "Do the probabilities mean what they say?",
        "Against the experts' answers. Calibration error: mean gap between stated probability and how often it holds.",
        (
            Column("source", "Whose"),
            _CONCEPT,
            Column("n", "Cells", "count"),
            _estimate("Calibration error", "ece"),
            _estimate("Brier score", "brier"),
        ),
        "calibration.csv",
    ),
    "thresholds": Spec(
        "Where present ends and absent begins",
        "One cut a concept, with a band in which nothing is said.",
        (
            _CONCEPT,
            Column("source", "Of", "words"),
            Column("threshold", "Cut", "fine"),
            Column("abstain_low", "Absent below", "fine"),
            Column("abstain_high", "Present above", "fine"),
            Column("method", "Fitted on", "words"),
            Column("n_audited", "Audited", "count"),
            Column("precision", "Precision", "percent"),
            Column("coverage", "Coverage", "percent"),
        ),
        "thresholds.csv",
    ),
    "disagreements": Spec(
        "Most informative disagreements",
        "Where one look of an expert teaches most. The review page shows them in this order.",
        (
            _CONCEPT,
            Column("image", "Image"),
            Column("probability", "Probability", "decimal"),
            Column("disagreement", "Disagreement", "decimal"),
            Column("decided_by", "Decided by"),
        ),
        "disagreements.csv",
    ),
}
"""Tables of the section about labels, in their order."""

EVIDENCE: Mapping[str, Spec] = {
    "concept_use": Spec(
        "How much of the decision goes through the concepts",
        "Each measure beside its control; 95 % intervals.",
        (
            Column("measure", "Measure", "words"),
            Column("value", "Value", "fine", ("low", "high")),
            Column("control", "Control", "fine"),
            Column("meaning", "What it says"),
        ),
        "explanations/concept_use.csv",
    ),
    "knock_out": Spec(
        "Without this concept",
        "Accuracy that is lost when one concept is hidden from the classifier.",
        (_CONCEPT, Column("drop", "Accuracy lost", "signed", ("low", "high"))),
        "explanations/knock_out.csv",
    ),
    "map_evidence": Spec(
        "Do the maps explain anything?",
        "Each measure beside its control; a map that does no better than its control explains nothing.",
        (
            Column("measure", "Measure"),
            Column("method", "Method"),
            Column("n_images", "Images", "count"),
            Column("value", "Value", "decimal", ("low", "high")),
            Column("control", "Control", "decimal"),
            Column("control_is", "Control is"),
            Column("verdict", "Verdict"),
        ),
        "explanations/map_evidence.csv",
    ),
    "map_regions": Spec(
        "Maps against the given regions",
        "Share of images whose strongest point of the map lies in the region, beside what a random point would hit.",
        (
            Column("target", "Map of"),
            Column("method", "Method"),
            Column("n", "Images", "count"),
            _estimate("Hits", "pointing_game", "percent"),
            Column("chance", "Chance", "percent"),
            Column("iou", "Overlap", "decimal"),
        ),
        "explanations/map_regions.csv",
    ),
    "intervals": Spec(
        "How sure the results are",
        "Of the kept model on held-out images; 95 % intervals by bootstrap, over patients where they are known.",
        (
            Column("metric", "Measure", "words"),
            Column("n", "Images", "count"),
            Column("value", "Value", "fine", ("low", "high")),
        ),
        "explanations/intervals.csv",
    ),
    "calibration": Spec(
        "Calibration",
        "Before and after one temperature, fitted on validation images; `predict` uses the calibrated probabilities.",
        (
            Column("measure", "Measure", "words"),
            Column("before", "Before", "fine", ("before_low", "before_high")),
            Column("after", "After", "fine", ("after_low", "after_high")),
            Column("n", "Images", "count"),
        ),
        "explanations/calibration.csv",
    ),
    "reject": Spec(
        "When it may say “I do not know”",
        "Images below the threshold are left to a person; risk is the share of errors among the others.",
        (
            Column("split", "Split"),
            Column("threshold", "Threshold", "fine"),
            Column("coverage", "Answered", "percent"),
            Column("risk", "Risk", "percent", ("risk_low", "risk_high")),
        ),
        "explanations/reject.csv",
    ),
    "robustness": Spec(
        "When images are disturbed",
        "Strength: pixel values of 255 for attacks and uniform noise, severity 1 to 5 for all others.",
        (
            Column("perturbation", "Disturbance", "words"),
            Column("strength", "Strength", "count"),
            Column("n", "Images", "count"),
            _estimate("Accuracy", "accuracy", "percent"),
            Column("macro_f1", "Macro F1", "percent"),
            Column("concept_auroc", "Concept AUROC", "decimal"),
            Column("map_correlation", "Map as before", "decimal"),
        ),
        "explanations/robustness.csv",
    ),
    "subgroups": Spec(
        "By subgroup",
        "The same measures in parts of the held-out images; small groups have wide intervals.",
        (
            Column("column", "Column"),
            Column("value", "Value"),
            Column("n", "Images", "count"),
            Column("metric", "Measure", "words"),
            Column("estimate", "Estimate", "percent", ("low", "high")),
            Column("difference", "Against the rest", "signed"),
            Column("p_holm", "p (Holm)", "fine"),
        ),
        "explanations/subgroups.csv",
    ),
}
"""Tables of the section about the classifier, in their order."""


def tables(
    found: Mapping[str, pd.DataFrame], specs: Mapping[str, Spec], names: Mapping[str, str] | None = None
) -> list[TableView]:
    """The tables that are there, in the order of `specs`; `names` are those of the concepts, by id."""
    return [
        table_view(_named(found[n], names or {}), spec) for n, spec in specs.items() if n in found and len(found[n])
    ]


def table_view(frame: pd.DataFrame, spec: Spec) -> TableView:
    """The first rows of a table, cells in words; columns that it lacks, or that are empty, are left out."""
    columns = tuple(c for c in spec.columns if c.name in frame and frame[c.name].notna().any())
    rows = tuple(tuple(c.shown(row) for c in columns) for row in frame.head(MAX_ROWS).to_dict("records"))
    return TableView(spec.title, spec.caption, columns, rows, max(0, len(frame) - MAX_ROWS), spec.file)


def _named(frame: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    if "concept_id" not in frame:
        return frame
    return frame.assign(concept_id=[names.get(str(concept_id), concept_id) for concept_id in frame["concept_id"]])


def paragraphs(markdown: str) -> list[tuple[str, str]]:
    """(`heading`, `item` or `paragraph`, text) of a page with little Markdown: headings, lists, paragraphs."""
    found: list[tuple[str, str]] = []
    for block in markdown.split("\n\n"):
        lines = [line.strip() for line in block.strip().splitlines() if line.strip()]
        for line in lines:
            if line.startswith("#"):
                found.append(("heading", line.lstrip("# ")))
            elif line.startswith(("- ", "* ")):
                found.append(("item", line[2:]))
            elif found and line is not lines[0] and found[-1][0] != "heading":
                found[-1] = (found[-1][0], f"{found[-1][1]} {line}")
            else:
                found.append(("paragraph", line))
    return [(kind, text.replace("**", "").replace("`", "")) for kind, text in found]
