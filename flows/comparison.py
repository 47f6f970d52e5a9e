"""Systems side by side on the data set of a run: what is compared, its progress, and the files it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from data_contracts.errors import ConfigurationError
from data_contracts.files import write_text
from data_contracts.ports import Advance
from data_contracts.spreadsheet import write_csv
from data_contracts.store import RunFolder
from flows.chain import Context
from flows.console import Console
from flows.steps import image_reader
from model.compare import CompareWatch, Design, Row, compare_prepared, rows_of
from model.presets import Preset, filter_rows, preset_named
from model.protocols import PROTOCOLS, Protocol, require_marks
from model.systems.registry import SYSTEMS, System, system
from model.tabulate import INTERVALS_IN_WORDS, Comparison

COMPARISON_CSV, PAIRS_CSV, COMPARISON_MD = "comparison.csv", "comparison_pairs.csv", "comparison.md"

SHOWN = {
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "ece": "ECE",
    "concept_auroc": "concept AUROC",
    "concept_macro_f1": "concept macro-F1",
    "rule_macro_f1": "rule macro-F1",
}
"""Columns of the readable table, of those that some system has."""

_WITH_INTERVAL = ("macro_f1", "accuracy")

_PROTOCOL_WORDS = {
    "clean": "Epoch chosen on validation images, test images measured once, no patient on two sides.",
    "paper": "As published: trained on validation images too, epoch chosen on the TEST images. These numbers are too "
    "good; the optimism beside them is what choosing on the test images added, by cross-fitted choice on the same "
    "networks.",
}


@dataclass(frozen=True)
class Request:
    """What a person asked to be compared."""

    systems: str | None = None
    """Comma-separated names, or `all`; none: the preset's, else all."""
    protocol: str | None = None
    """`clean`, `paper` or `both`; none: the preset's, else clean."""
    preset: str | None = None
    reference: str | None = None
    """Name of the system that the others are tested against; none: the first."""
    unfiltered: Path | None = None
    """Run folder of the same images whose concepts were not filtered."""


def compare_systems(context: Context, request: Request) -> Comparison:
    """Train and measure what is asked for with the run's settings; writes the table, the tests and a readable page."""
    preset = preset_named(request.preset) if request.preset else None
    protocols = chosen_protocols(request.protocol or (preset.protocol if preset else "clean"))
    design = Design(_chosen_systems(request.systems, preset), protocols, request.reference)
    train = context.settings.train
    rows = _rows(context, request, design)
    n_networks = len(rows) * len(protocols) * len(train.seeds)
    with context.console.bar("training, in epochs", n_networks * train.epochs) as advance:
        progress = _Progress(context.console, advance, train.epochs)
        comparison = compare_prepared(
            rows,
            train.seeds,
            design,
            cache_dir=context.run.cache_dir,
            watch=CompareWatch(progress.on_trial, progress.on_epoch),
        )
    write_comparison(context.run.path, comparison, title=preset.sentence if preset else "Systems side by side")
    return comparison


def _rows(context: Context, request: Request, design: Design) -> list[Row]:
    """What is to be trained, with its inputs."""
    run, train, read = context.run, context.settings.train, image_reader(context)
    dataset = run.read_dataset()
    where: dict[str, Any] = {"cache_dir": run.cache_dir, "modality": context.settings.source.modality or ""}
    with context.console.bar("reading features", None) as advance:
        if request.preset != "filter-ablation":
            return rows_of(dataset, read, train, design, advance=advance, **where)
        unfiltered = RunFolder(_unfiltered(request)).read_dataset()
        return filter_rows(dataset, unfiltered, read, train, design, advance=advance, **where)


def _unfiltered(request: Request) -> Path:
    if request.unfiltered is None:
        raise ConfigurationError(
            "preset 'filter-ablation': this run's data set holds the concepts that were kept, and nobody has labelled "
            "the others; nothing was trained.",
            remedy="Make a second run of the same SOURCE with the filters off, and name it: medmicn run SOURCE --run "
            "DIR --set concepts.max_name_characters=1000 --set concepts.like_class_cosine=1 --set "
            "concepts.like_each_other_cosine=1, then medmicn compare --preset filter-ablation --unfiltered DIR.",
        )
    return request.unfiltered


class _Progress:
    """Epochs on a bar, and a line for each system that is begun."""

    def __init__(self, console: Console, advance: Advance, n_epochs: int) -> None:
        self._console, self._advance, self._n_epochs = console, advance, n_epochs
        self._n_done = 0
        self._said: set[str] = set()

    def on_epoch(self, _seed: int, _row: dict[str, float]) -> None:
        if self._n_done < self._n_epochs:
            self._n_done += 1
            self._advance(1)

    def on_trial(self, name: str, _seed: int, reused: bool) -> None:
        self._advance(self._n_epochs - self._n_done)
        self._n_done = 0
        if name not in self._said:
            self._said.add(name)
            self._console.say(f"  {name}{': kept from before' if reused else ''}")


def chosen_protocols(name: str) -> tuple[Protocol, ...]:
    """The protocols of that name; raises `ConfigurationError` for another than `clean`, `paper` and `both`."""
    if name == "both":
        return PROTOCOLS
    for protocol in PROTOCOLS:
        if protocol == name:
            return (protocol,)
    raise ConfigurationError(f"protocol: expected clean, paper or both, got {name!r}; nothing was trained.")


def _chosen_systems(names: str | None, preset: Preset | None) -> Sequence[System]:
    if names is None and preset is not None:
        return preset.systems
    if names is None or names == "all":
        return tuple(SYSTEMS.values())
    rows = {one.name: one for one in preset.systems} if preset is not None else {}
    asked = [name.strip() for name in names.split(",") if name.strip()]
    return [rows[name] if name in rows else system(name) for name in asked]


# ---- files -------------------------------------------------------------------------------------------------------


def write_comparison(folder: Path, comparison: Comparison, *, title: str) -> None:
    """Write the three files; refuses numbers of the paper's protocol without their optimism (`ContractViolation`)."""
    require_marks(comparison.table)
    write_csv(folder / COMPARISON_CSV, comparison.table)
    write_csv(folder / PAIRS_CSV, comparison.pairs)
    write_text(folder / COMPARISON_MD, as_markdown(comparison, title=title))


def as_markdown(comparison: Comparison, *, title: str) -> str:
    """The readable page: one table a protocol, with differences to the reference, and how to read it."""
    require_marks(comparison.table)
    of = "images" if comparison.n_clusters == comparison.n_images else f"images of {comparison.n_clusters:,} patients"
    parts = [f"# {title}\n", f"{comparison.n_images:,} test {of}.\n"]
    for protocol, rows in comparison.table.groupby("protocol", sort=False):
        pairs = comparison.pairs[comparison.pairs["protocol"] == protocol]
        parts += [f"## Protocol `{protocol}`\n", f"{_PROTOCOL_WORDS[str(protocol)]}\n", _table(rows, pairs)]
    return "\n".join([*parts, f"{INTERVALS_IN_WORDS}\n"])


def _table(rows: pd.DataFrame, pairs: pd.DataFrame) -> str:
    shown = {name: words for name, words in SHOWN.items() if rows[name].notna().any()}
    marked = rows["optimism_macro_f1"].notna().any()
    reference = pairs["reference"].iloc[0] if len(pairs) else ""
    header = ["system", *shown.values(), *(["side share"] if rows["side_share"].notna().any() else [])]
    header += [f"macro-F1 − {reference}", "p (Holm)"] if len(pairs) else []
    lines = [_line(header), _line(["---"] * len(header))]
    tests = pairs[pairs["metric"] == "macro_f1"].set_index("system")
    for row in rows.to_dict("records"):
        cells = [str(row["system"]), *(_cell(row, name, marked=marked) for name in shown)]
        if "side share" in header:
            cells.append(_number(row["side_share"], 2))
        if len(pairs):
            cells += _test_cells(tests, str(row["system"]))
        lines.append(_line(cells))
    return "\n".join([*lines, ""])


def _cell(row: dict[str, float], name: str, *, marked: bool) -> str:
    value, sd = row[name], row[f"{name}_sd"]
    if pd.isna(value):
        return "–"
    text = _number(value) + (f" ± {_number(sd)}" if pd.notna(sd) else "")
    if name in _WITH_INTERVAL and pd.notna(row[f"{name}_low"]):
        text += f" [{_number(row[f'{name}_low'])}, {_number(row[f'{name}_high'])}]"
    if marked and f"optimism_{name}" in row:
        text += f" (optimism {row[f'optimism_{name}']:+.3f})"
    return text


def _test_cells(tests: pd.DataFrame, name: str) -> list[str]:
    if name not in tests.index:
        return ["", ""]
    test = tests.loc[name]
    return [
        f"{test['difference']:+.3f} [{test['low']:+.3f}, {test['high']:+.3f}]",
        _number(test["p_holm"]) if pd.notna(test["p_holm"]) else "–",
    ]


def _number(value: float, digits: int = 3) -> str:
    return "–" if pd.isna(value) else f"{value:.{digits}f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
