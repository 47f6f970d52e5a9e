"""Knock-out: what the decision loses when concepts are hidden from the class layer.

A hidden concept has the mean embedding and the mean truth value that it has over the training images: the class layer
still gets an ordinary input, but one that says nothing of the image at hand. Hiding the truth value alone is not
enough in networks with concept embeddings, whose two contexts carry knowledge of the image too; it is measured beside.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.stats import binomtest

from model.concept_encoder import ConceptCode, Intervention
from model.explain.bootstrap import Resampling
from model.explain.curves import units_of
from model.explain.paths import HeadPaths, Subject, mean_code, shuffled_code, with_some
from model.intervals import Interval, holm

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

KNOCK_OUT_COLUMNS = (
    *("concept_id", "concept", "drop", "low", "high", "control", "changed", "changed_low", "changed_high"),
    *("truth_drop", "truth_low", "truth_high", "p", "p_corrected", "kind"),
)
CONCEPT, ATTRIBUTE = "concept", "attribute"


class Decisions(NamedTuple):
    """(N,) classes that the held-out images get, one way or another."""

    whole: Ints
    """As the classifier is used."""
    without_concepts: Ints
    """Concepts hidden; features as they are."""
    shuffled: Ints
    """Concepts of another image; features as they are."""
    truths_hidden: Ints
    """Truth values hidden; what embeddings hold besides as it is."""
    concepts_alone: Ints
    """Concepts as they are; past them, the features of no image in particular."""


def decisions(subject: Subject, paths: HeadPaths, code: ConceptCode, mean: ConceptCode, seed: int = 0) -> Decisions:
    """What the head says of the held-out images; `code` is theirs, `mean` (1, …) that of the training images."""
    held, n = subject.held_out, len(subject.held_out)
    hidden = mean_code(mean, n)
    order = np.random.default_rng(seed).permutation(n).astype(np.int64)
    nobody = subject.train.features.mean(0, keepdim=True).expand(n, -1)
    everywhere = torch.ones_like(code.probabilities, dtype=torch.bool)
    return Decisions(
        *(
            logits.argmax(1).numpy().astype(np.int64)
            for logits in (
                paths.logits(held.features),
                paths.logits(held.features, hidden),
                paths.logits(held.features, shuffled_code(code, order)),
                paths.corrected(held.features, Intervention(hidden.probabilities, everywhere)),
                paths.logits(nobody, code),
            )
        )
    )


def knock_out(
    subject: Subject, paths: HeadPaths, code: ConceptCode, mean: ConceptCode, resampling: Resampling, seed: int = 0
) -> pd.DataFrame:
    """One row a concept, and one an exclusive attribute of several values; the most needed first.

    drop: accuracy that is lost without it. changed: fraction of the decisions that become another. control: drop when
    it is given as it is in another image. truth_drop: drop when its truth value alone is hidden. p: of the sign test
    that as many decisions became wrong as became right (McNemar, exact); p_corrected: by Holm, over all rows.
    """
    held, n = subject.held_out, len(subject.held_out)
    hidden = mean_code(mean, n)
    other = shuffled_code(code, np.random.default_rng(seed).permutation(n).astype(np.int64))
    whole = _said(paths, subject, code)
    rows = []
    for name, columns, kind in _parts(subject):
        said = _said(paths, subject, with_some(code, hidden, columns))
        control = _said(paths, subject, with_some(code, other, columns))
        where = torch.zeros_like(code.probabilities, dtype=torch.bool)
        where[:, torch.from_numpy(columns)] = True
        truth = paths.corrected(held.features, Intervention(hidden.probabilities, where)).argmax(1).numpy()
        changed = resampling.fraction(said != whole)
        lost, control_lost, truth_lost = (drop(whole, now, held.y, resampling) for now in (said, control, truth))
        p = _sign_test(whole == held.y, said == held.y)
        rows.append((name, _shown(name, subject), *lost, control_lost.value, *changed, *truth_lost, p, p, kind))
    table = pd.DataFrame(rows, columns=list(KNOCK_OUT_COLUMNS))
    table["p_corrected"] = holm(table["p"].tolist())
    return table.sort_values(["kind", "drop", "changed"], ascending=[False, False, False], ignore_index=True)


def drop(before: Ints, after: Ints, y: Ints, resampling: Resampling) -> Interval:
    """Accuracy before less accuracy after, with its paired interval."""
    return resampling.mean((before == y).astype(np.float64) - (after == y))


def _parts(subject: Subject) -> list[tuple[str, Ints, str]]:
    single = [(c, np.array([k], np.int64), CONCEPT) for k, c in enumerate(subject.vocabulary.ids)]
    return single + [(name, columns, ATTRIBUTE) for name, columns in units_of(subject.vocabulary) if len(columns) > 1]


def _shown(name: str, subject: Subject) -> str:
    return subject.vocabulary[name].name if name in subject.vocabulary else name


def _said(paths: HeadPaths, subject: Subject, code: ConceptCode) -> Ints:
    return paths.logits(subject.held_out.features, code).argmax(1).numpy().astype(np.int64)


def _sign_test(before: Bools, after: Bools) -> float:

    n_worse, n_better = int((before & ~after).sum()), int((~before & after).sum())
    return 1.0 if n_worse + n_better == 0 else float(binomtest(n_worse, n_worse + n_better).pvalue)
