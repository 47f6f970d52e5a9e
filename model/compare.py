"""Systems side by side: one data set, one preparation, the same splits and seeds, one trainer, protocols by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_contracts.dataset import AlignedDataset
from data_contracts.errors import ConfigurationError, InputRefused
from data_contracts.ports import Advance, PixelReader, ignore_progress
from data_contracts.tables import Split
from model.backbones import Backbone
from model.config import TrainConfig
from model.fit import Watch, prepare_for
from model.loop import OnEpoch
from model.prepare import Prepared
from model.protocols import Protocol, Trial, clean_trial, paper_trial, require_separate_patients
from model.resume import forget
from model.systems.registry import SYSTEMS, System, system
from model.tabulate import Comparison, tabulate
from model.trial_store import TrialStore


class CompareWatch(NamedTuple):
    """Who hears of the progress of the trainings."""

    on_trial: Callable[[str, int, bool], None] = lambda _system, _seed, _reused: None
    """Hears of each network that is there: system with protocol, seed, and whether it was there before."""
    on_epoch: OnEpoch | None = None
    """Hears of every epoch."""


NOBODY_WATCHES = CompareWatch()


class Row(NamedTuple):
    """One row of the comparison, ready to be trained."""

    system: System
    config: TrainConfig
    prepared: Prepared
    backbone: Backbone


@dataclass(frozen=True)
class Design:
    """What is compared."""

    systems: Sequence[System | str] = tuple(SYSTEMS)
    protocols: Sequence[Protocol] = ("clean",)
    reference: str | None = None
    """Name of the row that the others are tested against; none: the first."""
    split: Split | str = Split.TEST
    """Images that are measured; the paper's protocol knows the test images alone."""

    def rows(self) -> list[System]:
        """The systems; raises `ConfigurationError` for an unknown name."""
        return [one if isinstance(one, System) else system(one) for one in self.systems]


EVERYTHING = Design()


def compare(
    dataset: AlignedDataset,
    read: PixelReader,
    config: TrainConfig,
    design: Design = EVERYTHING,
    *,
    cache_dir: Path,
    watch: CompareWatch = NOBODY_WATCHES,
) -> Comparison:
    """Every system under every protocol, each paired with the reference.

    Paired: the i-th seed of every system draws the same shuffles of the same images. Trained networks' answers are kept
    in the cache, so that a comparison that was killed, or that gets more systems, trains only what is missing. What
    cannot be trained is refused before anything is: `InputRefused` for systems with concepts on an empty vocabulary, or
    a `clean` protocol with a patient on two sides; `ConfigurationError` for an unknown name.
    """
    rows = rows_of(dataset, read, config, design, cache_dir=cache_dir)
    return compare_prepared(rows, config.seeds, design, cache_dir=cache_dir, watch=watch)


def rows_of(
    dataset: AlignedDataset,
    read: PixelReader,
    config: TrainConfig,
    design: Design,
    *,
    cache_dir: Path,
    modality: str = "",
    advance: Advance = ignore_progress,
) -> list[Row]:
    """The first half of `compare`: every system checked, with its inputs; `advance` counts images."""
    systems = design.rows()
    require_design(design, [one.name for one in systems], dataset)
    return prepared_rows(systems, dataset, read, config, cache_dir, modality, advance)


def compare_prepared(
    rows: Sequence[Row],
    seeds: Sequence[int],
    design: Design,
    *,
    cache_dir: Path,
    watch: CompareWatch = NOBODY_WATCHES,
) -> Comparison:
    """The second half of `compare`: every row trained and measured; all must be of the same images."""
    first = rows[0].prepared.dataset
    if any(row.prepared.dataset.image_ids != first.image_ids for row in rows):
        raise InputRefused(
            "comparison: expected the same usable images for all systems, some see fewer; nothing was trained."
        )
    store = TrialStore(cache_dir / "comparison")
    trials = {
        (row.system.name, protocol): [_trial(row, seed, protocol, design.split, store, watch) for seed in seeds]
        for protocol in design.protocols
        for row in rows
    }
    datasets = {row.system.name: row.prepared.dataset.take(first.rows(design.split)) for row in rows}
    return tabulate(datasets, trials, seeds, design.reference or rows[0].system.name)


def require_design(design: Design, names: list[str], dataset: AlignedDataset) -> None:
    """Raise `ConfigurationError` or `InputRefused` where these rows cannot be compared on the data set."""
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(f"systems: expected one or more different names, got {', '.join(names) or 'none'}.")
    if design.reference is not None and design.reference not in names:
        raise ConfigurationError(f"reference: expected one of {', '.join(names)}, got {design.reference!r}.")
    if "paper" in design.protocols and str(design.split) != str(Split.TEST):
        raise ConfigurationError(f"protocol 'paper': expected the test split, on which it chooses, got {design.split}.")
    if "clean" in design.protocols:
        require_separate_patients(dataset)


def prepared_rows(
    systems: Sequence[System],
    dataset: AlignedDataset,
    read: PixelReader,
    config: TrainConfig,
    cache_dir: Path,
    modality: str = "",
    advance: Advance = ignore_progress,
) -> list[Row]:
    """Each system with its inputs; systems that read the same inputs share them."""
    configs = [one.config(config) for one in systems]
    by_inputs: dict[tuple[object, ...], tuple[Prepared, Backbone]] = {}
    for its in configs:
        key = _inputs_key(its)
        if key not in by_inputs:
            alike = [other for other in configs if _inputs_key(other) == key]
            by_inputs[key] = prepare_for(alike, dataset, read, cache_dir=cache_dir, modality=modality, advance=advance)
    return [Row(one, its, *by_inputs[_inputs_key(its)]) for one, its in zip(systems, configs, strict=True)]


def _inputs_key(config: TrainConfig) -> tuple[object, ...]:
    c = config
    return (c.backbone, c.pretrained, c.freeze_backbone, c.image_size_px, c.augmentation, c.augmented_views)


def _trial(
    row: Row, seed: int, protocol: Protocol, split: Split | str, store: TrialStore, watch: CompareWatch
) -> Trial:
    config = row.config.model_copy(update={"seeds": (seed,)})
    key = store.key(row.prepared, row.backbone, config, protocol, split)
    trial = store.read(key)
    reused = trial is not None
    if trial is None:
        trial = _trained(row, config, protocol, split, store.folder / "unfinished", Watch(on_epoch=watch.on_epoch))
        store.write(key, trial)
    watch.on_trial(f"{row.system.name} ({protocol})", seed, reused)
    return trial


def _trained(
    row: Row, config: TrainConfig, protocol: Protocol, split: Split | str, state_dir: Path, watch: Watch
) -> Trial:
    if protocol == "paper":
        return paper_trial(row.prepared, row.backbone, config, watch=watch)
    # On cached features a seed is a matter of seconds; a fine-tuned backbone goes on from its last step after a kill.
    states = None if config.freeze_backbone else state_dir
    trial = clean_trial(row.prepared, row.backbone, config, split=split, state_dir=states, watch=watch)
    if states is not None:
        forget(states)
    return trial
