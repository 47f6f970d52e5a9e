"""Exact and near duplicates: the same picture twice is one picture.

Exact: the same bytes. Near: the same picture saved again, resized, or cropped by a few percent. Candidates
are pairs whose perceptual hashes differ in few bits; a pair is confirmed if the 32 × 32 grey thumbnails,
after the best small shift and stretch, correlate almost perfectly. The registration is what tells a cropped
copy from the next slice of the same scan: unregistered, both correlate at 0.98.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import imagehash
import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image
from scipy.ndimage import map_coordinates

from data_contracts.errors import RejectReason
from data_contracts.ports import Pixels
from data_contracts.tables import Split

SIDE_PX = 32
"""Side of the grey thumbnail that is an image's fingerprint."""

KEPT_FIRST = (Split.TEST.value, Split.VAL.value, Split.TRAIN.value)
"""Of copies in several splits, the one in the first of these is kept: a test set is never thinned for training."""

_FLAT_STD = 1.0
_BLOCK_ROWS = 2048
_MAX_STRETCH = 0.08

_Grey = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NearDuplicateOptions:
    """How alike two images must be to count as one picture."""

    enabled: bool = True
    """False marks exact duplicates only."""
    max_hash_bits: int = 10
    """Candidates: perceptual hashes (64 bits) that differ in at most this many."""
    min_raw_correlation: float = 0.60
    """Candidates: thumbnails that correlate at least this well as they are; spares registering the rest."""
    min_correlation: float = 0.987
    """Near duplicates: registered thumbnails that correlate at least this well."""


def fingerprint(pixels: Pixels) -> bytes:
    """The image's 32 × 32 grey thumbnail as 1,024 bytes; empty for an image of one tone, which is like any other."""
    grey = Image.fromarray(pixels).convert("L").resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
    thumbnail = np.asarray(grey)
    return thumbnail.tobytes() if float(thumbnail.std()) >= _FLAT_STD else b""


def near_duplicate_clusters(
    fingerprints: Sequence[bytes], options: NearDuplicateOptions | None = None
) -> npt.NDArray[np.int64]:
    """(n,) for each image the index of the first image of its cluster: its own, if it has no near duplicate.

    All pairs of 64-bit hashes are compared, in blocks: about 1e9 pairs in ten seconds, memory linear in n.
    """
    options = options or NearDuplicateOptions()
    clusters = Clusters(len(fingerprints))
    if options.enabled:
        thumbnails = {i: _thumbnail(f) for i, f in enumerate(fingerprints) if len(f) == SIDE_PX**2}
        rows = np.fromiter(thumbnails, np.int64, len(thumbnails))
        hashes = np.array([_hash(thumbnails[int(i)]) for i in rows], np.uint64)
        for a, b in _candidates(hashes, options.max_hash_bits):
            i, j = int(rows[a]), int(rows[b])
            if clusters.root(i) != clusters.root(j) and _same_picture(thumbnails[i], thumbnails[j], options):
                clusters.join(i, j)
    return np.array([clusters.root(i) for i in range(len(fingerprints))], np.int64)


def registered_correlation(a: _Grey, b: _Grey, *, n_steps: int = 8) -> float:
    """Correlation of two thumbnails after the shift and stretch (both axes, a few percent) that fits `b` to `a`.

    Gauss-Newton on the standardised grey values (Lucas and Kanade 1981), so brightness and contrast do not count.
    """
    side = a.shape[0]
    grid = np.linspace(-1.0, 1.0, side)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    inner = (slice(2, -2), slice(2, -2))  # a shifted border has no counterpart
    target = _standardised(a[inner])
    moves = np.zeros(4)  # shift y, shift x, stretch y, stretch x, in half image sides
    best = -1.0
    for _ in range(n_steps):
        where = [
            (y * (1 + moves[2]) + moves[0] + 1) * (side - 1) / 2,
            (x * (1 + moves[3]) + moves[1] + 1) * (side - 1) / 2,
        ]
        moved = map_coordinates(b, where, order=1, mode="nearest")
        spread = float(moved[inner].std()) or 1.0
        values = _standardised(moved[inner])
        best = max(best, float((target * values).mean()))
        down, right = (g[inner] / spread / (grid[1] - grid[0]) for g in np.gradient(moved))
        columns = np.stack([down, right, down * y[inner], right * x[inner]], -1).reshape(-1, 4)
        step = np.linalg.lstsq(columns, (target - values).ravel(), rcond=None)[0]
        moves = np.clip(moves + step, -_MAX_STRETCH, _MAX_STRETCH)
    return best


def mark_exact(images: pd.DataFrame) -> pd.DataFrame:
    """The images with all but one copy of the same bytes rejected; copies with different labels all are.

    The copy that stays has a label if any has, is in the split that `KEPT_FIRST` names first, and comes
    first by path.
    """
    marked = images.copy()
    accepted = marked[marked["rejected"].isna()]
    repeated = accepted[accepted["image_id"].duplicated(keep=False)]
    for _, same in repeated.groupby("image_id", sort=False):
        labels = sorted(same["label"].dropna().unique())
        if len(labels) > 1:
            shown = ", ".join(repr(label) for label in labels)
            detail = f"the same bytes carry the labels {shown}"
            _reject(marked, same.index, RejectReason.CONFLICTING_LABELS, detail)
            continue
        kept = min(same.index, key=lambda row: _preference(marked, row))
        others = [row for row in same.index if row != kept]
        _reject(marked, others, RejectReason.EXACT_DUPLICATE, f"same bytes as {marked.at[kept, 'path']!r}")
    return marked


def mark_near(images: pd.DataFrame, options: NearDuplicateOptions | None = None) -> pd.DataFrame:
    """The images with `near_duplicate_of` filled: the `image_id` of the cluster's first image, itself unmarked.

    First is the copy that `mark_exact` would keep.
    """
    marked = images.copy()
    accepted = marked.index[marked["rejected"].isna()]
    rows = pd.Index(sorted(accepted, key=lambda row: _preference(marked, row)))
    prints = [f if isinstance(f, bytes) else b"" for f in marked.loc[rows, "fingerprint"]]
    first = near_duplicate_clusters(prints, options)
    ids = marked.loc[rows, "image_id"].to_numpy(object)
    of = {row: ids[f] for i, (row, f) in enumerate(zip(rows, first, strict=True)) if f != i}
    marked["near_duplicate_of"] = pd.Series(of, dtype="str").reindex(marked.index)
    return marked


def cluster_ids(images: pd.DataFrame) -> pd.Series:
    """For each row the `image_id` that names its near-duplicate cluster: its own where it has none."""
    return images["near_duplicate_of"].fillna(images["image_id"])


def reject_across_splits(images: pd.DataFrame) -> pd.DataFrame:
    """The images with those rejected whose near duplicate is in another split that comes first in `KEPT_FIRST`."""
    marked = images.copy()
    accepted = marked[marked["rejected"].isna() & marked["split"].notna()]
    clusters = cluster_ids(accepted)
    n_splits = accepted["split"].groupby(clusters).nunique()
    straddling = accepted[clusters.isin(n_splits.index[n_splits > 1])]
    for _, same in straddling.groupby(clusters, sort=False):
        kept_split = next(s for s in KEPT_FIRST if (same["split"] == s).any())
        kept = same.index[same["split"] == kept_split][0]
        detail = f"near duplicate of {marked.at[kept, 'path']!r}, which is in {kept_split}"
        _reject(marked, same.index[same["split"] != kept_split], RejectReason.NEAR_DUPLICATE_ACROSS_SPLITS, detail)
    return marked


class Clusters:
    """Disjoint sets of 0…n-1; the smallest member names its set."""

    def __init__(self, n: int) -> None:
        self._parent = list(range(n))

    def root(self, i: int) -> int:
        """Smallest member of the set of `i`."""
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        """Make one set of the sets of `i` and `j`."""
        low, high = sorted((self.root(i), self.root(j)))
        self._parent[high] = low


def _same_picture(a: _Grey, b: _Grey, options: NearDuplicateOptions) -> bool:
    raw = float((_standardised(a) * _standardised(b)).mean())
    if raw < options.min_raw_correlation:
        return False
    return raw >= 0.999 or registered_correlation(a, b) >= options.min_correlation


def _candidates(hashes: npt.NDArray[np.uint64], max_bits: int) -> Iterator[tuple[int, int]]:
    """Pairs (a < b) whose hashes differ in at most `max_bits`."""
    for start in range(0, len(hashes), _BLOCK_ROWS):
        for other in range(start, len(hashes), _BLOCK_ROWS):
            block = hashes[start : start + _BLOCK_ROWS, None] ^ hashes[None, other : other + _BLOCK_ROWS]
            for a, b in np.argwhere(np.bitwise_count(block) <= max_bits):
                if start + a < other + b:
                    yield int(start + a), int(other + b)


def _hash(thumbnail: _Grey) -> np.uint64:
    bits = imagehash.phash(Image.fromarray(thumbnail.astype(np.uint8))).hash
    return np.packbits(bits).view(">u8")[0].astype(np.uint64)


def _thumbnail(data: bytes) -> _Grey:
    return np.frombuffer(data, np.uint8).reshape(SIDE_PX, SIDE_PX).astype(np.float64)


def _standardised(values: _Grey) -> _Grey:
    return (values - values.mean()) / (float(values.std()) or 1.0)


def _preference(images: pd.DataFrame, row: int) -> tuple[bool, int, str]:
    split = images.at[row, "split"]
    order = KEPT_FIRST.index(split) if split in KEPT_FIRST else len(KEPT_FIRST)
    return bool(pd.isna(images.at[row, "label"])), order, str(images.at[row, "path"])


def _reject(images: pd.DataFrame, rows: Iterable[int], reason: RejectReason, detail: str) -> None:
    rows = list(rows)
    images.loc[rows, "rejected"] = reason.value
    images.loc[rows, "detail"] = detail
