"""Is a classifier as good when it is trained on fused labels instead of the experts' own?

The scenario `recall-heavy` of `label_trust.py`: a simulated vision-language model with many false alarms, the embedded
aligner fitted to it, 1 % of the cells of train and validation audited, all fused. Med-MICN is trained once on those
labels and once on the experts' answers to all cells, on the same images, with the same frozen features and network
seeds, and both are measured on the same test images. Every seed is another simulated model, another audit and another
network. Unaudited labels, and those of the simulated model alone, stand beside.

    python benchmarks/label_trust_training.py [--data ../shared/data] [--cache FOLDER] [--seeds 5]
        [--system med-micn-paper]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from label_trust import SCENARIOS, Sheet, aligned, fused, judges, ledger

from data_contracts.dataset import AlignedDataset
from data_contracts.ports import Pixels
from model.config import TrainConfig
from model.evaluate import evaluate
from model.fit import fit, prepare_for
from model.systems.registry import SYSTEMS, system
from pipeline.assemble import assemble

SCENARIO = "recall-heavy"
SHOWN = ("macro_f1", "accuracy")


def datasets(sheet: Sheet, images: pd.DataFrame, seed: int) -> dict[str, AlignedDataset]:
    """Kind of labels → the data set they make; all of the same images and concepts."""
    rng = np.random.default_rng([seed, SCENARIOS.index(SCENARIO)])
    votes = judges(sheet, SCENARIO, rng)
    order = rng.permutation(np.flatnonzero(np.repeat(~sheet.is_test[:, None], sheet.truth.shape[1], 1)))
    found = {"experts' answers": of_answers(sheet, images, sheet.truth)}
    for name, share in (("fused, 1 % audited", 0.01), ("fused, no audit", 0.0)):
        audited = np.zeros(sheet.truth.shape, bool)
        audited.ravel()[order[: round(share * len(order))]] = True
        judgements = ledger(sheet, SCENARIO, votes, audited)
        _, probability = aligned(sheet, judgements, seed)
        labels = fused(sheet, judgements, probability, grouped=True)
        found[name] = assemble(images, labels, sheet.vocabulary(grouped=True))
    return found | {"the model's answers alone": of_answers(sheet, images, votes[0])}


def of_answers(sheet: Sheet, images: pd.DataFrame, answers: np.ndarray) -> AlignedDataset:
    """The data set of (N, K) plain answers, none of them abstaining."""
    vocabulary = sheet.vocabulary(grouped=True)
    labels = pd.DataFrame(
        {
            "image_id": np.repeat(sheet.image_ids, len(vocabulary)),
            "concept_id": np.tile(vocabulary.ids, len(sheet.image_ids)),
            "present": pd.array(answers.ravel() > 0, dtype="boolean"),
            "probability": answers.ravel(),
        }
    )
    return assemble(images, labels, vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("MEDMICN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "medmicn-benchmarks")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--system", default="med-micn-paper", choices=list(SYSTEMS))
    options = parser.parse_args()
    sheet = Sheet(options.data / "wbcatt", options.cache)
    table = pd.read_csv(options.data / "wbcatt" / "labels.csv")
    images = table.assign(image_id=sheet.image_ids, group_id=None, rejected=None)

    def read(image_id: str) -> Pixels:
        return sheet.read(image_id)

    rows = []
    for seed in range(options.seeds):
        for name, dataset in datasets(sheet, images, seed).items():
            config = system(options.system).config(TrainConfig(seeds=(seed,)))
            prepared, backbone = prepare_for([config], dataset, read, cache_dir=options.cache)
            measured = evaluate(fit(prepared, backbone, config)).summary.set_index("metric")["mean"]
            rows.append({"seed": seed, "labels": name, **{m: float(measured[m]) for m in SHOWN}})
            print(rows[-1], flush=True)
    found = pd.DataFrame(rows).set_index(["labels", "seed"])
    expert = found.xs("experts' answers", level="labels")["macro_f1"]
    print(f"\n{options.system}, {options.seeds} seeds, {sheet.is_test.sum()} test images: mean ± sd")
    for name, group in found.groupby(level="labels", sort=False):
        gap = group["macro_f1"].droplevel("labels") - expert
        numbers = " ".join(f"{m} {group[m].mean():.3f} ± {group[m].std(ddof=1):.3f}" for m in SHOWN)
        print(f"{name:28} {numbers}  F1 less that of experts {gap.mean():+.3f} ± {gap.std(ddof=1):.3f}")


if __name__ == "__main__":
    main()
