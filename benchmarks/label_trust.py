"""How good are labels fused from a noisy judge and alignment fitted to that judge?

A simulated vision-language model answers the expert attributes of wbcatt with a sensitivity of 0.75-0.95 and a
specificity of 0.5-0.85 per concept, independently per cell. The embedded aligner is fitted to those answers, cross-
fitted; then both are fused. Experts' answers are used for scoring only, and only those of the test split.

    python benchmarks/label_trust.py [--data ../shared/data] [--cache FOLDER] [--seeds 3]

The first run computes image features (about a minute on 2 cores) and keeps them in the cache folder.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from annotation.alignment.align import AlignOptions, align
from annotation.trust.fuse import fuse
from annotation.trust.thresholds import ThresholdMethod, ThresholdOptions, fit_thresholds
from annotation.votes import matrix
from data_contracts.concepts import Concept, Vocabulary, slug

N_BINS = 10


class Sheet:
    """The expert attributes of wbcatt as one binary concept per value."""

    def __init__(self, folder: Path) -> None:
        labels = pd.read_csv(folder / "labels.csv")
        attributes = pd.read_csv(folder / "expert_attributes.csv").set_index("path").loc[labels["path"]]
        values = [(name, value) for name in attributes for value in sorted(attributes[name].dropna().unique())]
        self.folder = folder
        self.image_ids = [hashlib.sha256(path.encode()).hexdigest() for path in labels["path"]]
        self.path = dict(zip(self.image_ids, labels["path"], strict=True))
        self.is_test = (labels["split"] == "test").to_numpy()
        self.truth = np.stack([(attributes[name] == value).to_numpy(float) for name, value in values], 1)
        self.names = [(f"{name.replace('_', ' ')}: {value}", name) for name, value in values]

    def vocabulary(self, *, grouped: bool) -> Vocabulary:
        """One concept per attribute value; with groups, the values of an attribute exclude each other."""
        return Vocabulary.of(Concept(slug(n), n, group=group if grouped else None) for n, group in self.names)

    def read(self, image_id: str) -> np.ndarray:
        """The pixels of an image."""
        return np.asarray(Image.open(self.folder / self.path[image_id]).convert("RGB"))


def simulated_vlm(sheet: Sheet, seed: int) -> tuple[np.ndarray, pd.DataFrame]:
    """(votes, judgements) of a judge with high recall and poor precision."""
    rng = np.random.default_rng(seed)
    n_concepts = sheet.truth.shape[1]
    sensitivity, specificity = rng.uniform(0.75, 0.95, n_concepts), rng.uniform(0.5, 0.85, n_concepts)
    draw = rng.random(sheet.truth.shape)
    votes = np.where(sheet.truth > 0, draw < sensitivity, draw > specificity).astype(float)
    vocabulary = sheet.vocabulary(grouped=False)
    judgements = pd.DataFrame(
        {
            "image_id": np.repeat(sheet.image_ids, n_concepts),
            "concept_id": np.tile(vocabulary.ids, len(sheet.image_ids)),
            "witness": "vlm",
            "witness_model": "simulated",
            "state": np.where(votes.ravel() > 0, "present", "absent"),
            "probability": np.nan,
        }
    )
    return votes, judgements


def one_seed(sheet: Sheet, cache: Path, seed: int) -> dict[str, dict[str, float]]:
    votes, judgements = simulated_vlm(sheet, seed)
    plain, grouped = sheet.vocabulary(grouped=False), sheet.vocabulary(grouped=True)
    tables = align(sheet.image_ids, sheet.read, plain, judgements, AlignOptions(seed=seed), cache_dir=cache)
    scores = pa.concat_tables(t.drop(["heatmap"]) for t in tables).to_pandas()
    similarity, aligned = (matrix(scores, c, sheet.image_ids, plain) for c in ("similarity", "probability"))
    otsu = fit_thresholds(scores, judgements, ThresholdOptions(method=ThresholdMethod.OTSU))
    fused, in_groups = fuse(judgements, scores, plain), fuse(judgements, scores, grouped)
    by_rule = (similarity > otsu.set_index("concept_id").loc[list(plain.ids), "threshold"].to_numpy()).astype(float)
    return {
        "VLM alone": numbers(sheet, votes, votes),
        "alignment, Otsu's threshold (paper)": numbers(sheet, similarity, by_rule),
        "alignment, fitted probability": numbers(sheet, aligned, (aligned > 0.5).astype(float)),
        "plain sum of probability and vote": numbers(sheet, aligned + votes, (aligned + votes > 1).astype(float)),
        "fused": of_labels(sheet, fused, plain),
        "fused, attributes exclusive": of_labels(sheet, in_groups, grouped),
    }


def of_labels(sheet: Sheet, labels: pd.DataFrame, vocabulary: Vocabulary) -> dict[str, float]:
    probability = matrix(labels, "probability", sheet.image_ids, vocabulary)
    present = matrix(labels, "present", sheet.image_ids, vocabulary)
    ece = expected_calibration_error(probability[sheet.is_test].ravel(), sheet.truth[sheet.is_test].ravel())
    return numbers(sheet, probability, present) | {"ECE": ece}


def numbers(sheet: Sheet, score: np.ndarray, called: np.ndarray) -> dict[str, float]:
    """AUROC and kappa as means over concepts, precision and coverage over cells, on the test split."""
    true, score, called = sheet.truth[sheet.is_test], score[sheet.is_test], called[sheet.is_test]
    spoken = np.isfinite(called)
    kappas = [cohen_kappa_score(t[s], c[s]) for t, c, s in zip(true.T, called.T, spoken.T, strict=True)]
    return {
        "AUROC": float(np.mean([roc_auc_score(t, s) for t, s in zip(true.T, score.T, strict=True)])),
        "kappa": float(np.nanmean(kappas)),
        "precision": float(true[called == 1].mean()),
        "coverage": float(spoken.mean()),
    }


def expected_calibration_error(probability: np.ndarray, true: np.ndarray) -> float:
    bins = np.minimum((probability * N_BINS).astype(int), N_BINS - 1)
    gaps = [abs(probability[bins == b].mean() - true[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(np.sum(gaps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("MEDMICN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "medmicn-benchmarks")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    sheet = Sheet(options.data / "wbcatt")
    found = [one_seed(sheet, options.cache, seed) for seed in range(options.seeds)]
    table = pd.concat([pd.DataFrame(f).T for f in found], keys=range(options.seeds)).groupby(level=1, sort=False)
    mean, deviation = table.mean(), table.std(ddof=0)
    shown = mean.map("{:.3f}".format) + " ± " + deviation.map("{:.3f}".format)
    print(f"wbcatt, {len(sheet.names)} concepts, {sheet.is_test.sum()} test images, {options.seeds} seeds: mean ± sd")
    print(shown.where(mean.notna(), "").to_string())


if __name__ == "__main__":
    main()
