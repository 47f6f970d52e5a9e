"""What the saliency maps of a classifier are worth: agreement and faithfulness over held-out images, with controls.

Four questions, each answered beside its control, over the same images:

- Does the class's map show where the concepts of its rule are? Against the rules' maps of other images, and against
  maps of concepts that are not in the rule.
- Does a concept's map agree with where the CLIP-like aligner sees the concept? Against its map of the same concept in
  other images, and of other concepts in the same image.
- Deletion and insertion: does the class (or concept) need the cells that its map shows? Against a random order.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from data_contracts.errors import ImageRejected, InputRefused
from data_contracts.ports import Advance, PixelReader, Pixels, ignore_progress
from model.explain import alignment
from model.explain.faithfulness import Scores, deletion_insertion
from model.explain.map_summary import summarise
from model.explain.saliency import class_column, concept_column, grids, leading_concepts
from model.predict import Classifier, Prediction

Grid = npt.NDArray[np.floating]
Floats = npt.NDArray[np.float64]
Key = tuple[str, str]
"""(image id, concept id)."""

CLASS = "class"
"""Target of a class's map; others are concept ids."""

TABLE_COLUMNS = (
    *("image_id", "target", "method", "compared_with", "alignment", "shuffled", "other_concepts"),
    *("overlap", "overlap_shuffled", "deletion", "insertion", "deletion_random", "insertion_random"),
)
"""`alignment`: rank correlation with `compared_with`; `shuffled`: with that of other images; `other_concepts`: with
that of other concepts of the same image; `overlap`: of the hottest fifth of the cells."""

_BATCH = 8
_N_FAITHFUL_CONCEPTS = 1
"""Concepts of each image whose deletion and insertion are measured: each costs a dozen passes of the network."""


@dataclass(frozen=True)
class MapOptions:
    """What is drawn and how."""

    methods: tuple[str, ...]
    """Of `saliency.METHODS`; each is tested by itself."""
    n_concepts: int = 3
    """Leading concepts of each image's rule."""
    seed: int = 0
    """Of random orders and control concepts."""


@dataclass(frozen=True)
class MapEvidence:
    """What was found."""

    table: pd.DataFrame
    """`TABLE_COLUMNS`, one row a map."""
    summary: pd.DataFrame
    """One row a question and method: see `map_summary`."""
    warnings: list[str] = field(default_factory=list)


class _Seen(NamedTuple):
    """One image and its maps by one method."""

    image_id: str
    tensor: Tensor
    prediction: Prediction
    in_rule: list[str]
    heat: dict[str, Grid]
    """By target: the class, the concepts of the rule, and as many concepts that are not in it."""
    control_ids: list[str]


def map_evidence(
    classifier: Classifier,
    image_ids: Sequence[str],
    read: PixelReader,
    options: MapOptions,
    *,
    clip_maps: Mapping[Key, Grid] | None = None,
    groups: Mapping[str, str] | None = None,
    advance: Advance = ignore_progress,
) -> MapEvidence:
    """Evidence over these held-out images, each method's beside its controls; same seed, same numbers.

    Args:
        classifier: the classifier whose maps are tested.
        image_ids: images, none of which was trained on.
        read: pixels of an image; one that cannot be read is left out with a warning.
        options: methods, concepts and seed.
        clip_maps: the aligner's heatmap by (image id, concept id), of all concepts of these images.
        groups: image id → patient, where known: intervals then draw patients.
        advance: hears of every image and method.
    """
    images, warnings = _read_all(image_ids, read)
    tables = []
    for method in options.methods:
        seen: list[_Seen] = []
        scores: list[Scores] = []
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH]
            try:
                found = _look(classifier, batch, method, options)
            except InputRefused as error:
                warnings.append(f"{method}: {len(batch)} images have no map ({error.message})")
                continue
            seen += found
            for one in found:
                scores.append(_faithfulness(classifier, one, options.seed))
                advance(1)
        tables.append(_table(seen, scores, method, clip_maps or {}))
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(TABLE_COLUMNS))
    return MapEvidence(table, summarise(table, groups or {}), warnings)


def _read_all(image_ids: Sequence[str], read: PixelReader) -> tuple[list[tuple[str, Pixels]], list[str]]:
    images: list[tuple[str, Pixels]] = []
    warnings: list[str] = []
    for image_id in image_ids:
        try:
            images.append((image_id, read(image_id)))
        except ImageRejected as error:
            warnings.append(f"image {image_id[:12]} is not in the evidence on maps: {error.reason}")
    return images, warnings


def _look(classifier: Classifier, batch: Sequence[tuple[str, Pixels]], method: str, options: MapOptions) -> list[_Seen]:
    pixels = [one for _, one in batch]
    tensors = torch.stack([classifier.backbone.preprocess(one) for one in pixels])
    predictions = classifier.predict(pixels)
    wanted = [leading_concepts(p, options.n_concepts) for p in predictions]
    controls = [
        _not_in_rule(p, len(ids), np.random.default_rng([options.seed, zlib.crc32(image_id.encode())]))
        for (image_id, _), p, ids in zip(batch, predictions, wanted, strict=True)
    ]
    columns = [
        [class_column(classifier, p.class_name), *(concept_column(classifier, c) for c in [*ids, *others])]
        for p, ids, others in zip(predictions, wanted, controls, strict=True)
    ]
    return [
        _Seen(image_id, tensor, p, ids, dict(zip([CLASS, *ids, *others], heat, strict=True)), others)
        for (image_id, _), tensor, p, ids, others, heat in zip(
            batch, tensors, predictions, wanted, controls, grids(classifier, tensors, columns, method), strict=True
        )
    ]


def _not_in_rule(prediction: Prediction, n: int, rng: np.random.Generator) -> list[str]:
    """Up to n concepts that the rule says nothing of (without a rule: that are absent), drawn at random."""
    if prediction.rule is None:
        named = {c for c, p in prediction.concept_probabilities.items() if p >= 0.5}
    else:
        named = {t.concept_id for t in prediction.rule.terms}
    others = [c for c in prediction.concept_probabilities if c not in named]
    return [str(c) for c in rng.permutation(others)[:n]]


def _faithfulness(classifier: Classifier, seen: _Seen, seed: int) -> Scores:
    """Deletion and insertion of the class's map and of the first concepts' maps, in this order."""
    targets = [CLASS, *seen.in_rule[:_N_FAITHFUL_CONCEPTS]]
    class_index = classifier.class_names.index(seen.prediction.class_name)
    positions = [classifier.vocabulary.position(c) for c in targets[1:]]
    network = classifier.image_network

    def probabilities(images: Tensor) -> npt.NDArray[np.float32]:
        parts = []
        for chunk in images.split(32):
            with torch.inference_mode():
                output = network(chunk.to(classifier.device))
            said = output.class_logits.float().softmax(1)[:, [class_index]]
            concepts = [] if output.concepts is None else [output.concepts.probabilities[:, positions].float()]
            parts.append(torch.cat([said, *concepts], dim=1).cpu().numpy())
        return np.concatenate(parts)

    return deletion_insertion(seen.tensor, [seen.heat[t] for t in targets], probabilities, seed=seed)


def _table(seen: Sequence[_Seen], scores: Sequence[Scores], method: str, clip_maps: Mapping[Key, Grid]) -> pd.DataFrame:
    rows = [*_class_rows(seen), *_concept_rows(seen, clip_maps)]
    measured = {
        (one.image_id, target): {name: float(values[n]) for name, values in found._asdict().items()}
        for one, found in zip(seen, scores, strict=True)
        for n, target in enumerate([CLASS, *one.in_rule[:_N_FAITHFUL_CONCEPTS]])
    }
    full = [row | {"method": method} | measured.get((str(row["image_id"]), str(row["target"])), {}) for row in rows]
    return pd.DataFrame(full, columns=list(TABLE_COLUMNS))


def _class_rows(seen: Sequence[_Seen]) -> list[dict[str, object]]:
    """The class's map beside the mean map of the concepts that its rule asks for."""
    with_rule = [one for one in seen if one.in_rule]
    means = [_mean([one.heat[c] for c in one.in_rule]) for one in with_rule]
    first = [one.heat[CLASS] for one in with_rule]
    others = ~np.eye(len(with_rule), dtype=bool)
    found = alignment.agreement(first, means, np.arange(len(with_rule)), others)
    not_asked = {
        one.image_id: alignment.rank_correlation(one.heat[CLASS], _mean([one.heat[c] for c in one.control_ids]))
        for one in with_rule
        if one.control_ids
    }
    compared = {one.image_id: _as_row(found, n) for n, one in enumerate(with_rule)}
    return [
        {
            "image_id": one.image_id,
            "target": CLASS,
            "compared_with": "maps of the rule's concepts" if one.in_rule else "",
            **compared.get(one.image_id, {}),
            "other_concepts": not_asked.get(one.image_id, float("nan")),
        }
        for one in seen
    ]


def _concept_rows(seen: Sequence[_Seen], clip_maps: Mapping[Key, Grid]) -> list[dict[str, object]]:
    """Each leading concept's map beside the aligner's heatmap of it, where the run has one."""
    pairs = [(one, c) for one in seen for c in one.in_rule]
    keys = list(clip_maps)
    place = {key: n for n, key in enumerate(keys)}
    known = [(one, c) for one, c in pairs if (one.image_id, c) in place]
    first = [one.heat[c] for one, c in known]
    own = np.array([place[one.image_id, c] for one, c in known], np.int64)
    image_of, concept_of = (np.array([key[n] for key in keys], dtype=object) for n in (0, 1))
    same_image = np.array([image_of == one.image_id for one, _ in known], bool).reshape(len(known), len(keys))
    same_concept = np.array([concept_of == c for _, c in known], bool).reshape(len(known), len(keys))
    second = [clip_maps[key] for key in keys]
    elsewhere = alignment.agreement(first, second, own, ~same_image & same_concept)
    otherwise = alignment.agreement(first, second, own, same_image & ~same_concept)
    compared = {
        (one.image_id, c): _as_row(elsewhere, n) | {"other_concepts": float(otherwise.control[n])}
        for n, (one, c) in enumerate(known)
    }
    return [
        {
            "image_id": one.image_id,
            "target": c,
            "compared_with": "the aligner's map" if (one.image_id, c) in compared else "",
            **compared.get((one.image_id, c), {}),
        }
        for one, c in pairs
    ]


def _as_row(found: alignment.Agreement, n: int) -> dict[str, object]:
    names = ("alignment", "shuffled", "overlap", "overlap_shuffled")
    return {name: float(values[n]) for name, values in zip(names, found, strict=True)}


def _mean(maps: Sequence[Grid]) -> Grid:
    return np.mean(np.stack(maps), axis=0)
