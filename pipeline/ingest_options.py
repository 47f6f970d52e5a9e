"""What ingest may decide."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.decode import MAX_PIXELS
from pipeline.duplicates import NearDuplicateOptions
from pipeline.split import SplitFractions


@dataclass(frozen=True)
class IngestOptions:
    """Settings of `ingest.ingest`."""

    modality: str = "medical image"
    """Free text, such as "blood smear microscopy"; goes into the table and from there into prompts."""
    max_pixels: int = MAX_PIXELS
    """Images with more (width × height) are rejected unread."""
    near_duplicates: NearDuplicateOptions = field(default_factory=NearDuplicateOptions)
    """How alike two images must be to count as one picture."""
    fractions: SplitFractions = field(default_factory=SplitFractions)
    """Shares of train, val and test where SOURCE gives no split."""
    seed: int = 0
    """Draws the split."""
    allow_patient_overlap: bool = False
    """True lets a given split stand although patients straddle it; they are then named in a warning."""
    n_threads: int | None = None
    """Files decoded at a time; None: one a core, at most 8."""
    exclude: tuple[Path, ...] = ()
    """Folders inside SOURCE that are not part of it, such as the run folder."""
    held: frozenset[str] = frozenset()
    """Files (as `paths.table_path` writes them) that are still being written: not looked at this time."""
