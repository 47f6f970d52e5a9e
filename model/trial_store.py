"""Finished trials on disk, each under the hash of all that decided it: a killed comparison goes on with the next.

A file holds arrays only, no code; one that cannot be read, or is not what its name says, counts as absent.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
from pathlib import Path

import numpy as np

from data_contracts.files import write_bytes
from data_contracts.tables import Split
from model.backbones import Backbone
from model.config import TrainConfig
from model.devices import resolve_device
from model.outputs import Outputs
from model.prepare import Prepared
from model.protocols import Protocol, Trial
from model.resume import training_key

logger = logging.getLogger(__name__)

FORMAT = "medmicn-trial/1"
_STORED = ("class_probabilities", "concept_probabilities", "rule_truth")
"""What metrics read; polarity and relevance of every image would be a hundred times as large."""


class TrialStore:
    """One file a trial."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(
        self, prepared: Prepared, backbone: Backbone, config: TrainConfig, protocol: Protocol, split: Split | str
    ) -> str:
        """sha256 of what decides the trial: data, backbone, settings with the one seed, protocol and split."""
        device = resolve_device(config.device)
        training = training_key(config, prepared.dataset, backbone, prepared.augmentation, device)
        described = [FORMAT, training, list(config.seeds), protocol, str(split)]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def read(self, key: str) -> Trial | None:
        """The trial of that key; None where there is none that is whole."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
                arrays = dict(stored)
                described = json.loads(bytes(arrays["described"]))
                if described["key"] != key:
                    raise ValueError("it belongs to another training")
                n = len(arrays["class_probabilities"])
                without = np.zeros((n, 0, 0), np.float32)
                outputs = Outputs(
                    arrays["class_probabilities"],
                    arrays["concept_probabilities"],
                    without,
                    without,
                    arrays["rule_truth"],
                )
                return Trial(outputs, described["facts"], arrays["candidates"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            logger.warning("%s: a stored result could not be used (%s); it is computed again.", path.name, error)
            return None

    def write(self, key: str, trial: Trial) -> None:
        """Keep the trial; raises `StorageError`."""
        described = json.dumps({"key": key, "facts": trial.facts}).encode()
        content = io.BytesIO()
        np.savez_compressed(
            content,
            described=np.frombuffer(described, np.uint8),
            candidates=trial.candidates,
            **{name: getattr(trial.outputs, name) for name in _STORED},
        )
        write_bytes(self._path(key), content.getvalue())

    def _path(self, key: str) -> Path:
        return self.folder / f"{key[:32]}.npz"
