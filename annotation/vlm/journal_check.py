"""Whether a journal is whole, and what stands in it: one pass over its records, a few numbers kept of each.

Records are read one by one and forgotten, so that a journal of any length can be looked at; what is kept of a record
are fingerprints of 64 bits, which among a million of them coincide once in some ten million journals.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from annotation.vlm.client import usable_text
from annotation.vlm.journal import Damage, Journal, Record
from annotation.vlm.schema import AnswerFault, FaultCode, Usage, parse_judgements
from data_contracts.tables import State, Witness

LEDGER_COLUMNS = ("image_id", "concept_id", "witness", "witness_model", "state", "request_id", "created_at")
"""What `check_ledger` reads of the ledger."""

FAULTS = (FaultCode.REFUSED, FaultCode.CUT_OFF, FaultCode.EMPTY_ANSWER, FaultCode.INVALID_JSON)
"""What an answer can lack that shows without knowing its question."""

Fingerprints = npt.NDArray[np.uint64]

_FINGERPRINT_DIGITS = 16
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True)
class AskedAgain:
    """Requests that were sent although they had an answer, and what that took."""

    n_requests: int
    """Requests with more than one record."""
    n_records: int
    """Their records after the first ones."""
    n_without_cells: int
    """Those of `n_records` that judge no image: test questions of a probe, and questions for concepts."""
    usage: Usage
    """Tokens of these records."""
    cost_usd: float | None
    """Their price as far as it was known; None where it was known of none of them."""


@dataclass(frozen=True)
class JournalCheck:
    """What a journal holds, and what is wrong with it."""

    n_segments: int
    n_records: int
    """Readable records."""
    n_requests: int
    """Different requests among them."""
    n_cells: int
    """Different cells that they answer."""
    damaged: tuple[Damage, ...]
    """Lines that something changed after they were written."""
    torn_ends: tuple[Damage, ...]
    """Unfinished last lines, as a kill leaves them."""
    asked_again: AskedAgain
    n_cells_again: int
    """Cells with more than one answer."""
    answers: Fingerprints = field(repr=False)
    """Sorted fingerprints of model and answer name, for `check_ledger`."""


@dataclass(frozen=True)
class LedgerCheck:
    """The ledger's judgements by vision-language models against the records that they came from."""

    n_judgements: int
    """Judgements of these models, those without an answer left out."""
    n_without_record: int
    """Those that no record in the journal stands behind."""
    example: Mapping[str, str] | None
    """The first of these: image, concept, model and request."""


@dataclass(frozen=True)
class ModelStatistics:
    """The records of one model in numbers."""

    model: str
    n_records: int
    n_cells: int
    """Cells that its records answer, repeated ones counted each time."""
    input_tokens: int
    output_tokens: int
    n_counted: int
    """Records whose tokens the endpoint told; of the others they are the most that it may have billed."""
    cost_usd: float | None
    """Price as far as it was known; None where it was known of no record."""
    n_unpriced: int
    """Records whose price was not known."""
    first_at: str
    last_at: str
    median_s: float | None
    """Middle of the times from question to answer; None where all came in batches."""
    p95_s: float | None
    """The time that 95 of 100 answers kept."""
    faults: Mapping[str, int]
    """Fault → records with it, those of `FAULTS` that occur."""
    prompts: Mapping[str, int]
    """Hash of a request without its images → records, the commonest first."""
    batches: Mapping[str, int]
    """Batch → its records."""


def check_journal(journal: Journal) -> JournalCheck:
    """What the journal holds and what is wrong with it; reads every record once."""
    seen = _Seen()
    for record in journal.lines():
        seen.add(record)
    return JournalCheck(
        n_segments=sum(1 for _ in journal.folder.glob("*.jsonl")),
        n_records=journal.n_lines,
        n_requests=len(journal),
        n_cells=journal.n_cells,
        damaged=tuple(d for d in journal.damage if not d.is_torn_end),
        torn_ends=tuple(d for d in journal.damage if d.is_torn_end),
        asked_again=seen.asked_again(),
        n_cells_again=_n_repeated(np.asarray(seen.cells, np.uint64)),
        answers=np.unique(np.asarray(seen.answers, np.uint64)),
    )


def check_ledger(parts: Iterable[pa.Table], answers: Fingerprints) -> LedgerCheck:
    """How many judgements have their record; `parts` of the ledger hold `LEDGER_COLUMNS`.

    A judgement and its record are matched by model and request id, or by model and time where the endpoint gives its
    answers no ids.
    """
    n_judgements, n_lacking = 0, 0
    example: dict[str, str] | None = None
    for part in parts:
        rows = part.to_pandas()
        rows = rows[(rows["witness"] == Witness.VLM) & (rows["state"] != State.NOT_ASSESSED)]
        lacking = rows[~_has_record(rows, answers)]
        n_judgements += len(rows)
        n_lacking += len(lacking)
        if example is None and len(lacking):
            example = _example(lacking.iloc[0])
    return LedgerCheck(n_judgements, n_lacking, example)


def statistics(journal: Journal) -> list[ModelStatistics]:
    """The journal in numbers, model by model, the one with most records first; reads every record once."""
    tallies: dict[str, _Tally] = {}
    for record in journal.lines():
        tallies.setdefault(record.model, _Tally()).add(record)
    found = [tally.statistics(model) for model, tally in tallies.items()]
    return sorted(found, key=lambda s: (-s.n_records, s.model))


def fault_of(record: Record) -> FaultCode | None:
    """The fault of an answer that shows without its question, one of `FAULTS`; None for any other answer.

    Whether JSON keeps the schema of its question is not looked at.
    """
    try:
        text = usable_text(record)
        # An answer with log-probabilities is one word; everything else is asked for as JSON.
        if not record.top_logprobs:
            parse_judgements(text, ())
    except AnswerFault as fault:
        return fault.code if fault.code in FAULTS else None
    return None


class _Seen:
    """What `check_journal` keeps of every record: numbers in arrays, since there may be millions."""

    def __init__(self) -> None:
        self.keys, self.cells, self.answers = array("Q"), array("Q"), array("Q")
        self._n_cells = array("l")
        self._input_tokens, self._output_tokens = array("q"), array("q")
        self._cost_usd = array("d")

    def add(self, record: Record) -> None:
        self.keys.append(_start_of(record.key))
        self.cells.extend(map(_start_of, record.cells))
        self.answers.append(_fingerprint(_name_of(record)))
        self._n_cells.append(len(record.cells))
        self._input_tokens.append(record.input_tokens)
        self._output_tokens.append(record.output_tokens)
        self._cost_usd.append(math.nan if record.cost_usd is None else record.cost_usd)

    def asked_again(self) -> AskedAgain:
        keys = np.asarray(self.keys, np.uint64)
        again = _is_repeat(keys)

        def total(numbers: array[int]) -> int:
            return int(np.asarray(numbers)[again].sum())

        return AskedAgain(
            n_requests=len(np.unique(keys[again])),
            n_records=int(again.sum()),
            n_without_cells=int((np.asarray(self._n_cells)[again] == 0).sum()),
            usage=Usage(total(self._input_tokens), total(self._output_tokens)),
            cost_usd=_total_usd(np.asarray(self._cost_usd)[again]),
        )


class _Tally:
    """What `statistics` keeps of one model's records."""

    def __init__(self) -> None:
        self._n_records = self._n_cells = self._input_tokens = self._output_tokens = self._n_counted = 0
        self._cost_usd, self._seconds = array("d"), array("d")
        self._faults, self._prompts, self._batches = Counter[str](), Counter[str](), Counter[str]()
        self._first_at = self._last_at = ""

    def add(self, record: Record) -> None:
        self._n_records += 1
        self._n_cells += len(record.cells)
        self._input_tokens += record.input_tokens
        self._output_tokens += record.output_tokens
        self._n_counted += record.is_counted
        self._cost_usd.append(math.nan if record.cost_usd is None else record.cost_usd)
        # Times are all written in one form, so they sort as text.
        self._first_at = min(self._first_at or record.created_at, record.created_at)
        self._last_at = max(self._last_at, record.created_at)
        self._prompts[record.prompt_sha256] += 1
        if record.batch_id is None:
            self._seconds.append(record.seconds)
        else:
            self._batches[record.batch_id] += 1
        fault = fault_of(record)
        if fault is not None:
            self._faults[fault.value] += 1

    def statistics(self, model: str) -> ModelStatistics:
        costs = np.asarray(self._cost_usd)
        median_s, p95_s = np.percentile(self._seconds, (50, 95)).tolist() if self._seconds else (None, None)
        return ModelStatistics(
            model=model,
            n_records=self._n_records,
            n_cells=self._n_cells,
            input_tokens=self._input_tokens,
            output_tokens=self._output_tokens,
            n_counted=self._n_counted,
            cost_usd=_total_usd(costs),
            n_unpriced=int(np.isnan(costs).sum()),
            first_at=self._first_at,
            last_at=self._last_at,
            median_s=median_s,
            p95_s=p95_s,
            faults={f.value: self._faults[f.value] for f in FAULTS if self._faults[f.value]},
            prompts=dict(self._prompts.most_common()),
            batches=dict(self._batches),
        )


def _name_of(record: Record) -> str:
    """What record and judgement have in common: the model, and the answer's id or else its time."""
    moment = (record.created - _EPOCH) // _MICROSECOND
    return f"{record.model}\n{moment if record.request_id is None else record.request_id}"


def _has_record(rows: pd.DataFrame, answers: Fingerprints) -> npt.NDArray[np.bool_]:
    moments = rows["created_at"].dt.as_unit("us").astype("int64").astype(str)
    names = rows["witness_model"] + "\n" + rows["request_id"].where(rows["request_id"].notna(), moments)
    which, different = pd.factorize(names)
    fingerprints = np.array([_fingerprint(name) for name in different], np.uint64)
    return np.isin(fingerprints, answers)[which]


def _example(row: Any) -> dict[str, str]:
    columns = ("image_id", "concept_id", "witness_model", "request_id")
    return {name: "none" if pd.isna(row[name]) else str(row[name]) for name in columns}


def _start_of(key: str) -> int:
    return int(key[:_FINGERPRINT_DIGITS], 16)


def _fingerprint(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def _is_repeat(values: Fingerprints) -> npt.NDArray[np.bool_]:
    """Whether each value stood before in the same array."""
    order = np.argsort(values, kind="stable")
    is_repeat = np.zeros(len(values), bool)
    is_repeat[order[1:]] = values[order[1:]] == values[order[:-1]]
    return is_repeat


def _n_repeated(values: Fingerprints) -> int:
    """How many different values occur more than once."""
    return int((np.unique(values, return_counts=True)[1] > 1).sum())


def _total_usd(costs: npt.NDArray[np.float64]) -> float | None:
    known = costs[~np.isnan(costs)]
    return math.fsum(known) if len(known) else None
