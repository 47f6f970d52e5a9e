"""The fuse step: one label per image and concept from all witnesses, and tables that say how far to trust it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from data_contracts.concepts import Vocabulary
from data_contracts.files import sha256_of_file
from data_contracts.shards import EvidenceShards
from data_contracts.spreadsheet import write_csv
from data_contracts.tables import CONCEPTS, IMAGES, LABELS, Witness
from flows.chain import Context, ShardRunner, Step, StepResult
from flows.steps.corrections import AUDIT_DESIGN_CSV
from flows.steps.honesty import REFUSED_CSV, refused_of
from flows.steps.images import accepted
from flows.steps.label_trust import AGREEMENT_CSV, LEAKS_CSV, suggestion, write_trust_tables
from flows.steps.learned_labels import LearnedLabels, Said, learn_labels
from flows.steps.thresholds import THRESHOLDS_CSV, require_own_number
from pipeline.export import wide_labels

if TYPE_CHECKING:
    from annotation.trust.gather import Voter

DISAGREEMENTS_CSV = "disagreements.csv"
SHARD_IMAGES = 20_000
"""Images whose answers are in memory at once."""
TRUST_IMAGES = 20_000
"""Images that tables of trust are made from at most; reliabilities are learned on some of them."""
MAX_DISAGREEMENTS = 100_000
"""Rows of `disagreements.csv`: more than a person can look at, and few enough to open."""


def _inputs(context: Context) -> Mapping[str, Any]:
    run, labels, align = context.run, context.settings.labels, context.settings.align
    tables = [run.table_path(CONCEPTS), run.table_path(IMAGES), *run.alignment_parts()]
    tables += [path for name in (REFUSED_CSV, AUDIT_DESIGN_CSV) if (path := run.path / name).is_file()]
    stored = labels.thresholds_file
    return {
        "tables": {path.name: sha256_of_file(path) for path in tables},
        "ledger": sorted(path.name for path in run.judgement_parts()),
        "settings": labels.model_dump(mode="json"),
        "thresholds": sha256_of_file(stored) if stored is not None and stored.is_file() else None,
        "aligner": align.model_dump(mode="json", include={"model", "templates", "value_features", "tile_above"}),
    }


def _work(context: Context, _shards: ShardRunner) -> StepResult:
    run = context.run
    images, vocabulary = accepted(run.read_images()), run.vocabulary()
    require_own_number(context)
    # Images and concepts that left the run stay in the ledger, but get no label.
    evidence = EvidenceShards(run, images["image_id"].tolist(), vocabulary.ids, shard_size=SHARD_IMAGES)
    sample, voters = _sampled(evidence)
    learned = learn_labels(context, images, vocabulary, sample, voters)
    written = _Written()
    run.write_label_shards(_label_shards(context, images, learned, evidence, written))
    found, n_disagreements = written.disagreements()
    write_csv(run.path / DISAGREEMENTS_CSV, _described(found, images, vocabulary))
    write_csv(run.path / THRESHOLDS_CSV, learned.threshold_rows())
    tables, told = write_trust_tables(context, images, vocabulary, sample, learned)
    outputs = [run.table_path(LABELS), run.labels_csv_path, run.path / DISAGREEMENTS_CSV, run.path / THRESHOLDS_CSV]
    warnings = [*written.constant_concepts(), *told, *learned.warnings, *_cut_short(n_disagreements, len(found))]
    warnings += _sampled_sentence(len(images)) + suggestion(len(images), written.prevalence(vocabulary), learned.cells)
    return StepResult([*outputs, *tables], written.counts(vocabulary) | {"disagreements": n_disagreements}, warnings)


@dataclass
class _Written:
    """What is remembered of labels that were written and forgotten."""

    n_labels: int = 0
    n_present: Counter[str] = field(default_factory=Counter)
    n_absent: Counter[str] = field(default_factory=Counter)
    likely: Counter[str] = field(default_factory=Counter)
    n_open: Counter[str] = field(default_factory=Counter)
    opposed: list[pd.DataFrame] = field(default_factory=list)
    n_opposed: int = 0

    def add(self, labels: pd.DataFrame, opposed: pd.DataFrame) -> None:
        """Count one shard."""
        from annotation.trust.disagreements import most_informative

        self.n_labels += len(labels)
        self.n_present.update(labels.loc[labels["present"].fillna(False), "concept_id"].value_counts().to_dict())
        self.n_absent.update(labels.loc[~labels["present"].fillna(True), "concept_id"].value_counts().to_dict())
        by_machine = labels[~labels["decided_by"].isin([Witness.EXPERT, Witness.GIVEN])]
        self.likely.update(by_machine.groupby("concept_id")["probability"].sum().to_dict())
        self.n_open.update(by_machine["concept_id"].value_counts().to_dict())
        self.n_opposed += len(opposed)
        self.opposed = [most_informative([*self.opposed, opposed], MAX_DISAGREEMENTS)[0]]

    def disagreements(self) -> tuple[pd.DataFrame, int]:
        """The most informative disagreements, and how many there are in all."""
        return self.opposed[0], self.n_opposed

    def counts(self, vocabulary: Vocabulary) -> dict[str, float]:
        """What the step says it did."""
        silent = 1 - (self.n_present.total() + self.n_absent.total()) / self.n_labels if self.n_labels else 0.0
        return {"labels": self.n_labels, "concepts": len(vocabulary), "abstained_fraction": round(silent, 3)}

    def prevalence(self, vocabulary: Vocabulary) -> pd.Series:
        """Concept id → mean probability of the cells that no person settled; NaN where there is none."""
        n_open = pd.Series({c: self.n_open[c] for c in vocabulary.ids}, dtype="float64")
        return pd.Series({c: self.likely[c] for c in vocabulary.ids}, dtype="float64") / n_open.where(n_open > 0)

    def constant_concepts(self) -> list[str]:
        """A sentence for every concept that was only ever called one thing."""
        called = self.n_present + self.n_absent
        return [
            f"concept {name!r} has the same label on every image: it tells nothing"
            for name in sorted(called)
            if not (self.n_present[name] and self.n_absent[name])
        ]


def _sampled(evidence: EvidenceShards) -> tuple[Said, tuple[Voter, ...]]:
    """What is said of the images that all is learned from, and every voter of the run; one pass."""
    from annotation.trust.gather import voters_of
    from annotation.trust.sample import sample_shards

    names: set[Voter] = set()

    def watched() -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
        for shard in evidence:
            names.update(voters_of([shard.judgements], None))
            yield shard.judgements, shard.alignment

    return Said(*sample_shards(watched(), TRUST_IMAGES)), tuple(sorted(names))


def _label_shards(
    context: Context, images: pd.DataFrame, learned: LearnedLabels, evidence: EvidenceShards, written: _Written
) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """(labels, wide sheet) of each shard; what is to be remembered goes into `written`."""
    from annotation.trust.disagreements import disagreements
    from annotation.trust.refuse import silenced

    refused, vocabulary = refused_of(context.run), learned.fusion.vocabulary
    start = 0
    for shard in evidence:
        heard, scores = silenced(shard.judgements, shard.alignment, refused)
        labels = learned.fusion.labels(heard, scores)
        written.add(labels, disagreements(labels, heard, scores, vocabulary))
        rows = images.iloc[start : start + len(shard.image_ids)]
        start += len(rows)
        yield labels, wide_labels(rows, labels, vocabulary)


def _described(found: pd.DataFrame, images: pd.DataFrame, vocabulary: Vocabulary) -> pd.DataFrame:
    """The disagreements with the image's path and the concept's name."""
    paths = images.drop_duplicates("image_id").set_index("image_id")["path"]
    names = dict(zip(vocabulary.ids, vocabulary.names, strict=True))
    result = found.copy()
    result.insert(1, "path", paths.reindex(found["image_id"]).to_numpy())
    result.insert(3, "concept", found["concept_id"].map(names).to_numpy())
    return result


def _cut_short(n_found: int, n_listed: int) -> list[str]:
    if n_found <= n_listed:
        return []
    return [f"witnesses disagree on {n_found} cells; {DISAGREEMENTS_CSV} lists the {n_listed} most informative of them"]


def _sampled_sentence(n_images: int) -> list[str]:
    if n_images <= TRUST_IMAGES:
        return []
    return [
        f"{AGREEMENT_CSV}, {LEAKS_CSV}, thresholds and calibration are from {TRUST_IMAGES} of {n_images} images, those "
        "that people answered on first; labels are of all"
    ]


FUSE = Step("fuse", "Fusing witnesses into labels", _inputs, _work)
