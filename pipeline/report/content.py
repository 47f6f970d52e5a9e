"""What a report is made of. Every part is optional: a run that is half done still gets its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_contracts.ports import Pixels

Metric = float | Sequence[float] | Mapping[str, float]
"""One number, one number a seed, or {"mean": …, "sd": …}. Fractions 0-1, as everywhere."""


class Tile(NamedTuple):
    """One small picture. The caption holds ids and scores, never a file name: those can name patients."""

    caption: str
    pixels: Pixels
    """(H, W, 3) uint8; shrunk and re-encoded for the page."""
    heatmap: npt.NDArray[np.floating[Any]] | None = None
    """(h, w), any range, covering the whole picture. The maps of one concept share a scale."""


class ConceptExamples(NamedTuple):
    """Pictures of one concept; any row may be empty."""

    strongest: Sequence[Tile] = ()
    weakest: Sequence[Tile] = ()
    disputed: Sequence[Tile] = ()


@dataclass(frozen=True)
class ReportContent:
    """Everything one report says."""

    name: str
    """Name of the run."""
    made_at: datetime
    modality: str = ""
    synthetic: bool = False
    """True for generated images; the page then says so at the top."""

    images: pd.DataFrame | None = None
    """`images` table, rejected rows included."""
    class_examples: Mapping[str, Sequence[Tile]] = field(default_factory=dict)
    """A few pictures of each class."""
    concepts: pd.DataFrame | None = None
    """`concepts` table, dropped rows included."""
    labels: pd.DataFrame | None = None
    """`labels` table."""
    agreement: pd.DataFrame | None = None
    """concept_id, first, second (who is compared with whom; or witness, reference), n, kappa, and if known
    kappa_low, kappa_high, sensitivity, specificity, ppv, npv, auroc. Several pairs may follow each other;
    the first is the one that the overview shows, so put the comparison with an expert or a known truth first."""
    leaks: pd.DataFrame | None = None
    """concept_id, auroc (how well the class alone predicts the concept, 0.5-1) and, if known,
    flagged (bool: constant within classes, or over the limit)."""
    trust: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """What speaks for and against the labels, by the names of `evidence.TRUST`."""
    label_reliability: pd.DataFrame | None = None
    """confidence, observed, n: the fused labels' probabilities against experts, one row a bin."""
    examples: Mapping[str, ConceptExamples] = field(default_factory=dict)
    """Pictures by concept id."""

    history: pd.DataFrame | None = None
    """epoch, seed, train_loss, val_loss, val_macro_f1: one row an epoch and seed."""
    chosen_epochs: Mapping[int, int] = field(default_factory=dict)
    """Seed → epoch that was kept."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """Test metrics by name: accuracy, macro_precision, macro_recall, macro_f1, auroc, concept_auroc,
    concept_f1, ece, brier, rule_macro_f1, … Unknown names are shown too, without an explanation."""
    per_class: pd.DataFrame | None = None
    """class, precision, recall, f1, support on the test images."""
    confusion: pd.DataFrame | None = None
    """Index: true class; columns: predicted class; values: test images."""
    calibration: pd.DataFrame | None = None
    """confidence, accuracy, n: one row a bin of predicted probability."""
    concept_metrics: pd.DataFrame | None = None
    """concept_id, auroc and, if known, f1 of the concept predictions on the test images."""
    systems: pd.DataFrame | None = None
    """Comparison: system, and per metric a column NAME or the pair NAME_mean and NAME_sd."""

    rules: pd.DataFrame | None = None
    """class, rule, support (test images where the rule holds), precision, recall, coverage, fidelity."""
    rules_text: str = ""
    """The rules as a person reads them."""
    evidence: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """Whether the concepts are used, and how far the maps and the classifier hold, by the names of
    `evidence.EVIDENCE`; `interventions` and `knock_out` are drawn too."""
    concept_use_text: str = ""
    """One page in plain words (a little Markdown) about how much of the decision goes through the concepts."""
    evidence_pictures: Sequence[tuple[str, bytes]] = ()
    """Plots as (what it shows, PNG)."""
    saliency: Sequence[Tile] = ()
    """Held-out pictures with the class map."""

    manifest: Mapping[str, Any] = field(default_factory=dict)
    """`run.json` as a dict: config, versions, steps, warnings."""
    limits: Sequence[str] = ()
    """Limits of this very run, as sentences; general ones are always on the page."""
