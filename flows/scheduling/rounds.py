"""One round of work on a run folder, without knowing who runs the steps: everything, or what a schedule allows.

A step is run by the `Do` that is handed in: a Prefect task in a flow, a plain call in a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from data_contracts.errors import VocabularyMismatch
from data_contracts.tables import IMAGES
from flows import approval, promotion
from flows.candidate import candidate_context, dataset_step, unfinished
from flows.chain import Context, Step, StepReport, execute, is_fresh
from flows.scheduling.arrivals import arrivals
from flows.scheduling.conditions import decide, situation
from flows.steps import DATASET, EXPLAIN, INGEST, LAST_ANNOTATION_STEP, REPORT, TRAIN, chain_for
from flows.steps.drift import BASELINE, DRIFT
from flows.steps.promote import PROMOTE

Do = Callable[[Step, Context], StepReport]

State = Literal["done", "deferred", "waiting"]
"""`deferred`: a person is asked; `waiting`: nothing could be done now, the next round goes on."""


@dataclass
class Round:
    """What a round did."""

    reports: list[StepReport] = field(default_factory=list)
    state: State = "done"
    sentences: list[str] = field(default_factory=list)
    """What was decided, and why; for people."""

    def ended(self, state: State, sentence: str) -> Round:
        """The round, ended in this state for this reason."""
        self.state = state
        self.sentences.append(sentence)
        return self


def everything(context: Context, do: Do, last_step: str | None = None) -> Round:
    """Every step that the source allows, up to `last_step`; a person asked for it, so nothing else is asked."""
    found = Round(sentences=put_right(context))
    done: set[str] = set()
    # What the chain holds depends on what was ingested (labels or none), so it is asked again after every step.
    while (step := next((s for s in chain_for(context, last_step) if s.name not in done), None)) is not None:
        _one(step, context, do, found)
        done.add(step.name)
    return found


def scheduled(context: Context, do: Do) -> Round:
    """What is new is labelled; trained is only when a condition holds, and never on drifted images without a yes."""
    found = Round(sentences=put_right(context))
    settings = context.settings.schedule
    arrived = arrivals(context.source, settings.settle_s, (context.run.path,))
    if arrived.sentence:
        found.sentences.append(arrived.sentence)
    if arrived.tables or not arrived.n_settled:
        return found.ended("waiting", "nothing is done before the files above are whole.")
    context = replace(context, held=arrived.held)
    _annotate(context, do, found)
    if _drifts(context, do, found):
        found.reports.append(do(REPORT, context))
        question = approval.waiting(context.run)
        sentence = question.sentence if question else "an answer about drifted images is there."
        return found.ended(
            "deferred",
            f"no training before a person decides: {sentence} `medmicn approve` or `medmicn reject` "
            f"--run {context.run.path}, or the review page.",
        )
    decision = decide(situation(context), settings)
    found.sentences.append(decision.sentence)
    may_wait = [DATASET, TRAIN] if promotion.current(context.run) else [DATASET, TRAIN, EXPLAIN]
    for step in chain_for(context)[len(chain_for(context, LAST_ANNOTATION_STEP)) :]:
        # A kill may have left the model in use unexplained, so that is looked at every time.
        if decision.train or step not in may_wait:
            _one(step, context, do, found)
    return found


def by_hand(context: Context, step: Step) -> Round:
    """One step that a person asked for: a model that it trains comes into use, and the one before is kept."""
    found = Round(sentences=put_right(context))
    if step is not TRAIN:
        _one(step, context, execute, found)
        return found
    found.reports.append(execute(TRAIN, candidate_context(context)))
    folder = unfinished(context.run)
    if folder is not None:
        number = promotion.settle(context, folder, verdict="trained by hand, compared with none", promoted=True)
        found.sentences.append(f"model {number} is in use; `medmicn models` lists the ones before.")
    return found


def roll_back(context: Context, number: int | None) -> Round:
    """Use an earlier model again, with its explanations and report; raises `ConfigurationError` where there is none."""
    run, found = context.run, Round(sentences=put_right(context))
    folder, version = promotion.find(run, number)
    promotion.switch_to(run, folder)
    found.sentences.append(f"model {version.number} is in use again (made {version.made_at[:19]} UTC).")
    for step in (BASELINE, EXPLAIN, REPORT):
        _one(step, context, execute, found)
    return found


def is_everything_fresh(context: Context) -> bool:
    """Whether `everything` would do nothing."""
    steps = [dataset_step(context.run) if s is DATASET else s for s in chain_for(context)]
    return unfinished(context.run) is None and all(is_fresh(step, context) for step in steps)


def put_right(context: Context) -> list[str]:
    """Finish what a kill left half done, record a model that was trained without, take an answer that was given.

    Returns what there is to say about it.
    """
    promotion.recover(context.run)
    promotion.register(context)
    given = approval.take_answer(context.run)
    return [] if given is None else [given.sentence]


def _annotate(context: Context, do: Do, found: Round) -> None:
    done: set[str] = set()
    while (s := next((s for s in chain_for(context, LAST_ANNOTATION_STEP) if s.name not in done), None)) is not None:
        found.reports.append(do(s, context))
        done.add(s.name)
        if s is INGEST:
            _say_cut_off(context, found)


def _say_cut_off(context: Context, found: Round) -> None:
    images = context.run.read_images() if context.run.table_path(IMAGES).is_file() else None
    n_cut = 0 if images is None else int((images["rejected"] == "truncated").sum())
    if n_cut:
        found.sentences.append(f"{n_cut} image(s) are cut off: left out, and read again as soon as the file changes.")


def _drifts(context: Context, do: Do, found: Round) -> bool:
    """Whether a person has to be asked before anything is trained."""
    run = context.run
    if approval.waiting(run) is not None:
        return True
    if not context.settings.schedule.watch_drift or promotion.current(run) is None:
        return False
    # Mostly there; a kill may have left the one of the model before.
    found.reports.append(do(BASELINE, context))
    report = do(DRIFT, context)
    found.reports.append(report)
    n_tests, n_new = report.counts.get("tests", 0), int(report.counts.get("new_images", 0))
    if n_new and not n_tests:
        found.sentences.append(
            f"drift: {n_new} new images are too few to test ({context.settings.schedule.drift_min_images} are needed)"
        )
    elif n_new:
        found.sentences.append(f"drift: {n_tests:g} tests on {n_new} new images, {report.counts['fired']:g} fired")
    return approval.waiting(run) is not None


def _one(step: Step, context: Context, do: Do, found: Round) -> None:
    if step is DATASET:
        found.reports.append(do(dataset_step(context.run), candidate_context(context)))
    elif step is TRAIN:
        _train(context, do, found)
    elif step is EXPLAIN:
        _explain(context, do, found)
    else:
        found.reports.append(do(step, context))


def _train(context: Context, do: Do, found: Round) -> None:
    found.reports.append(do(TRAIN, candidate_context(context)))
    if unfinished(context.run) is not None:
        report = do(PROMOTE, context)
        found.reports.append(report)
        newest = promotion.newest(context.run)
        if newest is not None:
            found.sentences.append(f"model {newest[1].number}: {newest[1].verdict}")
    if context.settings.schedule.watch_drift and promotion.current(context.run) is not None:
        found.reports.append(do(BASELINE, context))


def _explain(context: Context, do: Do, found: Round) -> None:
    try:
        found.reports.append(do(EXPLAIN, context))
    except VocabularyMismatch as error:
        # A refused model may have been trained with other concepts than the one that stays in use.
        found.sentences.append(f"explanations stay as they were: the model in use knows other concepts ({error})")
