"""Are the concepts used? Every measure on held-out images, with its interval, beside its control.

Nothing here is proof alone: hidden concepts show what the class layer reads, shuffled ones what it believes, corrected
ones whether it follows a person, probes what the concepts carry. All of them together tell a network that decides by
its concepts from one that decides beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from model.concept_encoder import ConceptCode
from model.explain.bootstrap import Resampling
from model.explain.curves import RIGHT, WRONG, Curve, intervention_curves
from model.explain.knock_out import KNOCK_OUT_COLUMNS, Decisions, decisions, drop, knock_out
from model.explain.paths import HeadPaths, Subject
from model.explain.probes import (
    EMBEDDINGS,
    HARD,
    LABELS,
    LINEAR,
    NON_LINEAR,
    PROBABILITIES,
    RANDOM_DIRECTIONS,
    Codes,
    Probe,
    best_correct,
    completeness,
    leakage,
    probes,
)
from model.intervals import NOTHING, Interval
from model.network import Head

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

_N_SHUFFLES = 50
BY_CONSTRUCTION = "by construction"
"""Why a number has no control: the system has no way past its concepts."""
MEASURE_COLUMNS = ("measure", "value", "low", "high", "control", "control_is", "meaning")


class Measure(NamedTuple):
    """One row of `concept_use.csv`."""

    measure: str
    interval: Interval
    control: float
    control_is: str
    """What the control is, in words."""
    meaning: str


@dataclass
class ConceptUse:
    """All that was found out; empty but for the accuracy where a system has no concepts."""

    has_concepts: bool
    n_images: int
    measures: list[Measure] = field(default_factory=list)
    knock_out: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(KNOCK_OUT_COLUMNS)))
    curves: list[Curve] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """What could not be measured, and why."""

    @property
    def table(self) -> pd.DataFrame:
        """One row a measure, columns as in `MEASURE_COLUMNS`."""
        rows = [(m.measure, *m.interval, m.control, m.control_is, m.meaning) for m in self.measures]
        return pd.DataFrame(rows, columns=list(MEASURE_COLUMNS))

    def of(self, name: str) -> Measure | None:
        """The measure of that name, if it was taken."""
        return next((m for m in self.measures if m.measure == name), None)


def concept_use(subject: Subject, random_head: Head | None = None, *, seed: int = 0) -> ConceptUse:
    """Everything about the use of concepts by one trained head; `random_head` was trained on random concepts."""
    held = subject.held_out
    examined = _Examined.of(subject)
    use = ConceptUse(examined.code is not None, len(held))
    if not len(held):
        use.remarks.append(f"The {subject.split} split has no image, so nothing could be measured.")
        return use
    use.remarks += _about_splits(subject)
    if examined.code is None or examined.mean is None:
        use.measures.append(examined.accuracy(examined.paths.logits(held.features).argmax(1).numpy()))
        return use
    found = decisions(subject, examined.paths, examined.code, examined.mean, seed)
    use.measures += _of_paths(examined, found, random_head, seed)
    use.knock_out = knock_out(subject, examined.paths, examined.code, examined.mean, examined.resampling, seed)
    use.measures += _of_probes(examined, found.whole == held.y, use.remarks, seed)
    use.curves = intervention_curves(subject, seed)
    if not use.curves:
        use.remarks.append("No held-out image has a concept label, so nothing could be corrected.")
    use.measures += _of_curves(use.curves)
    return use


class _Examined(NamedTuple):
    """A subject with what is computed once."""

    subject: Subject
    paths: HeadPaths
    code: ConceptCode | None
    """Of the held-out images."""
    train_code: ConceptCode | None
    mean: ConceptCode | None
    resampling: Resampling
    chance: Bools
    """(N,) where the commonest class of the training images is right."""

    @classmethod
    def of(cls, subject: Subject) -> _Examined:
        paths, held = HeadPaths(subject.head), subject.held_out
        code, train_code = paths.code(held.features), paths.code(subject.train.features)
        mean = None if train_code is None else ConceptCode(*(part.mean(0, keepdim=True) for part in train_code))
        commonest = np.bincount(subject.train.y, minlength=len(subject.class_names)).argmax()
        return cls(subject, paths, code, train_code, mean, Resampling(len(held), held.groups), held.y == commonest)

    def accuracy(self, predicted: Ints) -> Measure:
        return Measure(
            "accuracy",
            self.resampling.mean(predicted == self.subject.held_out.y),
            float(self.chance.mean()),
            "always the commonest class",
            "Images that the classifier gets right.",
        )


# ---- the two paths -------------------------------------------------------------------------------------------


def _of_paths(examined: _Examined, found: Decisions, random_head: Head | None, seed: int) -> list[Measure]:
    y, resampling = examined.subject.held_out.y, examined.resampling
    measures = [examined.accuracy(found.whole)]
    lost = {name: drop(found.whole, getattr(found, name), y, resampling) for name in Decisions._fields[1:]}
    measures += [
        Measure(
            "lost_without_concepts",
            lost["without_concepts"],
            lost["concepts_alone"].value,
            "accuracy lost when the direct way from the features is hidden instead",
            "Accuracy that is lost when all concepts are hidden: each gets its mean over the training images.",
        ),
        Measure(
            "lost_with_truth_values_hidden",
            lost["truths_hidden"],
            lost["without_concepts"].value,
            "accuracy lost when embeddings are hidden too",
            "The same when only the truth values are hidden, which are all that a person can correct.",
        ),
        Measure(
            "lost_with_shuffled_concepts",
            lost["shuffled"],
            float((found.whole == y).mean() - examined.chance.mean()),
            "all that can be lost: down to the commonest class",
            "Accuracy that is lost when each image is given the concepts of another image.",
        ),
        Measure(
            "accuracy_of_concepts_alone",
            resampling.mean(found.concepts_alone == y),
            float((found.whole == y).mean()),
            "accuracy of the classifier as it is used",
            "Accuracy of the trained class layer when only its concepts are of the image.",
        ),
        _share(examined, seed),
    ]
    if random_head is not None:
        measures += _of_random_head(examined, found, random_head, seed)
    return measures


def _share(examined: _Examined, seed: int) -> Measure:
    held = examined.subject.held_out
    side = examined.paths.side_logits(held.features)
    meaning = "Part of the variation of the class logits over classes and images that comes through the concepts."
    if side is None:
        return Measure("share_through_concepts", Interval(1.0, 1.0, 1.0), float("nan"), BY_CONSTRUCTION, meaning)
    total = examined.paths.logits(held.features)
    whole, concepts = contrasts(total.numpy()), contrasts((total - side).numpy())
    rng, variation = np.random.default_rng(seed), float((whole**2).sum())
    others = [float((concepts[rng.permutation(len(whole))] * whole).sum()) for _ in range(_N_SHUFFLES)]
    by_chance = float(np.mean(others)) / variation if variation > 0 else float("nan")
    share = examined.resampling.ratio((concepts * whole).sum(1), (whole**2).sum(1))
    return Measure("share_through_concepts", share, by_chance, "the same with another image's concepts", meaning)


def contrasts(logits: Floats) -> Floats:
    """(N, C) logits less their mean over classes, which decides nothing, and less each class's mean over images."""
    within = logits.astype(np.float64) - logits.mean(1, keepdims=True, dtype=np.float64)
    return within - within.mean(0)


def _of_random_head(examined: _Examined, found: Decisions, random_head: Head, seed: int) -> list[Measure]:
    subject = replace(examined.subject, head=random_head)
    other = _Examined.of(subject)
    if other.code is None or other.mean is None:
        return []
    y, resampling = subject.held_out.y, examined.resampling
    nonsense = decisions(subject, other.paths, other.code, other.mean, seed)
    return [
        Measure(
            "accuracy_with_random_concepts",
            resampling.mean(nonsense.whole == y),
            float((found.whole == y).mean()),
            "accuracy with the right concept labels",
            "Accuracy of the same system trained on concept labels that were shuffled between images. As high as the "
            "control: the class needs no meaning in the concepts.",
        ),
        Measure(
            "lost_with_random_concept_labels",
            drop(found.whole, nonsense.whole, y, resampling),
            float((found.whole == y).mean() - examined.chance.mean()),
            "all that can be lost: down to the commonest class",
            "Accuracy that the right labels gain over the shuffled ones, on the same images.",
        ),
        Measure(
            "random_concepts_alone",
            resampling.mean(nonsense.concepts_alone == y),
            float((found.concepts_alone == y).mean()),
            "the same with the right concept labels",
            "Accuracy of that system's concepts alone: what their embeddings carry although they mean nothing.",
        ),
    ]


# ---- probes and curves ---------------------------------------------------------------------------------------


def _of_probes(examined: _Examined, correct: Bools, remarks: list[str], seed: int) -> list[Measure]:
    subject, resampling = examined.subject, examined.resampling
    if examined.code is None or examined.train_code is None:
        return []
    found = probes(subject, Codes(examined.train_code, examined.paths.code(subject.val.features), examined.code))
    if not found:
        remarks.append("The training images have one class only, so no probe could be fitted.")
        return []
    carried = [name for name in (PROBABILITIES, EMBEDDINGS) if (LINEAR, name) in found]
    measures = [_of_probe(found[kind, given], found, resampling) for given in (LABELS, HARD, *carried)
                for kind in (LINEAR, NON_LINEAR)]  # fmt: skip
    for given in carried:
        for kind in (LINEAR, NON_LINEAR):
            gained, by_chance = leakage(found, kind, given, resampling)
            measures.append(
                Measure(
                    f"leakage_{kind}_{given}",
                    gained,
                    by_chance.value,
                    "the same with those of another image",
                    f"Accuracy that a probe gains when it has the network's {given} beside the concepts' labels: "
                    "knowledge of the class that is not in the concepts' meaning.",
                )
            )
    by_chance_complete = completeness(best_correct(found, RANDOM_DIRECTIONS), correct, examined.chance, resampling)
    for given in carried:
        measures.append(
            Measure(
                f"completeness_{given}",
                completeness(best_correct(found, given), correct, examined.chance, resampling),
                by_chance_complete.value,
                "as many random directions of the features",
                f"How far the concepts' {given} carry the decision: 0 is the commonest class, 1 the classifier.",
            )
        )
    return measures


_GIVEN = {
    LABELS: "the concepts' labels",
    HARD: "the network's concepts as yes or no",
    PROBABILITIES: "the network's concept probabilities",
    EMBEDDINGS: "the network's concept embeddings",
}


def _of_probe(probe: Probe, found: dict[tuple[str, str], Probe], resampling: Resampling) -> Measure:
    is_labels = probe.given == LABELS
    control = probe.control_correct if is_labels else found[probe.kind, LABELS].correct
    kind = probe.kind.replace("_", "-")
    return Measure(
        f"probe_{probe.kind}_{probe.given}",
        resampling.mean(probe.correct),
        float(control.mean()),
        "the labels of another image" if is_labels else "the same probe on the concepts' labels",
        f"Accuracy of a fresh {kind} classifier that is given {_GIVEN[probe.given]} and nothing else.",
    )


def _of_curves(curves: list[Curve]) -> list[Measure]:
    areas = {(curve.order, curve.corrections): curve.area for curve in curves}
    words = {RIGHT: "right", WRONG: "wrong"}
    return [
        Measure(
            f"area_{kind}_corrections_{order}",
            area,
            areas.get((order, WRONG if kind == RIGHT else RIGHT), NOTHING).value,
            f"the same with {words[WRONG if kind == RIGHT else RIGHT]} corrections",
            f"Mean change of accuracy while more and more concepts get {words[kind]} corrections, {_ORDERS[order]}.",
        )
        for (order, kind), area in areas.items()
    ]


_ORDERS = {"random": "in random order", "uncertainty": "the least certain first", "utility": "the most useful first"}


def _about_splits(subject: Subject) -> list[str]:
    held = subject.held_out
    remarks: list[str] = []
    if len(held) < 30:
        remarks.append(f"The {subject.split} split has {len(held)} images only: intervals are wide, and rough.")
    if len(np.unique(held.y)) < 2:
        remarks.append(f"All images of the {subject.split} split are of one class: accuracies say little.")
    if not len(subject.val):
        remarks.append("There are no validation images: probes are not tuned, and no order by utility is known.")
    constant = _constant(subject)
    if constant:
        shown = ", ".join(constant[:5]) + (f" and {len(constant) - 5} more" if len(constant) > 5 else "")
        remarks.append(f"{len(constant)} concepts are the same in every labelled held-out image: {shown}.")
    return remarks


def _constant(subject: Subject) -> list[str]:
    held = subject.held_out
    present = ((held.targets >= 0.5) & held.mask).sum(0)
    known = held.mask.sum(0)
    same = (known > 0) & ((present == 0) | (present == known))
    return [subject.vocabulary.names[int(k)] for k in np.flatnonzero(same)]
