"""Med-MICN on WBCAtt with the experts' attributes as given labels: 31 concepts, frozen embedded backbone.

    python benchmarks/wbcatt_given_labels.py [--data FOLDER] [--seeds 0 1 2] [--systems med-micn-paper med-micn-dcr]

Every setting is the default; defaults were chosen on the validation images. Test images are measured once, here.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from wbcatt_data import read_dataset

from data_contracts.ports import Pixels
from model.config import TrainConfig
from model.evaluate import RunEvaluation, evaluate, outputs_of
from model.explain.class_rules import read_class_rules
from model.explain.rule_evidence import class_rules
from model.explain.rules import image_rules
from model.fit import TrainedRun, fit, prepare_for
from model.systems.registry import SYSTEMS, system

SHOWN = ("accuracy", "macro_f1", "auroc", "ece", "concept_auroc", "concept_f1", "rule_macro_f1", "rule_agreement")


def show(name: str, run: TrainedRun, measured: RunEvaluation) -> None:
    summary = measured.summary.set_index("metric")
    epochs = run.history["seconds"]
    print(f"\n{name}: {epochs.median():.2f} s an epoch, epochs kept {[fitted.epoch for fitted in run.seeds]}")
    for metric in SHOWN:
        if metric in summary.index:
            print(f"  {metric:15} {summary.at[metric, 'mean']:.3f} ± {summary.at[metric, 'sd']:.3f}")
    if "rule_macro_f1" in summary.index:
        show_rules(run)


def show_rules(run: TrainedRun) -> None:
    dataset, rows = run.prepared.dataset, run.prepared.dataset.rows("test")
    outputs = outputs_of(run, run.best, rows)
    rules = read_class_rules(outputs_of(run, run.best, dataset.rows("train")), run.vocabulary, run.class_names)
    table = class_rules(rules, outputs, dataset.class_index()[rows], run.vocabulary, run.class_names)
    for row in table.to_dict("records"):
        print(f"  {row['rule']}  (precision {row['precision']:.2f}, recall {row['recall']:.2f}, "
              f"fidelity {row['fidelity']:.2f})")  # fmt: skip
    per_image = image_rules(outputs, [dataset.image_ids[n] for n in rows], run.vocabulary, run.class_names)
    print(f"  image rules: {per_image['holds'].mean():.2f} hold, {per_image['length'].mean():.1f} terms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("MEDMICN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="folder that holds wbcatt/")
    parser.add_argument("--cache", type=Path, help="where features are kept; default: a temporary folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--systems", nargs="+", default=["med-micn-paper", "med-micn-dcr"], choices=list(SYSTEMS))
    options = parser.parse_args()
    folder = options.data / "wbcatt"

    def read(image_id: str) -> Pixels:
        return np.asarray(Image.open(folder / image_id).convert("RGB"))

    dataset = read_dataset(folder)
    print(f"{len(dataset)} images, {len(dataset.vocabulary)} concepts, classes {', '.join(dataset.class_names)}")
    common = TrainConfig(seeds=tuple(options.seeds))
    configs = {name: system(name).config(common) for name in options.systems}
    with tempfile.TemporaryDirectory() as temporary:
        started_s = time.perf_counter()
        prepared, backbone = prepare_for(
            list(configs.values()), dataset, read, cache_dir=options.cache or Path(temporary)
        )
        print(f"features: {time.perf_counter() - started_s:.0f} s, {prepared.n_reused} reused")
        for name, config in configs.items():
            run = fit(prepared, backbone, config)
            show(name, run, evaluate(run))


if __name__ == "__main__":
    main()
