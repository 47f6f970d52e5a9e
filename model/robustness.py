"""How classes, concepts and maps hold when pixels change: the paper's sensitivity analysis, and common corruptions.

FGSM and PGD at δ ∈ {4, 6, 8, 10, 12}/255, uniform noise of radius 0 to 10/255, and five kinds of corruption at five
severities: one row each, beside the untouched images. Labels are used by the attacks and to count what is right; no
choice is made with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from data_contracts.dataset import AlignedDataset
from data_contracts.errors import ImageRejected
from data_contracts.ports import Advance, PixelReader, Pixels, ignore_progress
from model import metrics as m
from model.attacks import PixelNetwork, fgsm, pgd, uniform_noise
from model.corruptions import CORRUPTIONS, N_SEVERITIES
from model.data import Rows
from model.explain.alignment import rank_correlation
from model.explain.saliency import DEFAULT_METHOD, grids
from model.intervals import bootstrap, mean_interval, proportion
from model.outputs import Outputs, as_arrays
from model.predict import Classifier

Grid = npt.NDArray[np.float32]

DELTAS = (4, 6, 8, 10, 12)
"""Of 255: the paper's strengths of attacks."""
RADII = (0, 2, 4, 6, 8, 10)
"""Of 255: the paper's noise radii."""
_BATCH = 16

COLUMNS = (
    *("perturbation", "strength", "n", "accuracy", "accuracy_low", "accuracy_high"),
    *("macro_f1", "macro_f1_low", "macro_f1_high", "concept_auroc", "same_class", "same_concepts"),
    *("concept_change", "map_correlation", "map_correlation_low", "map_correlation_high"),
)
"""`strength`: ε of 255, or severity 1 to 5. `same_class`, `same_concepts`: fraction that are as without
the change, concepts at ½. `concept_change`: mean |Δĉ|. `map_correlation`: rank correlation of the class's map with the
one of the untouched image, for the class said then."""


Change = Callable[[PixelNetwork, Tensor, Tensor, int], Tensor]
"""Network, x (B, 3, S, S) in [0, 1], y (B,), number of the batch → x changed."""


class Perturbation(NamedTuple):
    """One way of changing a batch."""

    name: str
    strength: float
    apply: Change


@dataclass
class _Seen:
    """What one perturbation did, over all batches."""

    outputs: list[Outputs]
    maps: list[Grid]


def robustness(
    classifier: Classifier,
    dataset: AlignedDataset,
    read: PixelReader,
    rows: Rows,
    *,
    perturbations: Sequence[Perturbation] | None = None,
    seed: int = 0,
    advance: Advance = ignore_progress,
) -> pd.DataFrame:
    """One row a perturbation and strength, `COLUMNS`, over these rows of the data set: take held-out images.

    `advance` hears of every image and perturbation. Images that cannot be read are left out. Noise, random starts and
    corruptions are drawn from `seed`.
    """
    chosen = [untouched(), *(all_perturbations(seed) if perturbations is None else perturbations)]
    seen = [_Seen([], []) for _ in chosen]
    network = PixelNetwork(classifier.image_network, classifier.backbone.preprocess).to(classifier.device).eval()
    used: list[int] = []
    for number, (batch_rows, x) in enumerate(_batches(classifier, dataset, read, rows)):
        used += batch_rows.tolist()
        y = torch.from_numpy(dataset.class_index()[batch_rows]).to(classifier.device)
        said: list[int] | None = None
        for one, found in zip(chosen, seen, strict=True):
            outputs, maps = _look(classifier, network, one.apply(network, x, y, number), said)
            said = said or outputs.predicted.tolist()
            found.outputs.append(outputs)
            found.maps += maps
            advance(len(x))
    measured = dataset.take(np.asarray(used, np.int64))
    return _table(chosen, seen, measured)


def all_perturbations(seed: int = 0) -> list[Perturbation]:
    """The whole analysis, weakest first within each kind."""
    return [
        *(Perturbation("fgsm", d, _fgsm(d / 255)) for d in DELTAS),
        *(Perturbation("pgd", d, _pgd(d / 255, seed)) for d in DELTAS),
        *(Perturbation("uniform noise", r, _noise(r / 255, seed)) for r in RADII),
        *(
            Perturbation(name, float(severity), _corrupted(name, severity, seed))
            for name in CORRUPTIONS
            for severity in range(1, N_SEVERITIES + 1)
        ),
    ]


def untouched() -> Perturbation:
    """The images as they are."""
    return Perturbation("none", 0.0, _unchanged)


def _unchanged(_network: PixelNetwork, x: Tensor, _y: Tensor, _number: int) -> Tensor:
    return x


def _fgsm(delta: float) -> Change:
    return lambda net, x, y, _n: fgsm(net, x, y, delta)


def _pgd(delta: float, seed: int) -> Change:
    return lambda net, x, y, n: pgd(net, x, y, delta, generator=torch.Generator().manual_seed(seed + n))


def _noise(radius: float, seed: int) -> Change:
    return lambda _net, x, _y, n: uniform_noise(x, radius, generator=torch.Generator().manual_seed(seed + n))


def _corrupted(name: str, severity: int, seed: int) -> Change:
    def apply(_network: PixelNetwork, x: Tensor, _y: Tensor, n: int) -> Tensor:
        rng = np.random.default_rng([seed, n])
        pixels = (x * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return _unit_tensor([CORRUPTIONS[name](one, severity, rng) for one in pixels]).to(x)

    return apply


def _batches(
    classifier: Classifier, dataset: AlignedDataset, read: PixelReader, rows: Rows
) -> Iterator[tuple[Rows, Tensor]]:
    """Row numbers and (B, 3, S, S) pixels in [0, 1] of the images that can be read."""
    ids, resize = dataset.image_ids, classifier.backbone.preprocess.resize
    for start in range(0, len(rows), _BATCH):
        usable: list[int] = []
        pixels: list[Pixels] = []
        for row in rows[start : start + _BATCH]:
            try:
                pixels.append(resize(read(ids[row])))
            except ImageRejected:
                continue
            usable.append(int(row))
        if usable:
            yield np.asarray(usable, np.int64), _unit_tensor(pixels).to(classifier.device)


def _unit_tensor(images: Sequence[Pixels]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def _look(
    classifier: Classifier, network: PixelNetwork, x: Tensor, said: list[int] | None
) -> tuple[Outputs, list[Grid]]:
    """Outputs, and each image's map of the class in `said` (else of the class said now)."""
    standardised = network.standardised(x)
    with torch.inference_mode():
        outputs = as_arrays(network.network(standardised))
    asked = said or outputs.predicted.tolist()
    return outputs, [heat[0] for heat in grids(classifier, standardised, [[c] for c in asked], DEFAULT_METHOD)]


def _table(chosen: Sequence[Perturbation], seen: Sequence[_Seen], dataset: AlignedDataset) -> pd.DataFrame:
    if not len(dataset):
        return pd.DataFrame(columns=list(COLUMNS))
    joined = [Outputs(*(np.concatenate(parts) for parts in zip(*one.outputs, strict=True))) for one in seen]
    groups = dataset.frame["group_id"].fillna(dataset.frame["image_id"]).tolist()
    rows = [
        {"perturbation": one.name, "strength": one.strength}
        | _measures(dataset, outputs, joined[0], groups)
        | _map_stability(found.maps, seen[0].maps, groups)
        for one, outputs, found in zip(chosen, joined, seen, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _measures(dataset: AlignedDataset, now: Outputs, before: Outputs, groups: Sequence[object]) -> dict[str, float]:
    y, n_classes = dataset.class_index(), len(dataset.class_names)

    def macro_f1(rows: Rows) -> float:
        return m.mean_defined(m.per_class(m.confusion_matrix(y[rows], now.predicted[rows], n_classes)).f1)

    accuracy = proportion(int((now.predicted == y).sum()), len(y))
    f1 = bootstrap(macro_f1, len(y), groups=groups, n_resamples=300)
    return {
        "n": len(y),
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "macro_f1": f1.value,
        "macro_f1_low": f1.low,
        "macro_f1_high": f1.high,
        "same_class": float((now.predicted == before.predicted).mean()),
        **(_concept_stability(dataset, now, before) if now.has_concepts else {}),
    }


def _concept_stability(dataset: AlignedDataset, now: Outputs, before: Outputs) -> dict[str, float]:
    said, clean = now.concept_probabilities, before.concept_probabilities
    return {
        "concept_auroc": m.mean_defined(m.concept_auroc(dataset.concepts, dataset.mask, said)),
        "same_concepts": float(((said >= 0.5) == (clean >= 0.5)).mean()),
        "concept_change": float(np.abs(said - clean).mean()),
    }


def _map_stability(now: Sequence[Grid], before: Sequence[Grid], groups: Sequence[object]) -> dict[str, float]:
    found = mean_interval(np.array([rank_correlation(a, b) for a, b in zip(now, before, strict=True)]), groups=groups)
    return {
        "map_correlation": found.value,
        "map_correlation_low": found.low,
        "map_correlation_high": found.high,
    }
