"""Every error a person can meet, drawn once.

MedMicnError
├── ConfigurationError        exit 2   a flag, a key of the TOML file or the environment is wrong
│   └── OtherMachineRefused            offline, and another machine was asked for (`flows.offline`; an OSError too)
├── InputRefused              exit 3   what was given cannot be used
│   ├── SourceRefused                  the SOURCE as a whole (empty folder, one class, contradictory CSV)
│   ├── ImageRejected                  one image; carries a `RejectReason`, never stops a run
│   ├── ContractViolation              a table breaks its contract (collects every fault in one pass)
│   │   └── VocabularyMismatch         written for other concepts, or for the same ones in another order
│   └── CheckpointRefused              a model folder is incomplete, tampered with or of another vocabulary
├── StoppedResumable          exit 4   clean stop; the same command goes on from here
│   ├── BudgetReached                  a cap of requests or money
│   └── Deferred                       the endpoint asked to come back later
└── StepFailed                exit 5   work was tried and did not succeed
    ├── EndpointError                  the vision-language endpoint (down, wrong key, wrong model, …)
    └── StorageError                   the disk (full, read-only, …)

Messages follow one mould: name, rule, what came, where, consequence, remedy. They carry ids and codes,
never pixels, patient names or secrets.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum


class ExitCode:
    """Process exit codes of the command line."""

    DONE = 0
    CONFIGURATION = 2
    INPUT_REFUSED = 3
    RESUMABLE = 4
    FAILED = 5
    INTERRUPTED = 130


class RejectReason(StrEnum):
    """Why one image was left out. Stored in `images.rejected`."""

    EMPTY_FILE = "empty_file"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TRUNCATED = "truncated"
    UNREADABLE = "unreadable"
    ZERO_SIZE = "zero_size"
    TOO_MANY_PIXELS = "too_many_pixels"
    ANIMATED = "animated"
    DICOM_WITHOUT_PIXELS = "dicom_without_pixels"
    DICOM_NEEDS_PLUGIN = "dicom_needs_plugin"
    EXACT_DUPLICATE = "exact_duplicate"
    CONFLICTING_LABELS = "conflicting_labels"
    MISSING_FILE = "missing_file"
    OUTSIDE_SOURCE = "outside_source"
    NEAR_DUPLICATE_ACROSS_SPLITS = "near_duplicate_across_splits"
    EXCLUDED_BY_SOURCE = "excluded_by_source"


class DropReason(StrEnum):
    """Why one proposed concept was not kept. Stored in `concepts.reason`."""

    TOO_LONG = "too_long"
    LIKE_A_CLASS = "like_a_class"
    LIKE_ANOTHER = "like_another"
    NOT_SEEN_IN_ANY_IMAGE = "not_seen_in_any_image"
    NOT_VISUAL = "not_visual"
    CONSTANT = "constant"
    FAILS_NULL_TEST = "fails_null_test"
    LEAKS_CLASS = "leaks_class"
    BY_USER = "by_user"


class MedMicnError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code: int = ExitCode.FAILED

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}" if self.remedy else self.message


class ConfigurationError(MedMicnError):
    """A flag, a configuration key or an environment variable is wrong."""

    exit_code = ExitCode.CONFIGURATION


class InputRefused(MedMicnError):
    """What was given cannot be used."""

    exit_code = ExitCode.INPUT_REFUSED


class SourceRefused(InputRefused):
    """The SOURCE as a whole cannot be used."""


class ImageRejected(InputRefused):
    """One image cannot be used; the run goes on without it."""

    def __init__(self, reason: RejectReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ContractViolation(InputRefused):
    """A table breaks its contract; `faults` lists everything found in one pass."""

    def __init__(self, where: str, faults: Sequence[str], *, remedy: str | None = None) -> None:
        shown = "; ".join(faults[:10]) + (f"; and {len(faults) - 10} more" if len(faults) > 10 else "")
        super().__init__(f"{where}: {shown}", remedy=remedy)
        self.where = where
        self.faults = tuple(faults)


class VocabularyMismatch(ContractViolation):
    """A file was written for other concepts, or for the same ones in another order."""


class CheckpointRefused(InputRefused):
    """A model folder is incomplete, tampered with, or belongs to another vocabulary."""


class StoppedResumable(MedMicnError):
    """A clean stop: nothing is lost and the same command continues from here."""

    exit_code = ExitCode.RESUMABLE


class BudgetReached(StoppedResumable):
    """A cap on requests or money was reached."""


class Deferred(StoppedResumable):
    """The endpoint asked to come back later than a run should wait."""

    def __init__(self, message: str, *, retry_after_s: float, remedy: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after_s = retry_after_s


class StepFailed(MedMicnError):
    """Work was tried and did not succeed."""


class EndpointError(StepFailed):
    """The vision-language endpoint could not be used at all."""


class StorageError(StepFailed):
    """The disk could not take what was to be written."""
