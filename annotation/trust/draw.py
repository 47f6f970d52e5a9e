"""Which cells an expert is asked about: two passes over the labels, in the memory of one shard.

The first pass counts how many cells each stratum has and how much their answers would tell; from that follows how many
are asked of each, and the probability of every single cell. The second pass draws: within a stratum cells stand in a
row, each as long as its probability, and points at equal distances along it, from a random start, hit those that are
asked (a systematic draw). They stand by class, then in 64 random lots, then as they come. Where each class and lot
begins is known from the first pass, so nothing needs to be sorted as a whole, and the draw does not depend on how the
labels are cut into shards.

A stratum so small that some of its cells are certain to be asked has at most some 26 cells to each question. Those are
kept, and drawn at the end, when all of them are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from annotation.trust.sampling import Floats, Places, allocated, inclusion, systematic
from data_contracts.concepts import Vocabulary
from data_contracts.tables import Split, Witness

LabelShards = Callable[[], Iterable[pd.DataFrame]]
"""The labels, some rows at a time; gone through twice, and in the same order."""

LABEL_COLUMNS = ("image_id", "concept_id", "probability", "decided_by", "disagreement")
"""Of LABELS, what a draw looks at."""
SHEET_COLUMNS = ["image_id", "path", "concept_id", "concept", "definition", "answer"]
"""What an expert sees; nothing in it depends on what the machine said of the cell."""
DESIGN_COLUMNS = ["image_id", "concept_id", "round", "stratum", "inclusion_probability"]
"""How a cell was drawn; kept apart from the sheet, because likely cells and unlikely ones differ in these."""
COLUMNS = [*SHEET_COLUMNS, "round", "stratum", "inclusion_probability"]

_BANDS = (0.35, 0.65)
_N_BANDS = len(_BANDS) + 1
_LEAST_INFORMATION = 0.02
_MOST_INFORMATION = 1 + _LEAST_INFORMATION
_MOST_LOTS = 64
_MOST_BLOCKS = 2_000_000


class DrawOptions(BaseModel):
    """How cells are drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_cells: int = Field(200, ge=1)
    """Cells the expert is asked to fill."""
    seed: int = 0
    """Decides the draw."""
    splits: tuple[Split, ...] = (Split.TRAIN, Split.VAL)
    """Splits drawn from. The test split stays out: an expert's answer becomes part of the labels."""
    even_share: float = Field(0.5, gt=0, le=1)
    """Share of the cells that is drawn evenly within a stratum; the rest goes where an answer would change most. It
    bounds every weight: no cell stands for more than 1 / `even_share` times what it would stand for in an even draw."""


def draw(
    labels: LabelShards,
    images: pd.DataFrame,
    vocabulary: Vocabulary,
    options: DrawOptions,
    *,
    asked: pd.DataFrame | None = None,
    need: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """The cells for an expert to fill: `COLUMNS`, `answer` empty, in random order.

    Cells are stratified by concept and by what the machine believes (absent, unsure, present) and spread over classes
    within each stratum. `even_share` of a stratum's probability is even; the rest is in proportion to how much an
    answer would change: the entropy of the fused probability and how far the witnesses disagree. So every cell has a
    known, positive probability, and weights of its inverse undo the choice (see `sampling` for several rounds).
    Cells that a person decided are not drawn.

    Args:
        labels: LABELS with at least `LABEL_COLUMNS` (`disagreement` may be missing).
        images: IMAGES.
        vocabulary: The concepts.
        options: Size, seed and shares.
        asked: Cells of earlier rounds (`DESIGN_COLUMNS`): they are never asked again, and the new rows are the next
            round's.
        need: How much is to be asked of each concept, beside the others; 0 for nothing. All alike if None.
    """
    round_number = 1 if asked is None or asked.empty else int(asked["round"].max()) + 1
    rng = np.random.default_rng([options.seed, round_number])
    population = _Population(images, vocabulary, options, asked, round_number)
    counted = _counted(population, labels)
    worth = _measure(counted, vocabulary, need, options)
    quota = allocated(worth, counted.sizes, options.n_cells, rng)
    found = _Drawing(population, counted, quota, options, rng).through(labels)
    number = rng.permutation(population.n_strata)
    drawn = found.take(rng.permutation(len(found.image)))
    concepts = [vocabulary.concepts[k] for k in drawn.concept]
    return pd.DataFrame(
        {
            "image_id": population.images["image_id"].to_numpy()[drawn.image],
            "path": population.images["path"].to_numpy()[drawn.image],
            "concept_id": pd.Series([c.concept_id for c in concepts], dtype="str"),
            "concept": [c.name for c in concepts],
            "definition": [c.definition for c in concepts],
            "answer": pd.Series([""] * len(concepts), dtype="str"),
            "round": round_number,
            "stratum": pd.Series([f"r{round_number}-s{number[s]:03d}" for s in drawn.stratum], dtype="str"),
            "inclusion_probability": drawn.probability,
        },
        columns=COLUMNS,
    )


class _Cells(NamedTuple):
    """Cells of one shard that may be drawn, in its order; all (n,)."""

    image: Places
    concept: Places
    block: Places
    """Stratum, class and lot, as one number."""
    information: Floats
    """How much an answer would change, `_LEAST_INFORMATION` to `_MOST_INFORMATION`."""

    def where(self, chosen: npt.NDArray[np.bool_] | Places) -> _Cells:
        """Some of the cells."""
        return _Cells(self.image[chosen], self.concept[chosen], self.block[chosen], self.information[chosen])


class _Drawn(NamedTuple):
    """Cells that were hit; all (n,)."""

    image: Places
    concept: Places
    stratum: Places
    probability: Floats

    def take(self, order: Places) -> _Drawn:
        """The cells in another order."""
        return _Drawn(self.image[order], self.concept[order], self.stratum[order], self.probability[order])


class _Counted(NamedTuple):
    """What the first pass found: (S, B) numbers of cells and sums of information by stratum and block in it."""

    n: Floats
    information: Floats

    @property
    def sizes(self) -> Places:
        """(S,) cells of each stratum."""
        return self.n.sum(1).astype(np.int64)


class _Population:
    """The images that are drawn from, and how rows of LABELS are read as cells."""

    def __init__(
        self,
        images: pd.DataFrame,
        vocabulary: Vocabulary,
        options: DrawOptions,
        asked: pd.DataFrame | None,
        round_number: int,
    ) -> None:
        usable = images[images["rejected"].isna() & (images["split"].isna() | images["split"].isin(options.splits))]
        self.images = usable[["image_id", "path"]].reset_index(drop=True)
        self._image_index = pd.Index(self.images["image_id"])
        self._concept_index = pd.Index(vocabulary.ids)
        self._class, names = pd.factorize(usable["label"].astype("object").fillna(""), sort=True)
        self.n_strata = _N_BANDS * len(vocabulary)
        n_classes = max(len(names), 1)
        self._n_lots = int(np.clip(_MOST_BLOCKS // max(self.n_strata * n_classes, 1), 1, _MOST_LOTS))
        self.n_blocks = n_classes * self._n_lots
        key = f"{options.seed:08d}{round_number:08d}"[:16]
        self._hash = pd.util.hash_array(np.asarray(self.images["image_id"], object), hash_key=key)
        self._asked = self._keys(asked)

    def cells(self, labels: pd.DataFrame) -> _Cells:
        """The cells among some rows of LABELS that may be drawn."""
        image, concept = _places(labels["image_id"], self._image_index), self._concepts(labels)
        by_person = labels["decided_by"].isin([Witness.EXPERT, Witness.GIVEN]).to_numpy(bool)
        rows = np.flatnonzero((image >= 0) & (concept >= 0) & ~by_person)
        if len(self._asked):
            rows = rows[~np.isin(image[rows] * len(self._concept_index) + concept[rows], self._asked)]
        image, concept = image[rows], concept[rows]
        probability = np.clip(labels["probability"].to_numpy(np.float64)[rows], 0, 1)
        disagreement = labels["disagreement"].to_numpy(np.float64)[rows] if "disagreement" in labels else 0.0
        stratum = _N_BANDS * concept + np.digitize(probability, _BANDS)
        lot = self._lots(image, concept)
        return _Cells(
            image,
            concept,
            stratum * self.n_blocks + self._class[image] * self._n_lots + lot,
            (_entropy(probability) + disagreement) / 2 + _LEAST_INFORMATION,
        )

    def _concepts(self, labels: pd.DataFrame) -> Places:
        return _places(labels["concept_id"], self._concept_index)

    def _lots(self, image: Places, concept: Places) -> Places:
        """A number below `_n_lots` for each cell, by the hashes of image and concept."""
        mixed = self._hash[image] ^ ((concept.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
        return ((mixed * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(40)).astype(np.int64) % self._n_lots

    def _keys(self, asked: pd.DataFrame | None) -> Places:
        """Image and concept as one number, of the cells that were asked before."""
        if asked is None or asked.empty:
            return np.zeros(0, np.int64)
        image, concept = _places(asked["image_id"], self._image_index), self._concepts(asked)
        known = (image >= 0) & (concept >= 0)
        return np.unique(image[known] * len(self._concept_index) + concept[known])


def _counted(population: _Population, labels: LabelShards) -> _Counted:
    length = population.n_strata * population.n_blocks
    n, information = np.zeros(length), np.zeros(length)
    for shard in labels():
        cells = population.cells(shard)
        n += np.bincount(cells.block, minlength=length)
        information += np.bincount(cells.block, cells.information, minlength=length)
    shape = (population.n_strata, population.n_blocks)
    return _Counted(n.reshape(shape), information.reshape(shape))


def _measure(
    counted: _Counted, vocabulary: Vocabulary, need: Mapping[str, float] | None, options: DrawOptions
) -> Floats:
    """(S,) how much is to be asked of each stratum, beside the others.

    The root of its size asks more of small strata than their share: rare answers are where precision and recall are
    decided. Times how much its cells tell, and how much its concept needs.
    """
    sizes, told = counted.sizes, counted.information.sum(1)
    mean = told / np.maximum(sizes, 1)
    overall = told.sum() / sizes.sum() if sizes.any() else 1.0
    wanted = np.array([1.0 if need is None else max(need.get(c, 0.0), 0.0) for c in vocabulary.ids])
    worth = options.even_share + (1 - options.even_share) * mean / overall
    return np.asarray(np.sqrt(sizes) * worth * np.repeat(wanted, _N_BANDS), np.float64)


@dataclass
class _Drawing:
    """The second pass."""

    population: _Population
    counted: _Counted
    quota: Places
    options: DrawOptions
    rng: np.random.Generator

    def through(self, labels: LabelShards) -> _Drawn:
        """The cells that are hit, in the order of concepts and images."""
        start = self.rng.random(self.population.n_strata)
        ends = self._block_starts
        hit: list[_Drawn] = []
        kept: list[_Cells] = []
        for shard in labels():
            cells = self.population.cells(shard)
            stratum = cells.block // self.population.n_blocks
            kept.append(cells.where(self._is_small[stratum]))
            hit.append(self._hit(cells.where((self.quota[stratum] > 0) & ~self._is_small[stratum]), ends, start))
        hit += self._hit_small(_joined(kept)) if kept else []
        found = _Drawn(
            _end_to_end([part.image for part in hit]),
            _end_to_end([part.concept for part in hit]),
            _end_to_end([part.stratum for part in hit]),
            np.concatenate([np.zeros(0), *(part.probability for part in hit)]),
        )
        return found.take(np.lexsort((found.image, found.concept)))

    @cached_property
    def _is_small(self) -> npt.NDArray[np.bool_]:
        """(S,) strata with a cell whose share of the questions may exceed 1."""
        sizes, told = np.maximum(self.counted.sizes, 1), np.maximum(self.counted.information.sum(1), 1e-12)
        largest = self._size(1 / sizes, _MOST_INFORMATION / told)
        return (self.quota > 0) & (self.quota * largest > 1)

    def _size(self, even: Floats, told: Floats) -> Floats:
        """What the even part and the part by information come to."""
        return self.options.even_share * even + (1 - self.options.even_share) * told

    @cached_property
    def _block_starts(self) -> Floats:
        """(S * B,) where on its stratum's row every block begins."""
        sizes, told = np.maximum(self.counted.sizes, 1), np.maximum(self.counted.information.sum(1), 1e-12)
        length = self.quota[:, None] * self._size(
            self.counted.n / sizes[:, None], self.counted.information / told[:, None]
        )
        return (np.cumsum(length, axis=1) - length).ravel()

    def _hit(self, cells: _Cells, ends: Floats, start: Floats) -> _Drawn:
        """The cells of one shard on which a point lies; `ends` moves on: how far every block has come."""
        cells = cells.where(np.argsort(cells.block, kind="stable"))
        stratum = cells.block // self.population.n_blocks
        sizes, told = self.counted.sizes[stratum], self.counted.information.sum(1)[stratum]
        probability = self.quota[stratum] * self._size(1 / sizes, cells.information / told)
        first = np.flatnonzero(np.diff(cells.block, prepend=-1))
        along = np.cumsum(probability)
        before = np.repeat(along[first] - probability[first], np.diff(np.append(first, len(along))))
        end = ends[cells.block] + along - before
        begin = np.concatenate([[0.0], end[:-1]])
        begin[first] = ends[cells.block[first]]
        last = np.append(first[1:], len(end)) - 1 if len(first) else first
        ends[cells.block[last]] = end[last]
        # Points lie at the start, and then one unit apart: the quota is how many fit on the row.
        is_hit = np.ceil(end - start[stratum]) > np.ceil(begin - start[stratum])
        return _Drawn(cells.image[is_hit], cells.concept[is_hit], stratum[is_hit], probability[is_hit])

    def _hit_small(self, cells: _Cells) -> list[_Drawn]:
        """The same where no probability may exceed 1, on whole strata."""
        cells = cells.where(np.argsort(cells.block, kind="stable"))
        stratum = cells.block // self.population.n_blocks
        found = []
        for number in np.unique(stratum):
            members = cells.where(stratum == number)
            quota = int(self.quota[number])
            size = self._size(np.full(len(members.image), 1 / len(members.image)), _shares(members.information))
            probability = inclusion(size, quota)
            hit = systematic(probability, self.rng, quota, len(probability)) > 0
            n_hit = int(hit.sum())
            found.append(_Drawn(members.image[hit], members.concept[hit], np.full(n_hit, number), probability[hit]))
        return found


def _joined(cells: Sequence[_Cells]) -> _Cells:
    return _Cells(
        _end_to_end([part.image for part in cells]),
        _end_to_end([part.concept for part in cells]),
        _end_to_end([part.block for part in cells]),
        np.concatenate([part.information for part in cells]),
    )


def _end_to_end(parts: Sequence[Places]) -> Places:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _places(column: pd.Series, index: pd.Index) -> Places:
    """(n,) place of every value in the index, -1 where it is not there; each distinct text is looked up once."""
    codes, names = pd.factorize(column)
    return np.asarray(index.get_indexer(np.asarray(names, object)), np.int64)[codes]


def _shares(values: Floats) -> Floats:
    return values / values.sum()


def _entropy(probability: Floats) -> Floats:
    """In bits."""
    inside = np.clip(probability, 1e-12, 1 - 1e-12)
    return np.asarray(-inside * np.log2(inside) - (1 - inside) * np.log2(1 - inside), np.float64)
