"""Intervention curves: how accuracy moves as more and more concepts are corrected, with right and with wrong answers.

A network that decides through its concepts gets better with right corrections and worse with wrong ones. One that
only gets better, or does not move, does not listen. Values of one exclusive attribute are corrected together, as an
expert would. Three orders: at random; the network's least certain concepts first; and by utility, that is by how much
correcting each one helped on validation images. Labels of held-out images stand in for the expert, here and nowhere
else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch.nn import functional as F

from data_contracts.concepts import Vocabulary
from model.concept_encoder import Intervention
from model.explain.bootstrap import Resampling
from model.explain.paths import HeadPaths, Seen, Subject
from model.intervals import NOTHING, Interval

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]

RANDOM, UNCERTAINTY, UTILITY = "random", "uncertainty", "utility"
RIGHT, WRONG = "right", "wrong"
CURVE_COLUMNS = (
    *("order", "corrections", "n_corrected", "fraction", "n_concepts"),
    *("accuracy", "low", "high", "sd", "macro_f1", "n_images", "n_repeats"),
)
_MAX_STEPS = 10
N_REPEATS = 5


class Curve(NamedTuple):
    """One order and kind of corrections."""

    order: str
    corrections: str
    table: pd.DataFrame
    """One row a number of corrections, columns as in `CURVE_COLUMNS`."""
    area: Interval
    """Mean accuracy over the curve less the accuracy without corrections."""


def units_of(vocabulary: Vocabulary) -> list[tuple[str, Ints]]:
    """What is corrected at once: each exclusive attribute, and each concept that belongs to none; name and columns."""
    units: dict[str, list[int]] = {}
    for k, concept in enumerate(vocabulary):
        units.setdefault(f"{concept.group} (all values)" if concept.group else concept.concept_id, []).append(k)
    return [(name, np.asarray(columns, np.int64)) for name, columns in units.items()]


def corrections(seen: Seen, units: list[tuple[str, Ints]], kind: str, rng: np.random.Generator) -> Floats:
    """(N, K) the labels as corrections; for `wrong` the opposite, of an exclusive attribute another of its values.

    Which value that is, is drawn; cells without a label are meaningless and must not be corrected.
    """
    right = seen.targets >= 0.5
    if kind == RIGHT:
        return right.astype(np.float32)
    wrong = ~right
    for _, columns in units:
        size = len(columns)
        one = (right[:, columns].sum(1) == 1) & seen.mask[:, columns].all(1)
        if size < 2 or not one.any():
            continue
        true = right[np.ix_(one, columns)].argmax(1)
        other = (true + rng.integers(1, size, len(true))) % size
        wrong[np.ix_(one, columns)] = np.eye(size, dtype=bool)[other]
    return wrong.astype(np.float32)


def intervention_curves(subject: Subject, seed: int = 0, n_repeats: int = N_REPEATS) -> list[Curve]:
    """The six curves on the held-out images; none for a head without concepts, or without any known label."""
    held = subject.held_out
    paths, units = HeadPaths(subject.head), units_of(subject.vocabulary)
    own = paths.code(held.features) if len(held) else None
    if own is None or not held.mask.any():
        return []
    fixed = {UNCERTAINTY: _uncertainty_ranks(own.probabilities.numpy(), units)}
    if len(subject.val):
        fixed[UTILITY] = np.tile(_ranked(utilities(paths, subject.val, units)), (len(held), 1))
    runner = _Runner(paths, held, units, len(subject.class_names))
    curves = []
    for order in (RANDOM, *fixed):
        for kind in (RIGHT, WRONG):
            repeats = 1 if kind == RIGHT and order != RANDOM else n_repeats
            rngs = np.random.default_rng(seed).spawn(repeats)
            drawn = [
                (fixed.get(order, _random_ranks(len(held), len(units), rng)), corrections(held, units, kind, rng))
                for rng in rngs
            ]
            curves.append(runner.curve(order, kind, drawn))
    return curves


def utilities(paths: HeadPaths, val: Seen, units: list[tuple[str, Ints]]) -> Floats:
    """(U,) fall of the mean cross-entropy on these images when one unit alone is corrected; larger is more useful."""
    y = torch.from_numpy(val.y)
    right = torch.from_numpy((val.targets >= 0.5).astype(np.float32))
    before = F.cross_entropy(paths.logits(val.features), y)
    found = []
    for _, columns in units:
        where = np.zeros_like(val.mask)
        where[:, columns] = val.mask[:, columns]
        after = F.cross_entropy(paths.corrected(val.features, Intervention(right, torch.from_numpy(where))), y)
        found.append(float(before - after))
    return np.asarray(found)


class _Runner(NamedTuple):
    paths: HeadPaths
    held: Seen
    units: list[tuple[str, Ints]]
    n_classes: int

    def curve(self, order: str, kind: str, repeats: list[tuple[Ints, Floats]]) -> Curve:
        """The curve over repeats of (ranks (N, U), values (N, K))."""
        resampling = Resampling(len(self.held), self.held.groups)
        rows: list[tuple[object, ...]] = []
        correct_by_step: list[Floats] = []
        counts = _step_counts(len(self.units))
        for n in counts:
            said = [self._said(n, ranks, values) for ranks, values in (repeats if n else repeats[:1])]
            hits = np.stack([predicted == self.held.y for predicted, _ in said]).astype(np.float64)
            accuracy = resampling.mean(hits.mean(0))
            f1 = [resampling.macro_f1(self.held.y, predicted, self.n_classes).value for predicted, _ in said]
            sd = float(hits.mean(1).std(ddof=1)) if len(said) > 1 else 0.0
            n_cells = float(np.mean([cells for _, cells in said]))
            numbers = (n, n / len(self.units), n_cells, *accuracy, sd, float(np.mean(f1)), len(self.held), len(said))
            rows.append((order, kind, *numbers))
            correct_by_step.append(hits.mean(0))
        table = pd.DataFrame(rows, columns=list(CURVE_COLUMNS))
        return Curve(order, kind, table, _area(np.stack(correct_by_step), table["fraction"].to_numpy(), resampling))

    def _said(self, n: int, ranks: Ints, values: Floats) -> tuple[Ints, float]:
        """(N,) classes after the n units of smallest rank are corrected; mean number of cells that were."""
        where = np.zeros_like(self.held.mask)
        for u, (_, columns) in enumerate(self.units):
            where[:, columns] = (ranks[:, u] < n)[:, None]
        where &= self.held.mask
        correction = Intervention(torch.from_numpy(values), torch.from_numpy(where))
        logits = self.paths.corrected(self.held.features, correction)
        return logits.argmax(1).numpy().astype(np.int64), float(where.sum(1).mean())


def _step_counts(n_units: int) -> list[int]:
    return sorted({round(n) for n in np.linspace(0, n_units, min(n_units, _MAX_STEPS) + 1)})


def _area(correct: Floats, fractions: Floats, resampling: Resampling) -> Interval:
    """Area between the curve and its start, from (S, N) correctness of each image at each step."""
    if len(fractions) < 2:
        return NOTHING
    per_image = np.trapezoid(correct, fractions, axis=0) - correct[0]
    return resampling.mean(per_image)


def _ranked(keys: Floats) -> Ints:
    """(…, U) rank of each key, the largest first."""
    order: Ints = np.argsort(np.argsort(-keys, axis=-1, kind="stable"), axis=-1).astype(np.int64)
    return order


def _random_ranks(n_images: int, n_units: int, rng: np.random.Generator) -> Ints:
    return _ranked(rng.random((n_images, n_units)))


def _uncertainty_ranks(probabilities: Floats, units: list[tuple[str, Ints]]) -> Ints:
    doubt = np.minimum(probabilities, 1 - probabilities)
    return _ranked(np.stack([doubt[:, columns].max(1) for _, columns in units], axis=1))


def rows_of(curves: list[Curve]) -> pd.DataFrame:
    """All curves as one table."""
    return pd.concat([curve.table for curve in curves], ignore_index=True) if curves else _empty()


def areas_of(curves: list[Curve]) -> Iterator[tuple[str, str, Interval]]:
    """Order, kind and area of each curve."""
    for curve in curves:
        yield curve.order, curve.corrections, curve.area


def _empty() -> pd.DataFrame:
    return pd.DataFrame(columns=list(CURVE_COLUMNS))
