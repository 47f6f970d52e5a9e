"""The run manifest: what was asked, with which versions and seeds, and a receipt for every finished step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from data_contracts.errors import ContractViolation

MANIFEST_CONTRACT = "run/1"

_RECORDED_PACKAGES = (
    "medmicn",
    "torch",
    "timm",
    "open_clip_torch",
    "transformers",
    "openai",
    "prefect",
    "pandas",
    "pyarrow",
    "pillow",
    "pydicom",
    "scikit-image",
    "scikit-learn",
)


class FileReceipt(BaseModel):
    """Size and hash of one file a step wrote."""

    size_bytes: int
    sha256: str


class StepRecord(BaseModel):
    """Receipt of one finished step: what it read, what it wrote, what it took."""

    inputs_sha256: str
    """Hash over everything the step's result depends on."""
    outputs: dict[str, FileReceipt] = Field(default_factory=dict)
    """Files written, relative to the run folder."""
    finished_at: datetime
    seconds: float
    cost_usd: float | None = None
    """Money spent at the endpoint; None where nothing is sent or the price is unknown."""
    counts: dict[str, float] = Field(default_factory=dict)
    """What was done and what was reused, as numbers."""


class RunManifest(BaseModel):
    """Content of `run.json`."""

    contract: Literal["run/1"] = MANIFEST_CONTRACT
    name: str
    source: str
    """Folder the images were read from."""
    created_at: datetime
    synthetic: bool = False
    """True when the images were generated, not taken."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Configuration as resolved; never holds a secret."""
    versions: dict[str, str] = Field(default_factory=dict)
    steps: dict[str, StepRecord] = Field(default_factory=dict)
    warnings: dict[str, list[str]] = Field(default_factory=dict)
    """Warnings by step; a step that runs again replaces its own."""
    endpoints: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What a probe found that each vision-language endpoint can do, by `MODEL at BASE_URL`."""

    @classmethod
    def new(cls, name: str, source: str) -> RunManifest:
        """The manifest of a run that has done nothing yet."""
        return cls(name=name, source=source, created_at=datetime.now(UTC), versions=installed_versions())

    @classmethod
    def from_json(cls, text: str, where: str) -> RunManifest:
        """Read a manifest; raises `ContractViolation` for another version or a malformed file."""
        remedy = "The run folder is from another version: start a new one with --run, or use the program that made it."
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ContractViolation(where, [f"expected JSON, got: {error}"], remedy=remedy) from error
        found = content.get("contract", "none") if isinstance(content, dict) else "none"
        if found != MANIFEST_CONTRACT:
            raise ContractViolation(where, [f"contract: expected {MANIFEST_CONTRACT}, found {found}"], remedy=remedy)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise ContractViolation(where, faults, remedy=remedy) from error


def installed_versions() -> dict[str, str]:
    """Versions of the packages that can change a result."""
    found = {}
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def content_hash(parts: Mapping[str, Any]) -> str:
    """Hex sha256 of a JSON-able mapping, independent of key order."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()
