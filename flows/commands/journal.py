"""Verbs about the journal, which holds every answer of a vision-language model as it came: verify, stats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from data_contracts.errors import InputRefused
from data_contracts.store import RunFolder
from flows.commands.common import OUTCOME, JsonFlag, QuietFlag, RunFlag, existing_run, open_console
from flows.console import Console

if TYPE_CHECKING:
    # The room is only opened when a verb runs: `medmicn --help` must not wait for it.
    from annotation.vlm.journal import Damage
    from annotation.vlm.journal_check import AskedAgain, JournalCheck, LedgerCheck, ModelStatistics

journal_app = typer.Typer(help="The answers of vision-language models as they came.", no_args_is_help=True)

_SHOWN = 10
"""Damaged lines, prompts and batches that are shown; `--json` has all of them."""
_SHORT_HASH = 12


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.add_typer(journal_app, name="journal", rich_help_panel="Look and correct")


@journal_app.command("verify")
def verify(run: RunFlag = None, quiet: QuietFlag = False, as_json: JsonFlag = False) -> None:
    """Check every answer, and that no judgement lacks its own.

    Whether every line of the journal can still be read, and whether every judgement in the ledger has the record that
    it came from.

    Ends with exit code 3 when a line was damaged, or a judgement lacks its record. An unfinished last line is what
    a kill leaves; it is said, and no error.
    """
    console = open_console(quiet=quiet, as_json=as_json)
    folder = existing_run(run)
    console.say(f"run {folder.path}")
    from annotation.vlm.journal import Journal
    from annotation.vlm.journal_check import LEDGER_COLUMNS, check_journal, check_ledger

    found = check_journal(Journal(folder.journal_dir))
    ledger = check_ledger(folder.iterate_judgements(LEDGER_COLUMNS), found.answers)
    for line in _findings(found, ledger):
        console.say(line)
    OUTCOME.content |= {"run": str(folder.path), "journal": _as_dict(found), "ledger": asdict(ledger)}
    faults = list(_faults(found, ledger))
    if faults:
        raise InputRefused(
            f"{folder.journal_dir}: expected every line to be readable and every judgement to have its record; "
            f"{', and '.join(faults)}.",
            remedy="Restore the folder journal/ from a backup of the run. The labels stand as they are; but what was "
            "answered there can no longer be shown as it came.",
        )
    console.say(f"next:    medmicn {'journal stats' if found.n_records else _first_verb(folder)} --run {folder.path}")


@journal_app.command("stats")
def stats(run: RunFlag = None, quiet: QuietFlag = False, as_json: JsonFlag = False) -> None:
    """Answers, tokens, money and time, model by model.

    Faults are those that show without knowing the question; tokens are the most they may have been where the endpoint
    does not tell them.
    """
    console = open_console(quiet=quiet, as_json=as_json)
    folder = existing_run(run)
    console.say(f"run {folder.path}")
    from annotation.vlm.journal import Journal
    from annotation.vlm.journal_check import statistics

    found = statistics(Journal(folder.journal_dir))
    OUTCOME.content |= {"run": str(folder.path), "models": [asdict(model) for model in found]}
    if found:
        _show_statistics(found, console)
        console.say(f"next:    medmicn journal verify --run {folder.path}")
    else:
        console.say("the journal holds no answer.")
        console.say(f"next:    medmicn {_first_verb(folder)} --run {folder.path}")


def _first_verb(folder: RunFolder) -> str:
    return "judge" if (folder.path / "concepts.parquet").is_file() else "concepts"


def _findings(found: JournalCheck, ledger: LedgerCheck) -> Iterator[str]:
    """The check for people, one line a question."""
    yield (
        f"{_n(found.n_records, 'record')} of {_n(found.n_requests, 'request')} in {_n(found.n_segments, 'segment')}, "
        f"which answer {_n(found.n_cells, 'cell')} (one question of one image each)"
    )
    damaged = _n(len(found.damaged), "line") if found.damaged else "none"
    yield _line("✗" if found.damaged else "✓", "damaged lines", damaged)
    yield from _places(found.damaged)
    torn = f"{len(found.torn_ends)}, as a kill leaves them: nothing is lost but the answer that was being written"
    yield _line("–" if found.torn_ends else "✓", "torn ends", torn if found.torn_ends else "none")
    yield from _places(found.torn_ends)
    again = found.asked_again
    yield _line("–" if again.n_records else "✓", "asked again", _asked_again(again))
    twice = f"{_n(found.n_cells_again, 'cell')} more than once; the last answer stands" if found.n_cells_again else ""
    yield _line("–" if twice else "✓", "answered again", twice or "none")
    yield _line("✗" if ledger.n_without_record else "✓", "ledger", _ledger(ledger))


def _line(mark: str, name: str, text: str) -> str:
    return f"{mark} {name:<15} {text}"


def _places(damage: tuple[Damage, ...]) -> Iterator[str]:
    for place in damage[:_SHOWN]:
        yield f"    {place.segment}, line {place.line}"
    if len(damage) > _SHOWN:
        yield f"    and {len(damage) - _SHOWN:,} more"


def _asked_again(again: AskedAgain) -> str:
    if not again.n_records:
        return "none"
    cost = "price unknown" if again.cost_usd is None else f"{again.cost_usd:.4f} USD"
    tokens = again.usage.input_tokens + again.usage.output_tokens
    text = f"{_n(again.n_requests, 'request')} had an answer already: {_n(tokens, 'token')}, {cost}"
    if again.n_without_cells:
        text += f" ({again.n_without_cells:,} of {again.n_records:,} about no image, such as a test question)"
    return text


def _ledger(ledger: LedgerCheck) -> str:
    if not ledger.n_judgements:
        return "no judgement of a vision-language model yet"
    if ledger.example is None:
        return f"{_n(ledger.n_judgements, 'judgement')}, all with their record"
    first = ", ".join(f"{_SHORT_NAMES[name]} {value}" for name, value in ledger.example.items())
    return (
        f"{ledger.n_without_record:,} of {_n(ledger.n_judgements, 'judgement')} without a record\n    such as {first}"
    )


_SHORT_NAMES = {"image_id": "image", "concept_id": "concept", "witness_model": "model", "request_id": "request"}


def _faults(found: JournalCheck, ledger: LedgerCheck) -> Iterator[str]:
    """What makes the journal less than whole."""
    if found.damaged:
        first = found.damaged[0]
        yield f"{_n(len(found.damaged), 'line')} damaged (first: {first.segment}, line {first.line})"
    if ledger.n_without_record:
        yield f"{ledger.n_without_record:,} of {_n(ledger.n_judgements, 'judgement')} without a record"


def _as_dict(found: JournalCheck) -> dict[str, Any]:
    return {name: value for name, value in asdict(found).items() if name != "answers"}


def _show_statistics(found: list[ModelStatistics], console: Console) -> None:
    """One column a model, then what does not fit into a table."""
    import pandas as pd

    table = pd.DataFrame({model.model: _column(model) for model in found})
    console.say(table.to_string())
    for model in found:
        prompts = {sha256[:_SHORT_HASH]: n for sha256, n in model.prompts.items()}
        _show_counts(f"answers of {model.model} by question (hash of all but the images)", prompts, console)
        if model.batches:
            _show_counts(f"answers of {model.model} by batch", model.batches, console)


def _column(model: ModelStatistics) -> dict[str, str]:
    partly = " (in part)" if model.cost_usd is not None and model.n_unpriced else ""
    return {
        "records": f"{model.n_records:,}",
        "cells (image × question)": f"{model.n_cells:,}",
        "input tokens": f"{model.input_tokens:,}",
        "output tokens": f"{model.output_tokens:,}",
        "records with told tokens": f"{model.n_counted:,}",
        "price, USD": "unknown" if model.cost_usd is None else f"{model.cost_usd:.4f}{partly}",
        "first, UTC": _moment(model.first_at),
        "last, UTC": _moment(model.last_at),
        "seconds, median": _seconds(model.median_s),
        "seconds, 95 of 100 within": _seconds(model.p95_s),
        **{name: f"{model.faults.get(code, 0):,}" for code, name in _FAULT_NAMES.items()},
        "different questions": f"{len(model.prompts):,}",
        "batches": f"{len(model.batches):,}",
    }


_FAULT_NAMES = {
    "refused": "refused",
    "cut_off": "cut off",
    "empty_answer": "empty",
    "invalid_json": "not JSON",
}


def _show_counts(title: str, counts: Mapping[str, int], console: Console) -> None:
    console.say(f"{title}:")
    for name, n in list(counts.items())[:_SHOWN]:
        console.say(f"  {name:<{_SHORT_HASH}} {n:>9,}")
    if len(counts) > _SHOWN:
        console.say(f"  and {len(counts) - _SHOWN:,} more")


def _moment(text: str) -> str:
    return text[:16].replace("T", " ")


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _n(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
