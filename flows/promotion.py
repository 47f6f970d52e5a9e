"""Which model is in use: a new one takes over only if it is not worse, and the old one stays.

model/                  the model in use: what `train` wrote, and two files about it
  version.json          its number, when and what it was trained on, how it came into use
  trained_on.parquet    image_id, label, split of every image it was trained, validated or tested with
models/candidate/       a model that is being trained, not compared yet
models/NNN/             earlier models, and new ones that were refused; the same files
models/switch.json      only while the model in use changes: what a kill would leave half done is done from it

A folder becomes the model in use by one rename, by an exchange of two names where the system has it. Its number travels
inside, so that a folder that stands under a wrong name after a kill is put right by whoever looks next.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.errors import CheckpointRefused, ConfigurationError
from data_contracts.files import sha256_of_file, storage_error, write_text, write_with
from data_contracts.manifest import content_hash
from data_contracts.store import RunFolder
from data_contracts.tables import Witness
from flows.chain import Context, is_fresh
from flows.steps import TRAIN

VERSION_FILE, TRAINED_ON_FILE, SWITCH_FILE = "version.json", "trained_on.parquet", "switch.json"
_CONFIG_FILE = "config.json"
_TRAINED_ON_COLUMNS = ["image_id", "label", "split", "group_id"]

_PLACE = re.compile(r"^(model|models/[^/]+)/")
"""Where a model can stand, as the receipt of training names it."""
_EXCHANGE = 2
"""RENAME_EXCHANGE of Linux's renameat2."""
_HERE = -100
"""AT_FDCWD."""


@dataclass(frozen=True)
class Version:
    """What is known about one model."""

    number: int
    made_at: str
    checkpoint_sha256: str
    """Of its `config.json`, which names the hash of every other file."""
    settings_sha256: str
    """Of the settings it was trained with."""
    n_train: int
    n_test: int
    macro_f1: float | None
    """On its own test images, mean over seeds."""
    n_expert_answers: int
    """Answers of experts in the ledger when it was trained."""
    verdict: str = "the first model of this run"
    """What came of the comparison with the model then in use."""
    promoted: bool = True
    """False for a model that was never in use."""


# ---- what there is -------------------------------------------------------------------------------------------


def current(run: RunFolder) -> Version | None:
    """The model in use; None where there is none, or where one was trained since that nobody recorded."""
    return _version(run.model_dir)


def kept(run: RunFolder) -> list[tuple[Path, Version]]:
    """Folders and versions of the models that are not in use, oldest first."""
    found = [(folder, _version(folder)) for folder in _numbered(run)]
    return sorted(((f, v) for f, v in found if v is not None), key=lambda pair: pair[1].number)


def newest(run: RunFolder) -> tuple[Path, Version] | None:
    """Folder and version of the model that was trained last, whether or not it ever came into use."""
    in_use = current(run)
    found = [*kept(run), *([(run.model_dir, in_use)] if in_use else [])]
    return max(found, key=lambda pair: pair[1].number, default=None)


def trained_on(run: RunFolder, folder: Path | None = None) -> pd.DataFrame:
    """image_id, label, split, group_id of the images behind the model in use, or behind that of `folder`.

    Of a model that was trained without a record, it is the data set as it stands.
    """
    path = (folder or run.model_dir) / TRAINED_ON_FILE
    if path.is_file() and _version(folder or run.model_dir) is not None:
        return pq.read_table(path).to_pandas()
    return _trained_on_now(run)


def model_table(run: RunFolder) -> list[dict[str, Any]]:
    """One row a model, newest first: number, whether it is in use, when it was made, on what, macro-F1, verdict."""
    in_use = current(run)
    versions = [version for _, version in kept(run)] + ([in_use] if in_use else [])
    return [
        {
            "model": version.number,
            "in_use": version == in_use,
            "made_at": version.made_at[:19],
            "n_train": version.n_train,
            "macro_f1": None if version.macro_f1 is None else round(version.macro_f1, 4),
            "verdict": version.verdict,
        }
        for version in sorted(versions, key=lambda version: -version.number)
    ]


def settings_sha256(context: Context) -> str:
    """Hash of the settings that decide what a model learns."""
    return content_hash({"settings": TRAIN.inputs(context)["settings"]})


def n_expert_answers(run: RunFolder) -> int:
    """Answers of experts in the ledger. It only grows, so that a clock that jumps changes nothing."""
    return sum(
        int((part.column("witness").to_pandas() == Witness.EXPERT).sum())
        for part in run.iterate_judgements(["witness"])
    )


def record(context: Context, folder: Path, *, verdict: str, promoted: bool, number: int | None = None) -> Version:
    """Write the two files about the model in `folder`, which was trained on the data set as it stands."""
    run = context.run
    table = _trained_on_now(run)
    write_with(
        folder / TRAINED_ON_FILE,
        lambda file: pq.write_table(pa.Table.from_pandas(table, preserve_index=False), file),
    )
    splits = table["split"].value_counts()
    version = Version(
        number=next_number(run) if number is None else number,
        made_at=datetime.now(UTC).isoformat(),
        checkpoint_sha256=sha256_of_file(folder / _CONFIG_FILE),
        settings_sha256=settings_sha256(context),
        n_train=int(splits.get("train", 0)),
        n_test=int(splits.get("test", 0)),
        macro_f1=_macro_f1(folder),
        n_expert_answers=n_expert_answers(run),
        verdict=verdict,
        promoted=promoted,
    )
    _write_version(folder, version)
    return version


def register(context: Context) -> None:
    """Record the model in use, if one was trained without: call it while the data set is still the one it read."""
    run = context.run
    if (run.model_dir / _CONFIG_FILE).is_file() and current(run) is None:
        verdict = "trained" if is_fresh(TRAIN, context) else "trained; on which images exactly was not recorded"
        record(context, run.model_dir, verdict=verdict, promoted=True)


def _trained_on_now(run: RunFolder) -> pd.DataFrame:
    path = run.path / "dataset.parquet"
    if not path.is_file():
        return pd.DataFrame({name: pd.Series(dtype="str") for name in _TRAINED_ON_COLUMNS})
    return pq.read_table(path, columns=_TRAINED_ON_COLUMNS).to_pandas()


def _version(folder: Path) -> Version | None:
    path, config = folder / VERSION_FILE, folder / _CONFIG_FILE
    if not path.is_file() or not config.is_file():
        return None
    try:
        found = Version(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointRefused(f"{path}: expected a model's version, got: {error}.", remedy="Remove it.") from error
    # `medmicn train` replaces the model without a word to this file, which then speaks of another one.
    return found if found.checkpoint_sha256 == sha256_of_file(config) else None


def _write_version(folder: Path, version: Version) -> None:
    write_text(folder / VERSION_FILE, json.dumps(asdict(version), indent=2, ensure_ascii=False) + "\n")


def _macro_f1(folder: Path) -> float | None:
    path = folder / "metrics.json"
    metrics: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    mean = metrics.get("test", {}).get("over_seeds", {}).get("macro_f1", {}).get("mean")
    return None if mean is None else float(mean)


def _numbered(run: RunFolder) -> list[Path]:
    return sorted(path for path in run.models_dir.glob("*") if path.is_dir() and path.name.isdigit())


def next_number(run: RunFolder) -> int:
    """The number of the next model."""
    in_use = current(run)
    taken = [int(path.name) for path in _numbered(run)] + [version.number for _, version in kept(run)]
    return max([*taken, in_use.number if in_use else 0], default=0) + 1


# ---- changing the model in use -------------------------------------------------------------------------------


def settle(context: Context, folder: Path, *, verdict: str, promoted: bool) -> int:
    """Record the new model in `folder`, and let it take over or keep it beside the one in use; returns its number."""
    run, number = context.run, next_number(context.run)
    if promoted:
        intend(run, folder, number)
    record(context, folder, verdict=verdict, promoted=promoted, number=number)
    recover(run)
    prune(run, context.settings.schedule.keep_models)
    return number


def switch_to(run: RunFolder, folder: Path) -> None:
    """Make the model in `folder` the one in use; the one that was goes to `models/NNN`. Whole at every instant."""
    version = _version(folder)
    if version is None:
        raise CheckpointRefused(f"{folder}: expected a recorded model, found none; the model in use stays.")
    intend(run, folder, version.number)
    recover(run)


def intend(run: RunFolder, folder: Path, number: int) -> None:
    """Say that the model of this number, in `folder`, is to come into use; `recover` does it, however often killed."""
    write_text(run.models_dir / SWITCH_FILE, json.dumps({"from": folder.name, "number": number}) + "\n")


def recover(run: RunFolder) -> None:
    """Finish what a kill left half done: the change of the model in use, names of folders, the receipt of training."""
    path = run.models_dir / SWITCH_FILE
    if path.is_file():
        intent = json.loads(path.read_text(encoding="utf-8"))
        now, folder = current(run), run.models_dir / intent["from"]
        new = _version(folder)
        # A folder of another number is the old model, already exchanged; one without was never compared.
        if new is not None and new.number == intent["number"] and (now is None or now.number != new.number):
            _bring_in(run, folder)
    _name_by_number(run)
    path.unlink(missing_ok=True)
    _relocate_receipt(run)


def _bring_in(run: RunFolder, folder: Path) -> None:
    try:
        if not run.model_dir.exists():
            folder.rename(run.model_dir)
        elif not _exchanged(run.model_dir, folder):
            aside = run.models_dir / "leaving"
            run.model_dir.rename(aside)
            folder.rename(run.model_dir)
            aside.rename(folder)
    except OSError as error:
        raise storage_error(run.model_dir, error) from error


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one instant; False where the system cannot (then: two renames, and `recover`)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}:
        return False
    raise OSError(code, os.strerror(code))


def _name_by_number(run: RunFolder) -> None:
    """Give each folder of an earlier model the name of its number; a candidate keeps its name until it is compared."""
    in_use = current(run)
    for folder in [*_numbered(run), run.models_dir / "leaving", run.models_dir / "candidate"]:
        version = _version(folder) if folder.is_dir() else None
        if version is None or (in_use is not None and version.number == in_use.number):
            continue
        wanted = run.models_dir / f"{version.number:03d}"
        if wanted != folder and not wanted.exists():
            folder.rename(wanted)


def _relocate_receipt(run: RunFolder) -> None:
    """Let the receipt of training name the folder where that model stands now, so that it is not trained again."""
    if not run.exists:
        return
    manifest = run.read_manifest()
    receipt = manifest.steps.get(TRAIN.name)
    if receipt is None or run.holds(receipt.outputs):
        return
    for folder in [run.model_dir, *_numbered(run), run.models_dir / "candidate"]:
        place = folder.relative_to(run.path).as_posix()
        moved = {_PLACE.sub(f"{place}/", name): file for name, file in receipt.outputs.items()}
        if run.holds(moved):
            receipt.outputs = moved
            run.write_manifest(manifest)
            return


def prune(run: RunFolder, n_kept: int) -> list[int]:
    """Remove all but the newest `n_kept` models that are not in use, refused ones first; returns their numbers."""
    receipt = run.read_manifest().steps.get(TRAIN.name)
    needed = {place.group(1) for name in (receipt.outputs if receipt else {}) if (place := _PLACE.match(name))}
    removable = [(f, v) for f, v in kept(run) if f.relative_to(run.path).as_posix() not in needed]
    n_excess = len(kept(run)) - n_kept
    order = sorted(removable, key=lambda pair: (pair[1].promoted, pair[1].number))
    removed = order[: max(n_excess, 0)]
    for folder, _ in removed:
        shutil.rmtree(folder)
    return [version.number for _, version in removed]


def find(run: RunFolder, number: int | None) -> tuple[Path, Version]:
    """The kept model of this number; with None the newest that was in use before. Raises `ConfigurationError`."""
    models = kept(run)
    wanted = [pair for pair in models if pair[1].number == number]
    if number is None:
        in_use = current(run)
        wanted = [p for p in models if p[1].promoted and (in_use is None or p[1].number < in_use.number)]
    if not wanted:
        there = ", ".join(f"{version.number}" for _, version in models) or "none"
        raise ConfigurationError(
            f"{run.models_dir}: expected {'an earlier model' if number is None else f'model {number}'}, kept are: "
            f"{there}; the model in use stays.",
            remedy="`medmicn models` lists them.",
        )
    return wanted[-1]
